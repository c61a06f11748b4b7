"""Short runs that meet trouble, and what must come out of them."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from head import ROOT, Head
from helpers import TRAINED

from raygpt.data.prepare import prepare
from raygpt.runs.files import EVENTS, LEDGER, METRICS, read_json_lines
from raygpt.storage import Folder
from raygpt.train import checkpoints

STEPS, EVERY = 120, 30
SETTINGS = f"""
run: {{storage: STORAGE}}
data: {{corpus: CORPUS}}
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: 32, vocab_size: 264, dropout: 0.1}}
batch: {{tokens: 1024, lanes: 4, micro: 5, ramp_start_tokens: 256, ramp_tokens: 10000}}
optim: {{max_lr: 3.0e-3, min_lr: null, warmup_steps: 20, grad_clip: 1.0}}
train:
  {{steps: {STEPS}, checkpoint_every: {EVERY}, eval_every: {EVERY}, eval_tokens: 8192,
  log_every: 10, sample_tokens: 20, precision: fp32}}
scale: {{workers: 2, gpus_per_worker: 0}}
"""
"""Several epochs of 30,000 bytes."""
Result = tuple[str, list[dict[str, Any]]]


def start_here(*arguments: str) -> "subprocess.Popen[str]":
    """``jobs/train.py`` with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", *arguments],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class Run:
    """A run of these settings, somewhere.

    Args:
        head: of the cluster that gets its jobs, if it is to have any.
    """

    def __init__(self, settings: Path, storage: str, name: str, head: Head | None = None) -> None:
        self._head, self._settings = head, settings
        self.storage, self.name = storage, name
        self.folder = Folder.from_path(storage).child(name)

    def start(self, *more: str, storage: str | None = None) -> "subprocess.Popen[str]":
        """Submit it, by default as tests see it; ``storage`` is another way to the same place."""
        assert self._head is not None
        return self._head.start("python", "jobs/train.py", *self._arguments(storage), *more)

    def start_here(self, *more: str, storage: str | None = None) -> "subprocess.Popen[str]":
        """The same without the cluster, which is much less work for this machine."""
        return start_here(*self._arguments(storage), *more)

    def _arguments(self, storage: str | None) -> list[str]:
        place = ("--run.storage", storage or self.storage, "--run.name", self.name)
        return ["--config", str(self._settings), *place]

    def rows(self, file: str = METRICS) -> list[dict[str, Any]]:
        return read_json_lines(self.folder, file)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.rows(EVENTS) if event["kind"] == kind]

    def has_checkpoint(self, step: int) -> bool:
        return checkpoints.is_finished(self.folder, step)

    def result(self) -> Result:
        """Hash of the final weights, and what metrics.jsonl says of the training."""
        found = checkpoints.latest(self.folder)
        assert found is not None and found.position.step == STEPS
        rows = self.rows()
        trained = [{key: row[key] for key in TRAINED if key in row} for row in rows]
        return found.weights_sha256, trained

    def redone(self) -> list[int]:
        """Steps that were trained more than once."""
        steps = [entry["step"] for entry in self.rows(LEDGER)]
        return sorted({step for step in steps if steps.count(step) > 1})


class Reference:
    """The same run without any trouble, called ``quiet``: on this machine, without a cluster.

    Args:
        folder: where it lies; the first process that names it trains the run, others wait.
    """

    def __init__(self, folder: Path) -> None:
        self.settings, self.storage = folder / "run.yaml", str(folder / "storage")
        run, output = self.run(self.storage, "quiet"), folder / "output.txt"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                self._prepare(folder)
                output.write_text(finish(run.start_here()))
        self.output = output.read_text()
        """What the driver printed."""
        self.result = run.result()
        assert [row["step"] for row in self.result[1]] == list(range(STEPS))

    def _prepare(self, folder: Path) -> None:
        text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:30_000]
        (folder / "text.txt").write_bytes(text)
        corpus = str(folder / "corpus")
        prepare([str(folder / "text.txt")], corpus, "bytes", val_fraction=0.1, on_ray=False)
        self.settings.write_text(
            SETTINGS.replace("STORAGE", self.storage).replace("CORPUS", corpus)
        )

    def run(self, storage: str, name: str, head: Head | None = None) -> Run:
        return Run(self.settings, storage, name, head)


def wait_for(
    process: "subprocess.Popen[str]", condition: Callable[[], bool], seconds: float = 120
) -> None:
    """Until it holds; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)


def finish(process: "subprocess.Popen[str]", status: int = 0, timeout: float = 180) -> str:
    """Its output, once it has ended with ``status``."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running:\n{process.communicate()[0]}") from None
    assert process.returncode == status, output
    return output
