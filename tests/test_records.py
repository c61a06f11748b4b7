"""The figures of a step that are derived from others."""

import pytest

from raygpt.config import ModelConfig
from raygpt.sizes import flops_per_token
from raygpt.train.checkpoints import Position
from raygpt.train.records import Recorder
from raygpt.train.step import StepResult


class Known:
    """What each worker's device reaches."""

    def __init__(self, flops: float | None) -> None:
        self.flops = flops


@pytest.mark.parametrize(("peak", "expected"), [(1e12, True), (None, False)])
def test_utilisation_is_that_of_all_workers(peak: float | None, expected: bool) -> None:
    model = ModelConfig(2, 2, 32, 32, 264)
    recorder = Recorder(model, Known(peak), world_size=3)  # type: ignore[arg-type]
    result = StepResult(2.5, 0.5, ("00" * 8,) * 2, False, (), (1.0,) * 3)
    record = recorder.record(
        Position(8), result, tokens=6000, lr=1e-3, epoch=1, seconds=0.5, data_wait=0.1, between={}
    )
    row = record.metrics
    assert (row["step"], row["tokens_per_s"], row["step_ms"]) == (7, 12_000, 500)
    # 12,000 tokens a second, of three devices with 1e12 FLOP/s each
    utilisation = flops_per_token(model) * 12_000 / 3e12
    assert row["mfu"] == (pytest.approx(utilisation) if expected else None)
