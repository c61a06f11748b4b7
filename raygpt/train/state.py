"""The state of a run in tensors: saved into a checkpoint and put back, without code in it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from raygpt.config import Config
from raygpt.errors import UserError
from raygpt.model import GPT
from raygpt.storage import Folder
from raygpt.train.checkpoints import (
    METADATA,
    OPTIMIZER,
    WEIGHTS,
    Checkpoint,
    DamagedCheckpoint,
    FileEntry,
    Position,
    checkpoint_name,
    commit,
    finished_checkpoints,
    open_checkpoint,
    read_file,
    write_file,
)
from raygpt.train.parts import Snapshots, cut_into_parts
from raygpt.values import from_dict

READ_THREADS = 4
"""Files that are read and hashed at the same time, each of 128 MiB or of one tensor."""


def read_tensors(checkpoint: Checkpoint, kind: str) -> dict[str, Tensor]:
    """All tensors of kind :data:`WEIGHTS` or :data:`OPTIMIZER`, on the CPU; every byte of
    their files is verified.

    Raises:
        DamagedCheckpoint: a file is missing, cut or changed; names it.
        StorageError: the storage refuses.
    """

    def read(file: tuple[str, FileEntry]) -> dict[str, Tensor]:
        name, entry = file
        try:
            return safetensors.torch.load(read_file(checkpoint.folder, name, entry))
        except safetensors.SafetensorError as error:
            raise DamagedCheckpoint(
                f"{checkpoint.folder.child(name)} is damaged: {error}"
            ) from error

    with ThreadPoolExecutor(READ_THREADS, "read") as threads:
        parts = list(threads.map(read, checkpoint.files_of(kind)))
    return {name: tensor for part in parts for name, tensor in part.items()}


def verify(checkpoint: Checkpoint) -> None:
    """Read every byte. Raises as :func:`read_tensors` does."""
    for kind in (WEIGHTS, OPTIMIZER):
        read_tensors(checkpoint, kind)


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
    for full_name, tensor in read_tensors(checkpoint, OPTIMIZER).items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise UserError(f"the optimizer in {checkpoint.folder} has a state of {name!r}, "
                            "which the model has not; start a run of another name")  # fmt: skip
        states.setdefault(number[id(parameters[name])], {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _copy_weights(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter]) -> None:
    tensors = read_tensors(checkpoint, WEIGHTS)
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
