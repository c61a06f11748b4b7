"""Runs and checkpoints on S3: as on a disk, also where the store is away or does not answer."""

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import s3
from head import ROOT, Head, activated
from saved import Run
from troubled import EVERY, STEPS, Reference, finish, wait_for

from raygpt.runs.files import METRICS
from raygpt.storage import Folder, StorageError, patiently
from raygpt.train.checkpoints import open_checkpoint, prune, steps_of
from raygpt.train.state import restore

AWAY_SECONDS = 8.0
"""Longer than pyarrow itself tries to reach a store that refuses connections, which is 6 s."""
SILENT_SECONDS = 20.0
"""pyarrow goes on asking a store that does not answer for about 100 s."""
GAP_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.Server(tmp_path_factory.mktemp("s3")) as started:
        yield started


@pytest.fixture
def way(server: s3.Server) -> Iterator[s3.Way]:
    with s3.Way(server) as open_way:
        yield open_way


def test_a_folder_on_s3(server: s3.Server) -> None:
    folder = Folder.from_path(s3.uri(server.port, "folder/deep"))
    assert (folder.exists(), folder.list(), folder.walk()) == (False, [], [])
    folder.write_bytes("b.bin", b"first")
    folder.write_bytes("b.bin", b"second!")
    folder.write_bytes("c/a.txt", b"")
    large = bytes(range(256)) * 2**16  # in more than one part
    folder.write_bytes("large", large)
    assert folder.read_bytes("b.bin") == b"second!" and folder.read_bytes("large") == large
    assert folder.list() == ["b.bin", "c", "large"]
    assert folder.walk(recursive=False) == [("b.bin", 7), ("large", len(large))]
    for _ in range(2):
        folder.delete_file("b.bin")
        folder.child("c").delete()
    assert folder.list() == ["large"]
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("b.bin")
    with pytest.raises(StorageError, match="cannot write s3://another/x"):
        Folder.from_path(s3.uri(server.port, "").replace(s3.BUCKET, "another")).write_bytes(
            "x", b""
        )


def test_checkpoints_on_s3(server: s3.Server) -> None:
    run = Run(s3.uri(server.port, "checkpoints"))
    for step in (1, 2, 3):
        run.train(1, seed=step)
        prune(run.folder, run.save(step))
    assert steps_of(run.folder) == [2, 3]
    found, messages = run.latest()
    assert found is not None and found.position.step == 3 and not messages
    other = Run(run.folder.uri, seed=2)
    restore(found, other.model, other.optimizer)
    assert other.weights() == run.weights()


def test_an_upload_that_breaks_off_is_tried_again(way: s3.Way) -> None:
    """And while the store is away nobody believes that there are no checkpoints."""
    run = Run(s3.uri(way.port, "broken"))
    run.train(1)
    run.save(1)
    run.train(1, seed=1)
    way.break_at("model.safetensors?partNumber")
    with pytest.raises(StorageError, match=r"cannot write .*model\.safetensors"):
        run.save(2)
    assert way.broken.is_set()
    with pytest.raises(StorageError):
        run.latest()
    threading.Timer(1.0, way.mend).start()
    said: list[str] = []
    saved = patiently(lambda: run.save(2), 60.0, said.append)
    assert all("trying again for up to 60 s" in text for text in said) and len(said) <= 1
    found, messages = run.latest()
    assert found is not None and found.position.step == 2 and not messages
    assert open_checkpoint(found.folder).weights_sha256 == saved.weights_sha256
    assert {name for name, _ in found.folder.walk()} == {
        "checkpoint.json", "model.safetensors", "optimizer.safetensors",
    }  # fmt: skip


def test_a_run_on_a_store_that_goes_away_and_falls_silent(
    head: Head, server: s3.Server, way: s3.Way, reference: Reference
) -> None:
    """A story in two jobs: the same model as on a disk, and each step once.

    The store is away while a checkpoint is uploaded, away again when workers that replace others
    start, and silent once.
    """
    run = reference.run(s3.uri(server.port, "runs"), "troubled", head)
    storage = s3.uri(way.port, "runs")

    way.break_at(f"checkpoint_{EVERY:08d}/model.safetensors?partNumber")
    first = run.start(storage=storage)
    wait_for(first, way.broken.is_set)
    time.sleep(AWAY_SECONDS)
    way.mend()
    wait_for(first, lambda: run.has_checkpoint(EVERY))
    way.break_at("troubled/config.json")  # what a worker looks for when it starts
    head.nodes[0].workers()[0].kill()
    wait_for(first, way.broken.is_set)
    time.sleep(AWAY_SECONDS)
    # Not once they train, which may be near the end: where a step is short, the job was at the
    # second checkpoint when its worker was lost, and had waited there for the first one.
    first.send_signal(signal.SIGINT)
    way.mend()
    output = finish(first, status=130)
    assert "submit the run again, and it goes on" in output and "Traceback" not in output
    assert output.count("trying again for up to 300 s") >= 1
    stopped_at = len(run.rows())
    assert EVERY < stopped_at < STEPS
    assert len(run.events("start")) == 2 and run.has_checkpoint(stopped_at)

    second = run.start_here(storage=storage)
    wait_for(second, lambda: run.has_checkpoint(3 * EVERY))
    server.stop()
    time.sleep(SILENT_SECONDS)
    server.go_on()
    output = finish(second)
    assert "Traceback" not in output
    assert run.result() == reference.result
    assert run.redone() == []
    times = [row["time"] for row in run.rows() if row["step"] >= stopped_at]
    gap = max(later - sooner for sooner, later in pairwise(times))
    print(f"training stood still for {gap:.1f} s of {SILENT_SECONDS:.0f}")
    assert gap < GAP_SECONDS

    check_jobs(run.folder)
    check_secrets(run.folder, head, output)


def check_jobs(run: Folder) -> None:
    """What one does with a run's folder."""
    for job in (("sample.py", "--checkpoint", run.uri, "--prompt", "O"), ("audit.py", run.uri)):
        done = subprocess.run(
            ("python", f"jobs/{job[0]}", *job[1:]),
            cwd=ROOT, env=activated(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def check_secrets(run: Folder, head: Head, output: str) -> None:
    """Credentials stand nowhere in what a run writes and says."""
    files = {name: run.read_bytes(name) for name, _ in run.walk()}
    assert {METRICS, "config.json", "events.jsonl"} <= files.keys()
    logs = {str(path): path.read_bytes() for path in head.logs}
    assert len(logs) > 10
    files |= logs
    files["the driver's output"] = output.encode()
    for secret in s3.SECRETS:
        assert [file for file, data in files.items() if secret.encode() in data] == []
