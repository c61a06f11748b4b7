"""Whole runs on a real Ray: what is printed and written, every W, killed and gone on with."""

import html
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from head import Head
from helpers import TRAINED, WEIGHTS_FILE
from hosts import LocalHost
from troubled import EVERY, STEPS, Reference, finish, start_here

from raygpt.runs.files import EVENTS, read_json_lines
from raygpt.runs.history import parse_samples
from raygpt.settings import load_settings
from raygpt.storage import Folder
from raygpt.train.checkpoints import METADATA, checkpoint_name, steps_of

STREAMED = ("--data.segment_steps", "29")
"""Ray Data brings most of the tokens; workers read those of the undisturbed run themselves."""
KEYS = {
    *("step", "tokens", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "mfu"),
    *("data_wait_ms", "world_size", "epoch", "batch_hash"),
}
LINE = re.compile(
    r"step +\d+ \| loss: \d+\.\d{6} \| lr \d\.\d{4}e[-+]\d\d \| norm: \d+\.\d{4} \| "
    r"dt: \d+\.\d\dms \| tok/sec: \d+\.\d\d"
)


@dataclass
class Place:
    """A settings file, and the storage it names."""

    head: Head
    file: Path
    storage: Path

    def train(self, name: str, *arguments: str, status: int = 0) -> str:
        return self.head.train(*self.arguments(name), *arguments, status=status)

    def arguments(self, name: str) -> list[str]:
        return ["--config", str(self.file), "--run.name", name, *STREAMED]

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.storage / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        return read_json_lines(Folder.from_path(str(self.storage / name)), EVENTS)

    def trained(self, name: str) -> list[dict[str, Any]]:
        return [{key: row[key] for key in TRAINED if key in row} for row in self.rows(name)]

    def sha256(self, name: str, step: int = STEPS) -> str:
        path = self.storage / name / checkpoint_name(step) / METADATA
        sha256: str = json.loads(path.read_text())["files"][WEIGHTS_FILE]["sha256"]
        return sha256


@pytest.fixture
def place(head: Head, reference: Reference) -> Place:
    return Place(head, reference.settings, Path(reference.storage))


@pytest.fixture
def quiet(reference: Reference) -> str:
    """The output of an undisturbed run of two workers, called ``quiet``."""
    return reference.output


def test_a_run_prints_what_a_user_wants_to_know(place: Place, quiet: str) -> None:
    lines = quiet.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert all(LINE.match(line) for line in steps)
    numbers = [int(line.split()[1]) for line in steps]
    logged = {*range(0, STEPS, 10), *range(EVERY - 1, STEPS, EVERY)}
    assert numbers == sorted(logged)
    titles = ["Settings", "Plan", "Result"]
    assert [line.strip() for line in lines if line.strip() in titles] == titles
    assert place.sha256("quiet")[:40] in quiet.replace(" ", "").replace("│\n│││", "")
    assert f"Sample at step {STEPS}:" in lines
    assert "Traceback" not in quiet and "Warning" not in quiet


def test_a_runs_folder_holds_what_the_design_says(place: Place, quiet: str) -> None:
    run = place.storage / "quiet"
    rows = place.rows("quiet")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == list(
        range(EVERY - 1, STEPS, EVERY)
    )
    assert rows[0]["epoch"] == 0 and rows[-1]["epoch"] >= 3
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    for row in rows[1:]:
        tokens = row["tokens"] - rows[row["step"] - 1]["tokens"]
        assert row["tokens_per_s"] == pytest.approx(1000 * tokens / row["step_ms"], rel=1e-3)
    assert steps_of(Folder.from_path(str(run)))[-2:] == [STEPS - EVERY, STEPS]
    samples = parse_samples((run / "samples.txt").read_text())
    assert samples[-1][0] == STEPS and {step % EVERY for step, _ in samples} == {0}
    assert list((run / "tensorboard").glob("events.out.*"))
    resolved, _ = load_settings(["--config", str(run / "config.json")])
    assert resolved.optim.min_lr == pytest.approx(3e-4)
    assert resolved.optim.decay_tokens == rows[-1]["tokens"]


def test_the_report_is_that_of_the_finished_run(place: Place, quiet: str) -> None:
    page = (place.storage / "quiet" / "report.html").read_text()
    assert '<span class="state finished">' in page
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    (told,) = json.loads(data)["runs"]
    rows = place.rows("quiet")
    assert told["curves"]["step"][-1] == STEPS - 1
    assert told["validations"]["val_loss"] == [r["val_loss"] for r in rows if "val_loss" in r]
    (start,) = (e for e in place.events("quiet") if e["kind"] == "start")
    (machine,) = start["machines"]
    assert machine["workers"] == 2 and machine["address"] in page and machine["device"] in page
    samples = (place.storage / "quiet" / "samples.txt").read_text()
    assert html.unescape(page).count(parse_samples(samples)[-1][1]) == 1


def kill_at(place: Place, name: str, step: int) -> None:
    """Start a run and kill its driver, the hard way, once ``step`` is in its metrics."""
    process = place.head.start("python", "jobs/train.py", *place.arguments(name))
    metrics = place.storage / name / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > step):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_run_goes_on_to_the_same_weights(place: Place, quiet: str) -> None:
    """Twice killed at a random moment; the second time its newest checkpoint is damaged, too."""
    kill_at(place, "killed", Random().randrange(1, STEPS // 3))
    kill_at(place, "killed", Random().randrange(STEPS // 2, STEPS * 2 // 3))
    run = place.storage / "killed"
    while place.head.nodes[0].workers():  # which outlive their driver for a moment
        time.sleep(0.05)
    newest = max(run.glob("checkpoint_*/" + METADATA)).parent
    begun = {path for path in run.glob("checkpoint_*") if path > newest}
    data = bytearray((newest / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (newest / WEIGHTS_FILE).write_bytes(data)

    output = place.train("killed")
    *unfinished, damage = (line for line in output.splitlines() if line.startswith("warning: "))
    assert str(newest / WEIGHTS_FILE) in damage and "sha256" in damage
    # Where it was killed in the middle of a checkpoint, that is said, too; nothing is said twice.
    assert len(unfinished) == len(begun), output
    assert all(f"{path} was never finished" in "".join(unfinished) for path in begun)
    assert place.trained("killed") == place.trained("quiet")
    assert place.sha256("killed") == place.sha256("quiet")


def test_a_finished_run_is_not_trained_again(place: Place, quiet: str) -> None:
    metrics = place.storage / "quiet" / "metrics.jsonl"
    before = metrics.read_bytes()
    output = place.train("quiet")
    assert f"is finished: all {STEPS} steps are done" in output
    assert metrics.read_bytes() == before


def test_other_settings_are_refused_with_old_and_new(place: Place, quiet: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in (place.storage / "quiet").rglob("*")}
    changed = ("--data.seed", "5", "--model.n_head", "4")
    output = place.train("quiet", *changed, status=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "data.seed was 1337, is 5" in error and "model.n_head was 2, is 4" in error
    after = {path: path.stat().st_mtime_ns for path in (place.storage / "quiet").rglob("*")}
    assert after == before


def test_a_cluster_that_is_too_small_is_told_at_once(place: Place) -> None:
    output = place.train("large", "--scale.workers", "3", status=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "room for 2 workers" in error and "its nodes have 2 CPUs" in error
    assert not (place.storage / "large").exists()


def test_ten_steps_that_are_not_finite_end_the_run(reference: Reference) -> None:
    """Weights that overflow: the last step that counted is the one that made them."""
    run = reference.run(reference.storage, "wild")
    output = finish(run.start_here("--optim.max_lr", "1e30", "--optim.warmup_steps", "0"), 2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "not finite in 10 steps in a row" in error and "lower optim.max_lr" in error
    rows = run.rows()
    assert [row["loss"] is None for row in rows[-10:]] == [True] * 10
    assert rows[-1]["skipped"] >= 10


def test_a_shard_that_changed_ends_the_run(reference: Reference, tmp_path: Path) -> None:
    """Bytes changed in place: the worker or read task that meets them names file and row group."""
    corpus = tmp_path / "corpus"
    shutil.copytree(Path(reference.storage).parent / "corpus", corpus)
    shard = corpus / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    for position in range(100, len(data) // 2, 50):
        data[position] ^= 1
    shard.write_bytes(data)
    run = reference.run(reference.storage, "damaged")
    output = finish(run.start_here("--data.corpus", str(corpus), *STREAMED), status=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert f"{shard}, row group" in error
    assert "Traceback" not in output


class HidingHost(LocalHost):
    """This machine, but for a folder that its programs see empty."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def command(self, *words: str) -> list[str]:
        script = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
        own = ("unshare", "--mount", "--propagation", "private", "bash", "-c", script)
        return [*own, str(self._folder), *words]


@pytest.mark.skipif(bool(os.geteuid()), reason="hiding a folder needs root")
def test_a_machine_that_does_not_reach_the_storage_is_named(place: Place) -> None:
    """Before a step is trained; all other machines reach it."""
    node = place.head.add_node(1, HidingHost(place.storage))
    try:
        node.wait()
        output = place.train("hidden", "--scale.workers", "3", status=2)
    finally:
        node.kill()
        place.head.nodes.remove(node)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    hidden = place.storage / "hidden"
    assert f"does not see {hidden}/config.json, which the driver wrote" in error
    assert "run.storage must be the same place for every machine" in error
    assert not (hidden / "metrics.jsonl").exists() and "Traceback" not in output


def test_a_submitted_job_of_one_worker_trains_the_same_model(place: Place, quiet: str) -> None:
    """``ray job submit`` as in the README; its exit status is the job's.

    Losses, norms, validation losses and weights: equal bits, not nearly equal numbers; also where
    layers are computed twice.
    """
    submit = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train.py")
    more = ("--scale.workers", "1", "--train.activation_checkpointing", "True")
    process = place.head.start(*submit, *place.arguments("submitted"), *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"Sample at step {STEPS}:" in output and LINE.search(output)
    assert {row["world_size"] for row in place.rows("submitted")} == {1}
    assert place.trained("submitted") == place.trained("quiet")
    assert place.sha256("submitted") == place.sha256("quiet")

    (package,) = place.head.folder.rglob("working_dir_files/_ray_pkg_*/")
    sent = {path.name for path in package.iterdir()}
    assert {"raygpt", "jobs"} < sent and not sent & {".git", ".venv", ".hypothesis"}

    process = place.head.start(*submit, "--train.stepps", "3")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: unknown option --train.stepps; did you mean --train.steps?" in output


def test_gpt2_trains_on_its_own_tokens(tmp_path: Path) -> None:
    """The 124M preset on this machine, 8 small steps: it begins at chance and falls."""
    small = ("--batch.tokens", "128", "--batch.lanes", "1", "--batch.micro", "1")
    process = start_here(
        *("gpt2", "--data.corpus", "embedded", "--run.storage", str(tmp_path), *small),
        *("--model.block_size", "128", "--train.steps", "8", "--train.eval_tokens", "0"),
        *("--optim.warmup_steps", "3", "--train.sample_tokens", "5", "--train.precision", "fp32"),
        *("--scale.gpus_per_worker", "0"),
    )
    finish(process)
    lines = (tmp_path / "gpt2" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 8
    assert losses[0] == pytest.approx(math.log(50_304), abs=0.2)
    assert sum(losses[-3:]) / 3 < losses[0] - 1
    shutil.rmtree(tmp_path)  # a checkpoint of 1.5 GB
