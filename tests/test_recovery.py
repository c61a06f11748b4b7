"""Machines come, go and die; the weights at the end are those of a quiet run, bit for bit."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_loses_no_finished_step(
    head: Head, runs: Runs, quiet: tuple[str, list[dict[str, Any]]], rank: int
) -> None:
    """Far from any checkpoint: the survivor saves what all replicas have, before it goes."""
    name = f"killed-{rank}"
    process = head.start(*runs.command(name))
    runs.wait_for_step(process, name, 200)
    workers = sorted(head.nodes[0].workers(), key=lambda worker: worker.pid)
    assert len(workers) == 2
    workers[rank].kill()
    seen = len(runs.lines(name, "metrics.jsonl"))
    finish(process)
    first, second = runs.starts(name)
    assert first == 0 and second >= seen - 1
    assert runs.result(name) == quiet


def test_a_stopped_job_goes_on(
    head: Head, runs: Runs, quiet: tuple[str, list[dict[str, Any]]]
) -> None:
    """``ray job stop``, which sends SIGTERM to the job: no step is lost, none done twice."""
    submit = ("ray", "job", "submit", "--working-dir", ".", "--submission-id", "to-stop")
    process = head.start(*submit, "--", *runs.command("stopped"))
    runs.wait_for_step(process, "stopped", 100)
    finish(head.start("ray", "job", "stop", "to-stop"))
    output, _ = process.communicate(timeout=60)
    assert "stopped; submit the run again, and it goes on" in output
    stopped_at = len(runs.lines("stopped", "metrics.jsonl"))
    finish(head.start(*runs.command("stopped")))
    assert runs.starts("stopped") == [0, stopped_at]
    assert runs.result("stopped") == quiet


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


@pytest.fixture
def small_head() -> Iterator[Head]:
    """A cluster of one CPU, to be joined by others."""
    with Head(cpus=1) as started:
        yield started


def test_a_run_grows_shrinks_and_loses_a_machine(
    small_head: Head, runs: Runs, quiet: tuple[str, list[dict[str, Any]]]
) -> None:
    """It starts with what is there; neither a resize nor a dead machine costs a finished step."""
    name = "elastic"
    process = small_head.start(*runs.command(name, "--scale.workers", "1:3"))
    runs.wait_for_step(process, name, 30)

    def size() -> int:
        rows = runs.lines(name, "metrics.jsonl")
        return rows[-1]["world_size"] if rows else 0

    assert size() == 1
    node = small_head.add_node(cpus=1)
    runs.wait_for(process, lambda: size() == 2)
    node.kill()
    runs.wait_for(process, lambda: len(runs.starts(name)) == 3 and size() == 1)
    finish(process)
    ledger = [entry["step"] for entry in runs.lines(name, "ledger.jsonl")]
    assert len(ledger) == len(set(ledger)), "a finished step was lost and redone"
    assert runs.result(name) == quiet
