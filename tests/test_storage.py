"""Files in folders: local ones, and pyarrow's in-memory store as the object store."""

import os
import resource
import uuid
from pathlib import Path

import pytest
from ray import cloudpickle

from raygpt.errors import UserError
from raygpt.storage import Folder, check_name


@pytest.fixture(params=["local", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return Folder.from_path(str(tmp_path / "folder"))
    return Folder.from_path(f"mock:///bucket/{uuid.uuid4().hex}")


def test_write_read_list_delete(folder: Folder) -> None:
    assert (folder.exists(), folder.list(), folder.walk()) == (False, [], [])
    folder.write_bytes("b.bin", b"first")
    folder.write_bytes("b.bin", b"second!")
    folder.write_bytes("deep/er/a.txt", b"")
    assert folder.read_bytes("b.bin") == b"second!"
    assert folder.child("deep").read_bytes("er/a.txt") == b""
    assert folder.list() == ["b.bin", "deep"]
    assert folder.walk() == [("b.bin", 7), ("deep/er/a.txt", 0)]
    assert folder.walk(recursive=False) == [("b.bin", 7)]
    assert (folder.size("b.bin"), folder.exists("b.bin"), folder.exists("c")) == (7, True, False)
    folder.delete_file("b.bin")
    folder.delete_file("b.bin")
    assert folder.list() == ["deep"]
    folder.delete()
    folder.delete()
    assert not folder.exists()


def test_streams(folder: Folder) -> None:
    with folder.open_output("new/stream") as out:
        out.write(b"abc")
        out.write(b"def")
    with folder.open_input("new/stream") as file:
        file.seek(4)
        assert file.read() == b"ef"
    with folder.open_stream("new/stream", None) as file:
        assert file.read(2) + file.read() == b"abcdef"


def test_missing_files_are_told_apart_from_faults(folder: Folder) -> None:
    folder.write_bytes("here", b"x")
    for read in (folder.read_bytes, folder.open_input, folder.size):
        with pytest.raises(FileNotFoundError):
            read("not-here")


def test_pickles_and_comes_back_from_its_uri(folder: Folder) -> None:
    folder.write_bytes("x", b"1")
    copy = cloudpickle.loads(cloudpickle.dumps(folder))
    assert copy == folder == Folder.from_path(folder.uri) == Folder.from_path(str(folder))
    assert copy.read_bytes("x") == b"1"
    assert len(cloudpickle.dumps(folder)) < 500


def test_check_writable_leaves_nothing(folder: Folder) -> None:
    folder.check_writable()
    assert folder.exists() and folder.walk() == []


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../b", "../x", "a\\b", "a//b", ".", "a/", "x\0y"]
)
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a name inside a folder"):
        check_name(name)
    with pytest.raises(UserError, match="is not a name inside a folder"):
        Folder.from_path(str(tmp_path)).write_bytes(name, b"")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Folder.from_path("runs/../runs/a")
    assert here.uri == str(tmp_path / "runs" / "a")
    assert here == Folder.from_path((tmp_path / "runs" / "a").as_uri())
    assert Folder.from_path("file:///a%20b").uri == "/a b"
    cloud = Folder.from_path("s3://bucket/runs/one/?region=eu-west-1")
    assert cloud.uri == "s3://bucket/runs/one?region=eu-west-1"
    assert cloud.child("x/y").uri == "s3://bucket/runs/one/x/y?region=eu-west-1"
    assert Folder.from_path("gs://bucket").child("x").uri == "gs://bucket/x"
    assert cloud.split() == (Folder.from_path("s3://bucket/runs?region=eu-west-1"), "one")


def test_bad_places() -> None:
    with pytest.raises(UserError, match=r"^an empty path"):
        Folder.from_path("")
    with pytest.raises(UserError, match=r"^cannot use ftp://host: "):
        Folder.from_path("ftp://host/x").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = Folder.from_path(str(tmp_path / "file" / "runs"))
    with pytest.raises(UserError) as error:
        folder.check_writable()
    assert str(error.value) == (
        f"cannot write to {tmp_path}/file/runs: Not a directory; choose another folder"
    )


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    folder = Folder.from_path(str(tmp_path))
    folder.write_bytes("file", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"^cannot write {tmp_path}/file: File too large$"):
            folder.write_bytes("file", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.read_bytes("file") == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_crash_left_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / f".model.bin.{uuid.uuid4().hex}.tmp").write_bytes(b"half")
    (tmp_path / ".hidden").write_bytes(b"")
    folder = Folder.from_path(str(tmp_path))
    assert folder.list() == [".hidden"]
    assert folder.walk() == [(".hidden", 0)]
