"""The README's first command: the embedded text, no cluster, from nothing to a sample."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


STEPS = 1000


@pytest.mark.xdist_group("ray")
def test_the_default_learns_and_ends_with_a_sample(tmp_path: Path) -> None:
    """In fewer steps than the preset's; what all of them reach, benchmarks.recipes measures."""
    every = str(STEPS // 2)
    output = subprocess.run(
        [
            *(sys.executable, "jobs/train.py", "--run.storage", str(tmp_path)),
            *("--train.steps", str(STEPS), "--train.eval_every", every),
            *("--train.checkpoint_every", every),
        ],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    ).stdout
    rows = [
        json.loads(line)
        for line in (tmp_path / "shakespeare" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == STEPS and rows[-1]["val_loss"] <= 1.80  # nats a byte
    assert {row["world_size"] for row in rows} == {2}
    before, _, sample = output.partition(f"Sample at step {STEPS}:\n")
    assert "Result" in before and len(sample) > 150
    assert sample.strip() in (tmp_path / "shakespeare" / "samples.txt").read_text()
