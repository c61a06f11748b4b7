"""The README's first command: the embedded text, no cluster, from nothing to a sample."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize(
    ("preset", "steps", "reached"), [("shakespeare", 600, 2.0), ("shakespeare-modern", 150, 2.0)]
)
def test_the_embedded_text_is_learned_and_ends_with_a_sample(
    tmp_path: Path, preset: str, steps: int, reached: float
) -> None:
    """In fewer steps than the preset's; what all of them reach, benchmarks.recipes measures."""
    every = str(steps // 2)
    output = subprocess.run(
        [
            *(sys.executable, "jobs/train.py", preset, "--run.storage", str(tmp_path)),
            *("--train.steps", str(steps), "--train.eval_every", every),
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
        json.loads(line) for line in (tmp_path / preset / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == steps and rows[-1]["val_loss"] <= reached  # nats a byte
    assert {row["world_size"] for row in rows} == {2}
    before, _, sample = output.partition(f"Sample at step {steps}:\n")
    assert "Result" in before and len(sample) > 150
    assert sample.strip() in (tmp_path / preset / "samples.txt").read_text()
