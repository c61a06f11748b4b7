"""What the run's files say of a finished step: measured, counted, and what it was trained on."""

import time
from dataclasses import dataclass

from raygpt.config import ModelConfig
from raygpt.data.hashes import batch_hash
from raygpt.peak import Peak
from raygpt.sizes import flops_per_token
from raygpt.train.checkpoints import Position
from raygpt.train.progress import StepRecord
from raygpt.train.step import StepResult


@dataclass(frozen=True)
class Recorder:
    """Makes the records of one group of workers."""

    model: ModelConfig
    peak: Peak
    """Of each worker's device."""
    world_size: int

    def record(
        self,
        position: Position,
        result: StepResult,
        *,
        tokens: int,
        lr: float,
        epoch: int,
        seconds: float,
        data_wait: float,
        between: dict[str, float],
    ) -> StepRecord:
        """The record of the step that led to a position.

        Args:
            tokens: targets of the step.
            epoch: in which lane 0 begins it.
            seconds: what it took, with ``data_wait`` of them for its windows.
            between: further columns, what the time since the step before it went into.
        """
        now, step, peak = round(time.time(), 3), position.step - 1, self.peak.flops
        speed = tokens / seconds
        flops = flops_per_token(self.model) * speed
        row = {
            "step": step,
            "tokens": position.tokens,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "step_ms": round(1000 * seconds, 3),
            "tokens_per_s": round(speed, 2),
            "mfu": flops / (peak * self.world_size) if peak else None,
            "data_wait_ms": round(1000 * data_wait, 3),
            "world_size": self.world_size,
            "lane_ms": [round(ms, 3) for ms in result.lane_ms],
            "epoch": epoch,
            "batch_hash": batch_hash(result.lane_hashes),
            "skipped": position.skipped,
            "time": now,
            **between,
        }
        ledger = {
            "step": step,
            "time": now,
            "world_size": self.world_size,
            "lanes": list(result.lane_hashes),
        }
        return StepRecord(row, ledger)
