"""Finished checkpoints in a run's folder: whole or absent, found, verified, pruned.

``<run>/checkpoint_<step>/`` holds ``model.safetensors``, ``optimizer.safetensors`` (several of
each where they are large, see ``parts.py``) and ``checkpoint.json``, which is written last and
deleted first: it names the others with their sizes and sha256.  A checkpoint of step k is the
state before step k: k steps are done.

Sizes are compared when a checkpoint is opened, hashes when its files are read, so that a large
one is read once.  Nothing here needs torch: a driver knows where a run stands before it has that.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raygpt import __version__
from raygpt.errors import UserError
from raygpt.storage import Folder, StorageError

WEIGHTS, OPTIMIZER = "model", "optimizer"
"""The kinds of files."""
METADATA = "checkpoint.json"
FORMAT_VERSION = 1
PREFIX = "checkpoint_"
KEEP_LATEST = 2
PASSED_OVER = "using the checkpoint before it"
_FILE_NAME = re.compile(rf"({WEIGHTS}|{OPTIMIZER})(?:-[0-9]{{5}}-of-([0-9]{{5}}))?\.safetensors")

FileEntry = dict[str, Any]
"""``size`` in bytes and ``sha256`` of a file."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is not whole; the message names the file."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, and all that its decisions depend on."""

    step: int = 0
    """Steps done; the next step's number."""
    tokens: int = 0
    """Targets seen."""
    skipped: int = 0
    """Steps whose loss or norm was not finite."""
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    """Validation loss of exactly these weights, if measured."""
    best_val_loss: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its folder, position and metadata."""

    folder: Folder
    position: Position
    metadata: dict[str, Any]

    @property
    def weights_sha256(self) -> str:
        """The same for the same weights: the sha256 of their file; of several files, the sha256
        of their digests in order."""
        digests = [bytes.fromhex(e["sha256"]) for _, e in self.files_of(WEIGHTS)]
        return digests[0].hex() if len(digests) == 1 else _sha256(b"".join(digests))

    def files_of(self, kind: str) -> list[tuple[str, FileEntry]]:
        """Files of kind :data:`WEIGHTS` or :data:`OPTIMIZER` in order: names with their sizes and
        hashes."""
        files: dict[str, FileEntry] = self.metadata["files"]
        return sorted((n, e) for n, e in files.items() if n.startswith(kind))


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def is_whole_set(files: Iterable[str]) -> bool:
    """Whether these are the names of all files of a state, and no others."""
    counts: dict[str, int] = {}
    for name in files:
        match = _FILE_NAME.fullmatch(name)
        if match is None:
            return False
        counts[match[1]] = int(match[2] or 1)
    names = [
        name for kind in (WEIGHTS, OPTIMIZER) for name in file_names(kind, counts.get(kind, 0))
    ]
    return len(counts) == 2 and set(names) == set(files)


def file_names(kind: str, count: int) -> list[str]:
    """The names of so many files of a kind, in order."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_file(folder: Folder, name: str, data: memoryview) -> FileEntry:
    """Write one file of a checkpoint; its entry for :func:`commit`. Raises StorageError."""
    folder.write_bytes(name, data)
    return {"size": len(data), "sha256": _sha256(data)}


def commit(
    folder: Folder, position: Position, files: dict[str, FileEntry], metadata: dict[str, Any]
) -> Checkpoint:
    """Make a checkpoint count, once all of its files are stored.

    Raises:
        StorageError: a file is not there in its whole length, or the storage refuses.
    """
    stored = dict(folder.walk(recursive=False))
    for name, entry in files.items():
        if stored.get(name) != entry["size"]:
            raise StorageError(f"{folder.child(name)} was cut short while it was written")
    content = {
        "format": FORMAT_VERSION,
        "raygpt": __version__,
        "position": asdict(position),
        "files": dict(sorted(files.items())),
        **metadata,
    }
    signed = {**content, "sha256": _content_sha256(content)}
    folder.write_bytes(METADATA, json.dumps(signed, indent=1).encode())
    return Checkpoint(folder, position, content)


def _content_sha256(content: dict[str, Any]) -> str:
    """Of a checkpoint's metadata, as JSON without spaces and with sorted keys."""
    return _sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def steps_of(run: Folder) -> list[int]:
    """The steps that have a checkpoint folder, finished or not, in order."""
    tails = [name.removeprefix(PREFIX) for name in run.list() if name.startswith(PREFIX)]
    return sorted(int(tail) for tail in tails if tail.isdigit())


def open_checkpoint(folder: Folder) -> Checkpoint:
    """Read a checkpoint's metadata and look whether its files are there in their whole length.

    Raises:
        DamagedCheckpoint: the metadata is damaged, or a file is missing or cut; names it.
        FileNotFoundError: there is no metadata: it was never finished.
    """
    data = folder.read_bytes(METADATA)
    where = folder.child(METADATA)
    try:
        metadata = json.loads(data)
        if metadata.pop("sha256") != _content_sha256(metadata):
            raise ValueError("its sha256 does not match")
        if metadata["format"] != FORMAT_VERSION:
            raise UserError(
                f"{where} has format {metadata['format']}; this raygpt reads {FORMAT_VERSION}"
            )
        position = Position(**metadata["position"])
        entries: dict[str, FileEntry] = metadata["files"]
        if not is_whole_set(list(entries)):
            raise ValueError(f"its files are {', '.join(entries) or 'none'}")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{where} is damaged: {type(error).__name__}: {error}") from error
    stored = dict(folder.walk(recursive=False))
    for name, entry in entries.items():
        _check_size(folder, name, entry, stored.get(name))
    return Checkpoint(folder, position, metadata)


def _check_size(folder: Folder, name: str, entry: FileEntry, size: int | None) -> None:
    if size is None:
        raise DamagedCheckpoint(f"{folder.child(name)} is missing")
    if size != entry["size"]:
        raise DamagedCheckpoint(
            f"{folder.child(name)} is damaged: {size} bytes instead of {entry['size']}"
        )


def read_file(folder: Folder, name: str, entry: FileEntry) -> bytes:
    """A file of a checkpoint, every byte verified.

    Raises:
        DamagedCheckpoint: it is missing, cut or changed; names it.
        StorageError: the storage refuses.
    """
    size: int | None = None
    data = b""
    with contextlib.suppress(FileNotFoundError):
        data = folder.read_bytes(name)
        size = len(data)
    _check_size(folder, name, entry, size)
    if _sha256(data) != entry["sha256"]:
        raise DamagedCheckpoint(f"{folder.child(name)} is damaged: its sha256 does not match")
    return data


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def finished_checkpoints(
    run: Folder, say: Callable[[str], None], damaged: Container[int] = ()
) -> Iterator[Checkpoint]:
    """The finished checkpoints of a run, newest first; what is not whole is said and passed over.

    Args:
        damaged: steps whose checkpoints are known to be, and passed over without a word.
    """
    for step in reversed(steps_of(run)):
        folder = run.child(checkpoint_name(step))
        if step in damaged:
            continue
        try:
            yield open_checkpoint(folder)
        except FileNotFoundError:
            say(f"{folder} was never finished; {PASSED_OVER}")
        except DamagedCheckpoint as error:
            say(f"{error}; {PASSED_OVER}")


def latest(
    run: Folder, say: Callable[[str], None] = lambda _: None, damaged: Container[int] = ()
) -> Checkpoint | None:
    """The newest checkpoint of a run that may be used; None if there is no finished one.

    Args:
        damaged: as for :func:`finished_checkpoints`.

    Raises:
        UserError: there are finished checkpoints, but every one is damaged.
    """
    found = next(finished_checkpoints(run, say, damaged), None)
    if found is None:
        finished = [s for s in steps_of(run) if run.child(checkpoint_name(s)).exists(METADATA)]
        if finished:
            names = ", ".join(checkpoint_name(step) for step in finished)
            raise UserError(
                f"every checkpoint of {run} is damaged ({names}); restore one, or delete them to "
                "start from step 0"
            )
    return found


def is_finished(run: Folder, step: int) -> bool:
    """Whether the checkpoint of a step has its metadata, which is written last."""
    return run.child(checkpoint_name(step)).exists(METADATA)


def is_newer(run: Folder, step: int) -> bool:
    """Whether a checkpoint of a later step is finished."""
    return any(found > step and is_finished(run, found) for found in steps_of(run))


def prune(run: Folder, newest: Checkpoint) -> None:
    """Delete all checkpoints but the latest two and the best one; metadata goes first."""
    finished = [
        step
        for step in steps_of(run)
        if step <= newest.position.step and run.child(checkpoint_name(step)).exists(METADATA)
    ]
    measured = [p for p in (_position(run, step) for step in finished) if p.val_loss is not None]
    best = min(measured, key=lambda p: (p.val_loss, -p.step), default=newest.position)
    keep = {*finished[-KEEP_LATEST:], best.step}
    for step in steps_of(run):
        if step < newest.position.step and step not in keep:
            folder = run.child(checkpoint_name(step))
            folder.delete_file(METADATA)
            folder.delete()


def _position(run: Folder, step: int) -> Position:
    try:
        content = json.loads(run.child(checkpoint_name(step)).read_bytes(METADATA))
        return Position(**content["position"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return Position(step)  # damaged: neither best nor in the way
