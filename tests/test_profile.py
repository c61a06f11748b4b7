"""Where a step's time goes: a trace of each worker, and a table that adds up."""

import gzip
import json
import re
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import on_workers, only
from test_step import MODEL, windows

from raygpt.config import OptimConfig, TrainConfig
from raygpt.data.stream import StepWindows
from raygpt.errors import UserError
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.storage import Folder
from raygpt.train import reduce
from raygpt.train.profile import PARTS, Profiler, table
from raygpt.train.step import Stepper

PAUSES = dict(zip(PARTS, (0.03, 0.01, 0.02, 0.005, 0.004), strict=True))
REST = 0.015
LATE = 0.3
"""Seconds."""


def loop(folder: Path) -> list[str]:
    """Six steps of a worker, of which three are profiled; what lies in the folder after each."""
    profiler = Profiler("2:5", torch.device("cpu"), Folder.from_path(str(folder)), 0.0, print)
    seen = []
    for step in range(6):
        with profiler.step(step):
            for part, pause in PAUSES.items():
                with profiler.part(part):
                    torch.ones(8) @ torch.ones(8)
                    time.sleep(pause)
            time.sleep(REST)
        seen.append(",".join(sorted(path.name for path in folder.glob("profile/*"))))
    return seen


def columns(text: str) -> list[dict[str, float]]:
    """Of each of two workers, the milliseconds of a table by part."""
    return [
        {
            line.split("|")[1].strip(): float(re.findall(r"([\d.]+) \(", line)[column])
            for line in text.splitlines()[2:]
        }
        for column in (0, 1)
    ]


def test_traces_and_a_table_of_the_steps_that_were_named(tmp_path: Path) -> None:
    seen = on_workers(2, loop, tmp_path)[0]
    assert seen[:4] == ["", "", "", ""]
    names = ["steps_2_to_4.md", *(f"steps_2_to_4_rank_{rank}.json.gz" for rank in (0, 1))]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    for name in names[1:]:
        trace = json.loads(gzip.decompress((tmp_path / "profile" / name).read_bytes()))
        found = [e["name"] for e in trace["traceEvents"] if e.get("ph") == "X"]
        assert all(found.count(part) == 3 for part in (*PARTS, "step"))
        assert "aten::dot" in found
    text = (tmp_path / "profile" / names[0]).read_text()
    assert text.startswith("| ms a step | worker 0 | worker 1 |\n")
    for ms in columns(text):
        step = ms.pop("step")
        assert list(ms) == [*PARTS, "rest"]
        assert sum(ms.values()) == pytest.approx(step, abs=0.1)
        for part, pause in {**PAUSES, "rest": REST}.items():
            assert ms[part] >= 1000 * pause


def late(folder: Path) -> None:
    """Three steps of two workers, of which the second one is late in its backward passes."""
    rank, steps = torch.distributed.get_rank(), range(3)
    profiler = Profiler("1:3", torch.device("cpu"), Folder.from_path(str(folder)), 0.0, print)
    model = GPT(MODEL)
    if rank == 1:
        model.transformer.ln_f.register_full_backward_hook(lambda *_: time.sleep(LATE))
    with patch.object(reduce, "LARGE_MB", 0.001):  # so many that the first one waits within its own
        ddp = reduce.data_parallel(model)
    with only("network"):  # memory never waits there
        stepper = Stepper(
            model, ddp, build_optimizer(model, OptimConfig()), lanes=2, micro=4, grad_clip=1.0,
            device=torch.device("cpu"), dtype=torch.float32, seed=1, part=profiler.part,
        )  # fmt: skip
    for step in steps:
        with profiler.step(step):
            result = stepper.gradient(StepWindows(step, 0, {rank: windows(5, rank)}), (0, 1))
            stepper.update(result, 1e-3)


def test_waiting_within_a_backward_pass_is_no_part_of_it(tmp_path: Path) -> None:
    on_workers(2, late, tmp_path)
    ms = columns((tmp_path / "profile" / "steps_1_to_2.md").read_text())
    assert ms[0]["exchange"] > 1000 * LATE * 0.8 > 2 * ms[0]["backward"] > 0
    assert ms[1]["backward"] > 1000 * LATE > 2 * ms[1]["exchange"] > 0
    for column in ms:
        step = column.pop("step")
        assert sum(column.values()) == pytest.approx(step, abs=0.1) and column["rest"] >= 0


def refused(folder: Path) -> list[str]:
    """What is said where the storage takes no profile."""
    said: list[str] = []
    run = Folder.from_path(str(folder))
    profiler = Profiler("0:1", torch.device("cpu"), run, 0.0, said.append)
    with profiler.step(0):
        pass
    return said


def test_a_storage_that_takes_no_profile_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_bytes(b"a file in the way")
    (said,) = on_workers(1, refused, tmp_path)
    assert [text.split(":")[0] for text in said] == [
        "no steps_0_to_0_rank_0.json.gz",
        "no steps_0_to_0.md",
    ]


def test_shares_add_up() -> None:
    parts = dict.fromkeys(PARTS, 10.0)
    shares = re.findall(r"\(([\d.]+)%\)", table([{**parts, "step": 80.0}]))
    assert [float(share) for share in shares] == [12.5] * 5 + [37.5, 100.0]


@pytest.mark.parametrize("steps", ["3", "3:", ":3", "3:3", "4:2", "-1:2", "a:b", "1:2:3"])
def test_steps_that_cannot_be_profiled(steps: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile must be N:M"):
        TrainConfig(profile=steps)


def test_steps_beyond_the_end() -> None:
    TrainConfig(profile="5:10", steps=10)
    with pytest.raises(UserError, match=r"train\.profile 5:11: the run ends at step 10"):
        TrainConfig(profile="5:11", steps=10)
