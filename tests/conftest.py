"""Surroundings of every test, and what several of them need."""

import os
import subprocess
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

# Before Ray or torch is imported: they read these once, and pass them on to their processes.
os.environ.update(
    OMP_NUM_THREADS="1",  # two test processes share few cores, and sums depend on it
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    # One token for all clusters of a test run. Ray would make one in the home folder, and two
    # test processes that start at once would overwrite each other's.
    RAY_AUTH_MODE="token",
)
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ.pop("RAY_ADDRESS", None)  # never run tests on somebody's cluster

import pytest
from head import Head

from raygpt.data.corpus import Corpus, open_corpus
from raygpt.data.prepare import prepare


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray run one after the other: each needs the CPUs it asks for."""
    for item in items:
        if {"ray_session", "head"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ray"))


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
    with Head(cpus=2) as started:
        yield started


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, mounted for a test; needs root."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
