"""Surroundings of every test, and what several of them need."""

import contextlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# Before Ray or torch is imported: they read these once, and pass them on to their processes.
os.environ.update(
    OMP_NUM_THREADS="1",  # two test processes share few cores, and sums depend on it
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # at Ray's 15 they starve beside the tests of the other process
    # A folder that is gone with this process.
    XDG_CACHE_HOME=(_caches := tempfile.TemporaryDirectory(prefix="raygpt-tests-")).name,
    # One token for all clusters of a test run. Ray would make one in the home folder, and two
    # test processes that start at once would overwrite each other's.
    RAY_AUTH_MODE="token",
    # Nobody's, in the place of any others; processes of Ray have the environment of its head.
    AWS_ACCESS_KEY_ID="key-of-the-raygpt-tests",
    AWS_SECRET_ACCESS_KEY="secret-of-the-raygpt-tests",
    AWS_EC2_METADATA_DISABLED="true",
)
os.environ.pop("AWS_SESSION_TOKEN", None)
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ.pop("RAY_ADDRESS", None)  # never run tests on somebody's cluster

import pytest
from head import Head
from troubled import Reference

from raygpt import products
from raygpt.data.corpus import Corpus, open_corpus
from raygpt.data.prepare import prepare


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a cluster run one after the other: Ray gives a node 30 s to start, and two
    clusters at once would take the processors from each other."""
    for item in items:
        if {"ray_session", "head"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(params=[False, True], ids=["by MKL", "by oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What multiplies fp32 matrices, whichever is faster here."""
    monkeypatch.setattr(products, "is_faster", lambda: request.param)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The first 100,000 bytes of the embedded text, a token a byte; a tenth for validation."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:100_000]
    (folder / "text.txt").write_bytes(text)
    output = str(folder / "corpus")
    prepare([str(folder / "text.txt")], output, "bytes", val_fraction=0.1, on_ray=False)
    return open_corpus(output)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two CPUs in this process, shared by all tests that ask for it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A Ray head of two CPUs, which two workers and their readers fill."""
    # Metrics are exported every ten seconds otherwise.
    with Head(cpus=2, environment={"RAY_metrics_report_interval_ms": "1000"}) as started:
        yield started


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A short run without trouble, for those that meet some; one for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "reference"
    folder.mkdir(exist_ok=True)
    return Reference(folder)


@contextlib.contextmanager
def _mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, mounted for a while; needs root."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, too small for anything."""
    with _mounted(tmp_path / "disk", "64k") as folder:
        yield folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, enough for a short run."""
    with _mounted(tmp_path / "disk", "4m") as folder:
        yield folder
