"""What workers tell each other of their machines."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import on_workers

from raygpt.errors import UserError
from raygpt.train.host import gather_machines

BF16, FP32 = torch.bfloat16, torch.float32


def gathered(*dtypes: torch.dtype) -> tuple[list[dict[str, Any]], bool] | str:
    """By workers of two machines, which multiply in ``dtypes``."""
    rank = dist.get_rank()
    node = SimpleNamespace(get_node_id=lambda: str(rank // 2))
    address = f"10.0.0.{rank // 2}"
    with (
        patch("ray.get_runtime_context", return_value=node),
        patch("ray.util.get_node_ip_address", return_value=address),
    ):
        try:
            return gather_machines(torch.device("cpu"), dtypes[rank])
        except UserError as error:
            return str(error)


def test_machines_and_their_workers() -> None:
    found: Any = on_workers(3, gathered, FP32, FP32, FP32)
    assert [first for _, first in found] == [True, False, True]
    for machines, _ in found:
        assert [(m["address"], m["ranks"]) for m in machines] == [
            ("10.0.0.0", [0, 1]),
            ("10.0.0.1", [2]),
        ]


def test_workers_that_multiply_in_several_types_are_refused_everywhere() -> None:
    found = on_workers(3, gathered, FP32, FP32, BF16)
    assert len(set(map(str, found))) == 1
    for part in ("torch.float32 on", "(10.0.0.0)", "torch.bfloat16 on", "(10.0.0.1)", "fp32"):
        assert part in str(found[0])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_one_type_is_enough(dtype: torch.dtype) -> None:
    assert not isinstance(on_workers(2, gathered, dtype, dtype)[0], str)
