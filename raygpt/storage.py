"""Files in a folder, local or in the cloud: the one place that opens, writes and lists them.

A :class:`Folder` is two strings, so it pickles small and opens nothing until it
is used.  Local paths become absolute; ``s3://``, ``gs://`` and whatever else
``pyarrow.fs.FileSystem.from_uri`` knows are object stores.  What it gives up:
locks, appends, renames and partial writes, which object stores do not have.
A storage that refuses raises :class:`StorageError`; :func:`patiently` tries again for a while.
Names inside a folder are relative, with ``/`` between parts, and cannot leave it.
"""

import contextlib
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raygpt.errors import UserError

_URI = re.compile(r"(?P<root>[A-Za-z][A-Za-z0-9+.-]*://[^/?]*)(?P<path>[^?]*)(?P<query>\?.*)?")
_FLAT_STORES = ("s3", "gcs")
"""Stores without folders: nothing has to be created before a file is written."""
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")
"""Name of a local file that is being written; what a crash leaves is never listed."""

# Named here because inside the class, `list` is a method.
Names = list[str]
Sizes = list[tuple[str, int]]
Infos = list[pafs.FileInfo]

_Result = TypeVar("_Result")
LONGEST_PAUSE = 8.0
"""Seconds between two tries of :func:`patiently`; the first pauses are shorter."""


class StorageError(UserError):
    """A file system or object store refused or failed; trying again may help."""


@dataclass(frozen=True)
class Folder:
    """A folder that may not exist yet; made with :meth:`from_path`."""

    root: str
    """``""`` for local folders, else scheme, bucket and query: ``s3://bucket?region=...``."""
    path: str
    """The absolute local path, or the path inside the bucket."""

    @classmethod
    def from_path(cls, path: str) -> "Folder":
        """The folder at a local path, ``file://`` path or cloud URI.

        Raises:
            UserError: the path is empty, or has a password in it.
        """
        if not path:
            raise UserError("an empty path was given; give a folder or a URI such as s3://bucket/x")
        match = _URI.fullmatch(path)
        if match is None:
            return cls("", os.path.abspath(os.path.expanduser(path)))
        scheme, _, place = match["root"].partition("://")
        who, at, place = place.rpartition("@")
        if at and ":" in who:  # it would go into logs and config.json; not even told here
            raise UserError(
                f"{scheme}://...@{place} has a password in it; leave it out, and give it by the "
                "machines' role or in the environment of every node (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY)"
            )
        if match["root"].lower() == "file://":
            return cls("", os.path.abspath(unquote(match["path"])))
        inside = posixpath.normpath(match["path"].lstrip("/"))
        return cls(match["root"] + (match["query"] or ""), "" if inside == "." else inside)

    @property
    def uri(self) -> str:
        """The path or URI; :meth:`from_path` turns it back into this folder."""
        root, mark, query = self.root.partition("?")
        return f"{root}/{self.path}{mark}{query}" if root else self.path

    def __str__(self) -> str:
        return self.uri

    def child(self, name: str) -> "Folder":
        """The folder ``name`` inside this one.

        Raises:
            UserError: ``name`` is not a plain relative name (see :func:`check_name`).
        """
        return Folder(self.root, posixpath.join(self.path, check_name(name)))

    def split(self) -> tuple["Folder", str]:
        """The parent folder and this one's name in it."""
        parent, name = posixpath.split(self.path)
        return Folder(self.root, parent), name

    def exists(self, name: str | None = None) -> bool:
        """Whether the file or folder ``name`` is there; without a name, this folder itself."""
        return self._info(name).type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether a file, not a folder, lies at this path."""
        return self._info(None).type == pafs.FileType.File

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be asked for.
        """
        info = self._info(name)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"no file {self.child(name)}")
        return info.size

    def list(self) -> Names:
        """Sorted names of the files and folders directly inside; empty if there is no folder."""
        return sorted(
            info.base_name
            for info in self._select(recursive=False)
            if not _TEMPORARY.fullmatch(info.base_name)
        )

    def walk(self, recursive: bool = True) -> Sizes:
        """Sorted (name, bytes) of all files in here and, if ``recursive``, in folders below."""
        here = self._full_path()
        return sorted(
            (info.path.removeprefix(here).lstrip("/"), info.size)
            for info in self._select(recursive)
            if info.type == pafs.FileType.File and not _TEMPORARY.fullmatch(info.base_name)
        )

    def read_bytes(self, name: str) -> bytes:
        """The whole content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read.
        """
        with explained("read", self.child(name)), self.open_input(name) as file:
            return file.read()

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        """Write a file whole or not at all, and durably; replaces what was there.

        Raises:
            UserError: it cannot be written (permission, space, a file in the way).
        """
        place = self.child(name)
        with explained("write", place, passing=()):
            if not self.root:
                _write_local(place.path, data)
                return
            with self.open_output(name) as stream:  # object stores show a file once it is closed
                stream.write(data)

    def open_input(self, name: str) -> pa.NativeFile:
        """A file for random access. Raises as :meth:`read_bytes` does."""
        place = self.child(name)
        with explained("read", place):
            return place._filesystem().open_input_file(place._full_path())

    def open_stream(self, name: str, compression: str | None) -> pa.NativeFile:
        """A file to be read front to back, decompressed. Raises as :meth:`read_bytes` does."""
        place = self.child(name)
        with explained("read", place):
            return place._filesystem().open_input_stream(
                place._full_path(), compression=compression, buffer_size=2**20
            )

    def open_output(self, name: str) -> pa.NativeFile:
        """A new file to be written front to back; not atomic, unlike :meth:`write_bytes`.

        Raises:
            UserError: it cannot be created.
        """
        place = self.child(name)
        with explained("write", place, passing=()):
            filesystem = place._filesystem()
            if filesystem.type_name not in _FLAT_STORES:
                filesystem.create_dir(posixpath.dirname(place._full_path()), recursive=True)
            return filesystem.open_output_stream(place._full_path(), compression=None)

    def delete_file(self, name: str) -> None:
        """Delete a file, if it is there. Raises UserError if that is not possible."""
        place = self.child(name)
        with explained("delete", place), contextlib.suppress(FileNotFoundError):
            place._filesystem().delete_file(place._full_path())

    def delete(self) -> None:
        """Delete the folder and all in it, if it is there; UserError if that is not possible."""
        with explained("delete", self), contextlib.suppress(FileNotFoundError):
            self._filesystem().delete_dir(self._full_path())

    def check_writable(self) -> None:
        """Write and delete a small file here, making the folder if need be.

        Raises:
            StorageError: that fails; names the folder and the reason.
        """
        probe = f".writable-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"raygpt")
        except UserError as error:
            reason = str(error).rpartition(": ")[2]
            raise StorageError(
                f"cannot write to {self}: {reason}; choose another folder"
            ) from error
        self.delete_file(probe)

    def _filesystem(self) -> pafs.FileSystem:
        return _filesystem(self.root)[0]

    def _full_path(self) -> str:
        base = _filesystem(self.root)[1]
        return posixpath.join(base, self.path) if self.path else base

    def _info(self, name: str | None) -> pafs.FileInfo:
        place = self if name is None else self.child(name)
        with explained("read", place):
            return place._filesystem().get_file_info(place._full_path())

    def _select(self, recursive: bool) -> Infos:
        selector = pafs.FileSelector(self._full_path(), recursive=recursive, allow_not_found=True)
        with explained("list", self):
            return self._filesystem().get_file_info(selector)


def write_output(path: str, data: bytes) -> str:
    """Write the file that somebody asked for; what was done, in words: it may replace another.

    Raises:
        UserError: it cannot be written.
    """
    folder, name = Folder.from_path(path).split()
    action = "replaced" if folder.exists(name) else "wrote"
    folder.write_bytes(name, data)
    return f"{action} {folder.child(name)}"


def check_name(name: str) -> str:
    """``name`` itself, if it is a relative name that stays inside its folder.

    Raises:
        UserError: it is empty or absolute, or has ``..``, an empty part or a backslash.
    """
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(
            f"{name!r} is not a name inside a folder: no '..', '\\', '//' or leading '/'"
        )
    return name


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    """The file system of ``Folder.root`` and the path of the bucket in it."""
    if not root:
        return pafs.LocalFileSystem(), ""
    try:
        return pafs.FileSystem.from_uri(root)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot use {root}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What went wrong in a few words, without the path that the message names anyway."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explained(
    action: str, place: Folder, passing: tuple[type[OSError], ...] = (FileNotFoundError,)
) -> Iterator[None]:
    """Turn file system errors, except ``passing``, into a :class:`StorageError`."""
    try:
        yield
    except passing:
        raise
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot {action} {place}: {reason_of(error)}") from error


def patiently(
    action: Callable[[], _Result], seconds: float, say: Callable[[str], None] = lambda _: None
) -> _Result:
    """What ``action`` returns, tried again with growing pauses while the storage refuses.

    Args:
        seconds: how long to go on; 0 tries once.
        say: told what is wrong, once.

    Raises:
        StorageError: it still refuses after so many seconds; says how long it was tried.
    """
    began, pause = time.monotonic(), 0.25
    while True:
        try:
            return action()
        except StorageError as error:
            tried = time.monotonic() - began
            if tried + pause > seconds:
                raise StorageError(f"{error} (tried for {tried:.0f} s)") from error
            if pause == 0.25:
                say(f"{error}; trying again for up to {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _write_local(path: str, data: bytes | memoryview) -> None:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)  # the new name must survive a power cut, too
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
