"""Storage that refuses, or a process that dies, at the n-th thing that is done to files."""

import builtins
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pyarrow import fs as pafs

from raygpt import storage
from raygpt.storage import Folder, StorageError


class Died(BaseException):
    """The process is gone; what it would have done afterwards, it does not do."""


class Faults:
    """Counts operations; the one numbered ``at`` fails, once, or is the last that is begun.

    Args:
        dies: the process ends there.
    """

    def __init__(self, at: int, dies: bool) -> None:
        self._at, self._dies = at, dies
        self.count, self.failed = 0, ""
        self.dead = False

    def hit(self, operation: str) -> None:
        """Before an operation, and after those that others can see."""
        if self.dead:
            raise Died
        self.count += 1
        if self.count == self._at:
            self.failed, self.dead = operation, self._dies
            raise Died if self._dies else OSError(errno.EIO, "Input/output error")


class _Os:
    """The module ``os`` with operations that fail."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        found = getattr(os, name)
        if name not in ("makedirs", "fsync", "replace", "open", "unlink"):
            return found

        def operation(*arguments: Any, **more: Any) -> Any:
            if name != "unlink" or self._faults.dead:  # which cleans up after a failure
                self._faults.hit(name)
            return found(*arguments, **more)

        return operation


class _File:
    """A local file that takes half of the data before it refuses the rest."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        half = len(data) // 2
        self._faults.hit("write")
        self._file.write(data[:half])
        self._file.flush()
        self._faults.hit("write of the second half")
        self._file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def make_local_faulty(patch: pytest.MonkeyPatch, faults: Faults) -> None:
    """Faults in everything that :mod:`raygpt.storage` does to local files."""

    def open_file(path: str, mode: str) -> _File:
        faults.hit("open")
        return _File(builtins.open(path, mode), faults)

    def first(method: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **more: Any) -> Any:
            try:
                faults.hit(method.__name__)
            except OSError as error:
                raise StorageError(str(error)) from error
            return method(*arguments, **more)

        return failing

    def delete(folder: Folder) -> None:  # file by file
        if Path(folder.path).exists():
            for path in sorted(Path(folder.path).iterdir()):
                first(os.unlink)(path)
            first(shutil.rmtree)(folder.path)

    patch.setattr(storage, "os", _Os(faults))
    patch.setattr(storage, "open", open_file, raising=False)
    patch.setattr(Folder, "delete", delete)
    for name in ("read_bytes", "delete_file", "_select", "_info"):
        patch.setattr(Folder, name, first(getattr(Folder, name)))


class _Upload:
    """A file of a store: there in its whole length once it is closed, or not at all."""

    closed = False

    def __init__(self, file: MemoryFile, faults: Faults) -> None:
        self._file, self._faults = file, faults
        self._broken = False

    def write(self, data: Any) -> int:
        self._broken = True
        self._faults.hit("write")
        self._broken = False
        return int(self._file.write(data))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._faults.hit("close")
        if self._broken:
            raise OSError(errno.EIO, "the upload was broken off")
        self._file.commit()
        self._faults.hit("answer to close")


class _Store(MemoryFileSystem):
    """An object store in memory."""

    cachable = False

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults
        # Not the one that all memory file systems of the process share.
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        self._faults.hit(f"open {mode}")
        if mode == "rb":
            return super()._open(path, mode)
        return _Upload(MemoryFile(self, self._strip_protocol(path)), self._faults)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._open(path, mode)

    def mkdir(self, path: str, create_parents: bool = True, **more: Any) -> None:
        """Folders are what names of files say."""

    def info(self, path: str, **more: Any) -> Any:
        self._faults.hit("info")
        return super().info(path, **more)

    def find(self, path: str, *arguments: Any, **more: Any) -> Any:
        self._faults.hit("find")
        return super().find(path, *arguments, **more)

    def rm_file(self, path: str) -> None:
        self._faults.hit("delete")
        super().rm_file(path)
        self._faults.hit("answer to delete")


class Place:
    """Where runs are kept, with faults or without; local or a store."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        self._folder = folder
        self._store = _Store(Faults(0, dies=False))

    def uri(self, name: str) -> str:
        return f"faulty://bucket/{name}" if self.kind == "store" else str(self._folder / name)

    def use(self, patch: pytest.MonkeyPatch, faults: Faults) -> None:
        """From now on; with ``patch`` undone, without faults."""
        if self.kind == "local":
            make_local_faulty(patch, faults)
        else:
            self._store._faults = faults

    def heal(self) -> None:
        self._store._faults = Faults(0, dies=False)

    def mount(self, patch: pytest.MonkeyPatch) -> None:
        """Make the store known, where there is one."""
        if self.kind == "store":
            found = pafs.PyFileSystem(pafs.FSSpecHandler(self._store)), "/bucket"
            patch.setattr(storage, "_filesystem", lambda root: found)

    def damage(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file behind everyone's back."""
        folder, _, file = self.uri(name).rpartition("/")
        place = Folder.from_path(folder)
        place.write_bytes(file, change(place.read_bytes(file)))
