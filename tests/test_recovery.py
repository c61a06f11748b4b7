"""Who stops a run gets a checkpoint, and the weights at the end are those of a quiet run."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from head import Head
from helpers import WEIGHTS_FILE

from raygpt.data.prepare import prepare
from raygpt.train.state import METADATA, checkpoint_name

STEPS = 600
SETTINGS = f"""
run: {{storage: STORAGE}}
data: {{corpus: CORPUS, segment_steps: 100}}
model: {{n_layer: 2, n_head: 2, n_embd: 32, block_size: 32, vocab_size: 264, dropout: 0.1}}
batch: {{tokens: 1024, lanes: 4, micro: 4}}
optim: {{max_lr: 3.0e-3, warmup_steps: 20}}
train:
  {{steps: {STEPS}, log_every: 50, eval_every: 100, eval_tokens: 4096, checkpoint_every: 100000,
  sample_prompt: "", precision: fp32}}
scale: {{workers: 2, gpus_per_worker: 0}}
"""
TRAINED = ("step", "tokens", "loss", "lr", "grad_norm", "epoch", "batch_hash", "val_loss")


class Runs:
    """Runs of the same settings under several names."""

    def __init__(self, folder: Path) -> None:
        text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:60_000]
        (folder / "text.txt").write_bytes(text)
        corpus, self.storage = str(folder / "corpus"), folder / "storage"
        prepare([str(folder / "text.txt")], corpus, "bytes", val_fraction=0.1, on_ray=False)
        self.file = folder / "run.yaml"
        self.file.write_text(
            SETTINGS.replace("STORAGE", str(self.storage)).replace("CORPUS", corpus)
        )

    def command(self, name: str, *more: str) -> list[str]:
        return ["python", "jobs/train.py", "--config", str(self.file), "--run.name", name, *more]

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        path = self.storage / name / file
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    def starts(self, name: str) -> list[int]:
        """The step at which each group of workers began."""
        events = self.lines(name, "events.jsonl")
        return [event["step"] for event in events if event["kind"] == "start"]

    def result(self, name: str) -> tuple[str, list[dict[str, Any]]]:
        """sha256 of the final weights, and what metrics.jsonl says of the training."""
        path = self.storage / name / checkpoint_name(STEPS) / METADATA
        rows = self.lines(name, "metrics.jsonl")
        trained = [{key: row[key] for key in TRAINED if key in row} for row in rows]
        return json.loads(path.read_text())["files"][WEIGHTS_FILE]["sha256"], trained

    def wait_for(
        self, process: "subprocess.Popen[str]", condition: Callable[[], bool], seconds: float = 120
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(process.communicate()[0])
            time.sleep(0.01)

    def wait_for_step(self, process: "subprocess.Popen[str]", name: str, step: int) -> None:
        metrics = self.storage / name / "metrics.jsonl"
        self.wait_for(
            process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > step
        )


def finish(process: "subprocess.Popen[str]", status: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("recovery"))


@pytest.fixture(scope="module")
def quiet(head: Head, runs: Runs) -> tuple[str, list[dict[str, Any]]]:
    finish(head.start(*runs.command("quiet")))
    return runs.result("quiet")


def test_ctrl_c_ends_in_a_checkpoint(
    head: Head, runs: Runs, quiet: tuple[str, list[dict[str, Any]]]
) -> None:
    process = head.start(*runs.command("interrupted"))
    runs.wait_for_step(process, "interrupted", 100)
    process.send_signal(signal.SIGINT)
    output = finish(process, status=130)
    assert "stopped; submit the run again, and it goes on" in output and "Traceback" not in output
    finish(head.start(*runs.command("interrupted", "--scale.workers", "1")))
    assert len(runs.starts("interrupted")) == 2
    assert runs.result("interrupted") == quiet
