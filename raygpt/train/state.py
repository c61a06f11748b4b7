"""Checkpoints: everything a run needs to go on, without code in it, whole or absent.

``<run>/checkpoint_<step>/`` holds ``model.safetensors``, ``optimizer.safetensors`` (several of
each where they are large, see ``parts.py``) and ``checkpoint.json``, which is written last and
deleted first: it names the others with their sizes and sha256.  A checkpoint of step k is the
state before step k: k steps are done.

Sizes are compared when a checkpoint is opened, hashes when its tensors are read, so that a large
one is read once.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from raygpt import __version__
from raygpt.config import Config, from_dict
from raygpt.errors import UserError
from raygpt.model import GPT
from raygpt.storage import Folder, StorageError
from raygpt.train.parts import OPTIMIZER, WEIGHTS, Snapshots, cut_into_parts, is_whole_set

METADATA = "checkpoint.json"
FORMAT_VERSION = 1
PREFIX = "checkpoint_"
KEEP_LATEST = 2
PASSED_OVER = "using the checkpoint before it"
READ_THREADS = 4
"""Files that are read and hashed at the same time, each of 128 MiB or of one tensor."""


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
        digests = [bytes.fromhex(e["sha256"]) for _, e in self._files(WEIGHTS)]
        return digests[0].hex() if len(digests) == 1 else _sha256(b"".join(digests))

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All tensors of kind :data:`WEIGHTS` or :data:`OPTIMIZER`, on the CPU; every byte of
        their files is verified.

        Raises:
            DamagedCheckpoint: a file is missing, cut or changed; names it.
            StorageError: the storage refuses.
        """

        def read(file: tuple[str, FileEntry]) -> dict[str, Tensor]:
            name, entry = file
            try:
                return safetensors.torch.load(_read_file(self.folder, name, entry))
            except safetensors.SafetensorError as error:
                raise DamagedCheckpoint(f"{self.folder.child(name)} is damaged: {error}") from error

        with ThreadPoolExecutor(READ_THREADS, "read") as threads:
            parts = list(threads.map(read, self._files(kind)))
        return {name: tensor for part in parts for name, tensor in part.items()}

    def verify(self) -> None:
        """Read every byte. Raises as :meth:`tensors` does."""
        for kind in (WEIGHTS, OPTIMIZER):
            self.tensors(kind)

    def _files(self, kind: str) -> list[tuple[str, FileEntry]]:
        """Files of a kind in order: names with their sizes and hashes."""
        files: dict[str, FileEntry] = self.metadata["files"]
        return sorted((n, e) for n, e in files.items() if n.startswith(kind))


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def save(
    run: Folder,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> Checkpoint:
    """Write ``checkpoint_<step>`` of a run in place, replacing an unfinished or damaged one.

    Equal replicas may do so at the same time, since they write the same bytes.

    Args:
        metadata: JSON values to keep beside the position: the settings, the corpus.

    Raises:
        StorageError: the storage refuses a write.
    """
    folder = run.child(checkpoint_name(position.step))
    snapshots = Snapshots(pinned=False)
    files = {
        part.file: write_file(folder, part.file, snapshots.take(part))
        for part in cut_into_parts(model, optimizer)
    }
    return commit(folder, position, files, metadata)


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


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state in place.

    Raises:
        UserError: the tensors are not those of this model.
    """
    parameters = dict(model.named_parameters())
    _copy_weights(checkpoint, parameters)
    number = {
        id(p): i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    states: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in checkpoint.tensors(OPTIMIZER).items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise UserError(f"the optimizer in {checkpoint.folder} has a state of {name!r}, "
                            "which the model has not; start a run of another name")  # fmt: skip
        states.setdefault(number[id(parameters[name])], {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _copy_weights(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter]) -> None:
    tensors = checkpoint.tensors(WEIGHTS)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != wanted:
        odd = sorted(set(shapes.items()) ^ set(wanted.items()))[0][0]
        raise UserError(
            f"the weights in {checkpoint.folder} do not fit the model: {odd} has shape "
            f"{shapes.get(odd)} there and {wanted.get(odd)} here"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


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


def _read_file(folder: Folder, name: str, entry: FileEntry) -> bytes:
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


@dataclass(frozen=True)
class LoadedModel:
    """A model that was read from a checkpoint: on the CPU, fp32, in eval mode."""

    model: GPT
    tokenizer_name: str
    step: int
    path: str
    config: Config


def load_model(path: str, say: Callable[[str], None] = lambda _: None) -> LoadedModel:
    """The model of a checkpoint folder, or of a run's folder (its best, else its latest).

    Raises:
        UserError: there is no checkpoint, or none that is whole.
    """
    folder = Folder.from_path(path)
    if folder.exists(METADATA):
        return _load_model(open_checkpoint(folder))
    for checkpoint in sorted(finished_checkpoints(folder, say), key=_worth):
        try:
            return _load_model(checkpoint)
        except DamagedCheckpoint as error:
            say(f"{error}; using the next best checkpoint")
    raise UserError(f"no checkpoint in {folder}; give the folder of a run or of a checkpoint_*")


def _worth(checkpoint: Checkpoint) -> tuple[bool, float, int]:
    """Sorts the best first, and those that were never measured last, the newest of them first."""
    position = checkpoint.position
    return position.val_loss is None, position.val_loss or 0.0, -position.step


def _load_model(checkpoint: Checkpoint) -> LoadedModel:
    metadata = checkpoint.metadata
    try:
        config = from_dict(metadata["settings"])
        tokenizer, n_vocab = metadata["corpus"]["tokenizer"], metadata["corpus"]["n_vocab"]
    except KeyError as error:
        raise DamagedCheckpoint(f"{checkpoint.folder.child(METADATA)} lacks {error}") from error
    model = GPT(config.model, n_vocab)
    _copy_weights(checkpoint, dict(model.named_parameters()))
    return LoadedModel(
        model.eval(), tokenizer, checkpoint.position.step, checkpoint.folder.uri, config
    )
