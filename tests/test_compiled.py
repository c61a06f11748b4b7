"""What was compiled is kept with the run: nobody's code is run who has not the cluster's token.

That elsewhere nothing is compiled again is in test_watch.py, with a whole run."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from raygpt import device as devices
from raygpt.errors import UserError
from raygpt.storage import Folder
from raygpt.train import compiled
from raygpt.train.compiled import CompiledLayers

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_token", lambda: b"secret")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "anything")  # put back at the end


class Machine:
    """A home of its own on the way to the same run."""

    def __init__(self, run: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        self.said: list[str] = []
        self.layers = CompiledLayers(Folder.from_path(str(run)), CPU, self.said.append)
        self.layers.fetch()
        self.cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    def files(self) -> dict[str, bytes]:
        return {
            str(p.relative_to(self.cache)): p.read_bytes()
            for p in self.cache.rglob("*")
            if p.is_file()
        }


def test_files_come_back_as_they_were(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    one = Machine(run, tmp_path / "one", monkeypatch)
    assert one.files() == {}
    (one.cache / "ab").mkdir()
    (one.cache / "ab" / "kernel.so").write_bytes(b"code")
    one.layers.keep()
    two = Machine(run, tmp_path / "two", monkeypatch)
    assert two.files() == {"ab/kernel.so": b"code"}
    (stored,) = (run / "compiled").iterdir()
    before = stored.stat().st_mtime_ns
    two.layers.keep()
    assert stored.stat().st_mtime_ns == before, "there was nothing new"
    (two.cache / "more").write_bytes(b"code")
    two.layers.keep()
    assert len(Machine(run, tmp_path / "three", monkeypatch).files()) == 2
    assert Machine(run, tmp_path / "two", monkeypatch).files() == two.files(), "what is there stays"
    assert not one.said and not two.said


@pytest.mark.parametrize("what", ["other token", "changed", "cut short", "moved"])
def test_what_is_not_signed_with_the_token_is_ignored_and_said(
    token: None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    one = Machine(run, tmp_path / "one", monkeypatch)
    (one.cache / "kernel.so").write_bytes(b"code")
    one.layers.keep()
    (stored,) = (run / "compiled").iterdir()
    if what == "other token":
        monkeypatch.setattr(compiled, "_token", lambda: b"another")
    elif what == "changed":
        stored.write_bytes(stored.read_bytes().replace(b"code", b"evil"))
    elif what == "cut short":
        stored.write_bytes(stored.read_bytes()[:20])
    else:  # compiled for another kind of machine
        monkeypatch.setattr(devices, "describe", lambda device: "another kind")
        stored.rename(
            stored.with_name(f"another-kind-torch-{torch.__version__}.tar".replace("+", "-"))
        )
    two = Machine(run, tmp_path / "two", monkeypatch)
    assert two.files() == {}
    assert len(two.said) == 1 and "token" in two.said[0] and "ignored" in two.said[0]


def test_without_a_token_nothing_leaves_the_machine(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_token", lambda: b"")
    one = Machine(tmp_path / "run", tmp_path / "one", monkeypatch)
    (one.cache / "kernel.so").write_bytes(b"code")
    one.layers.keep()
    assert not (tmp_path / "run").exists()
    again = Machine(tmp_path / "run", tmp_path / "one", monkeypatch)
    assert again.files() == {"kernel.so": b"code"}
    assert len(one.said) == 1 and "no token" in one.said[0]


def test_what_is_being_compiled_stops_nothing(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch writes each file under another name first, and others may do so meanwhile."""
    run = tmp_path / "run"
    one = Machine(run, tmp_path / "one", monkeypatch)
    for name in ("kernel.so", "gone.so", ".1.2.tmp"):
        (one.cache / name).write_bytes(b"code")
    add = tarfile.TarFile.add

    def late(archive: tarfile.TarFile, path: Path, *rest: Any) -> None:
        (one.cache / "gone.so").unlink(missing_ok=True)
        add(archive, path, *rest)

    monkeypatch.setattr(tarfile.TarFile, "add", late)
    one.layers.keep()
    assert Machine(run, tmp_path / "two", monkeypatch).files() == {"kernel.so": b"code"}
    assert not one.said


def test_storage_that_refuses_is_said_and_stops_nothing(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "compiled").write_bytes(b"a file in the way")
    one = Machine(tmp_path / "run", tmp_path / "one", monkeypatch)
    (one.cache / "kernel.so").write_bytes(b"code")
    one.layers.keep()
    assert any("compiled" in text for text in one.said)


def test_a_machine_without_room_for_caches_compiles_into_torchs_own_folder(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    one = Machine(tmp_path / "run", tmp_path / "file", monkeypatch)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "anything", "as it was"
    assert len(one.said) == 1 and str(tmp_path / "file") in one.said[0]
    one.layers.keep()
    assert not (tmp_path / "run").exists()


def test_no_compiler_is_told_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; from raygpt.device import check_compilers\n"
         "check_compilers(torch.device('cpu'), compile=True)"],
        env={**os.environ, "CXX": "/no/compiler", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert f"{UserError.__name__}: train.compile needs a C++ compiler" in done.stderr
