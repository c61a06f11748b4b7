"""A small run that can be disturbed: its settings, and what its files say of it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from raygpt.data.prepare import prepare
from raygpt.runs.files import EVENTS, LEDGER, METRICS

MAX_WORKERS = 3
SETTINGS = f"""
run: {{storage: STORAGE}}
data: {{corpus: CORPUS, segment_steps: SEGMENT}}
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: 32, vocab_size: 264, dropout: 0.1NETWORK}}
batch: {{tokens: TOKENS, lanes: 4, micro: 8}}
optim: {{max_lr: 3.0e-3, warmup_steps: 20, decay_tokens: 20000000OPTIMIZER}}
train:
  {{log_every: 50, eval_every: 100, eval_tokens: 4096, checkpoint_every: 250,
  sample_prompt: "", precision: fp32}}
scale: {{workers: "1:{MAX_WORKERS}", gpus_per_worker: 0}}
"""
MODERN = {
    "NETWORK": ", positions: rotary, norm: rms, qk_norm: true, activation: relu2, bias: false",
    "OPTIMIZER": ", matrices: muon",
}
_LINE_BYTES = 4096
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Trial:
    """A run of ``jobs/train.py`` by name; all trials of a folder have the same settings."""

    folder: Path
    name: str
    steps: int = 50_000
    """The run's end, which its learning rate does not depend on."""

    @staticmethod
    def prepare(folder: Path, tokens: int, segment: int = 100, modern: bool = False) -> None:
        """Write corpus and settings for the trials of a folder.

        Args:
            tokens: of a step.
            segment: steps that one block of the stream holds.
            modern: the recipe, in the place of GPT-2's.
        """
        text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:60_000]
        (folder / "text.txt").write_bytes(text)
        corpus = str(folder / "corpus")
        prepare([str(folder / "text.txt")], corpus, "bytes", val_fraction=0.1, on_ray=False)
        settings = SETTINGS
        for name, value in (
            ("STORAGE", folder / "runs"),
            ("CORPUS", corpus),
            ("SEGMENT", segment),
            ("TOKENS", tokens),
            *((part, more if modern else "") for part, more in MODERN.items()),
        ):
            settings = settings.replace(name, str(value))
        (folder / "run.yaml").write_text(settings)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / self.name

    @property
    def program(self) -> list[str]:
        """What starts the driver."""
        settings = ("--config", str(self.folder / "run.yaml"), "--run.name", self.name)
        return ["python", "jobs/train.py", *settings, "--train.steps", str(self.steps)]

    def train_here(self) -> None:
        """Train it to its end without a cluster."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [sys.executable, *self.program[1:]]
        done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def rows(self) -> list[dict[str, Any]]:
        """A line for every step of the finished history."""
        return self._lines(METRICS)

    def ledger(self) -> list[dict[str, Any]]:
        """A line for every step that was computed, as often as it was."""
        return self._lines(LEDGER)

    def starts(self) -> list[int]:
        """The step at which each group of workers began."""
        return [event["step"] for event in self._lines(EVENTS) if event["kind"] == "start"]

    def newest(self) -> dict[str, Any] | None:
        """The last line of the ledger, if there is one."""
        path = self.run / LEDGER
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LINE_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run / name
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data.split(b"\n")[:-1]]
