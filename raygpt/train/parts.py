"""How a state is cut into files, and copies of it that training cannot change any more.

Tensors go into files in the model's order, as many as fit into :data:`PART_BYTES`; the files
are the same, byte for byte, whatever the number of workers, so each worker can write some of
them.  They are safetensors files; only the header is laid out here, so that a copied tensor
lands where it lies in the file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raygpt.train.checkpoints import OPTIMIZER, WEIGHTS, file_names

PART_BYTES = 2**27
"""Tensors of a file, at most, unless one alone is larger; part of the format."""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint, and the living tensors that belong into it."""

    file: str
    tensors: dict[str, Tensor]


def cut_into_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Part]:
    """All files of a state: the weights first, tied ones once, then the optimizer's tensors."""
    parameters = dict(model.named_parameters())
    states = {
        f"{key}.{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        # By name: a state that was loaded has its tensors in any order, another in each process.
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    }
    return [*_cut(WEIGHTS, parameters), *_cut(OPTIMIZER, states)]


def share_of(parts: list[Part], rank: int, world_size: int) -> list[Part]:
    """The files that one of W workers writes: about the same bytes for each."""
    loads = [0] * world_size
    share = []
    for part in sorted(parts, key=lambda part: -_bytes(part.tensors.values())):
        owner = loads.index(min(loads))
        loads[owner] += _bytes(part.tensors.values())
        if owner == rank:
            share.append(part)
    return share


def _cut(kind: str, tensors: Mapping[str, Tensor]) -> list[Part]:
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if groups[-1] and _bytes([*groups[-1].values(), tensor]) > PART_BYTES:
            groups.append({})
        groups[-1][name] = tensor.detach()
    names = file_names(kind, len(groups))
    return [Part(name, group) for name, group in zip(names, groups, strict=True)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Snapshots:
    """Copies of parts as the files they will be; their places in memory are used again.

    Args:
        pinned: page-locked memory, into which a GPU copies fast.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[str, Tensor] = {}

    def take(self, part: Part, place: str = "") -> memoryview:
        """The file's bytes; valid until the next copy is taken to the same place.

        From a GPU the copy only begins here: synchronize its stream before reading.
        """
        # Large elements first, so that every tensor is aligned.
        names = sorted(part.tensors, key=lambda name: -part.tensors[name].element_size())
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in names:
            tensor = part.tensors[name]
            places[name] = end, end + tensor.numel() * tensor.element_size()
            end = places[name][1]
        entries = {
            name: {
                "dtype": _DTYPES[part.tensors[name].dtype],
                "shape": list(part.tensors[name].shape),
                "data_offsets": place,
            }
            for name, place in places.items()
        }
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        start = 8 + len(header)
        buffer = self._buffers.get(place)
        if buffer is None or len(buffer) < start + end:
            buffer = torch.empty(start + end, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers[place] = buffer
        buffer = buffer[: start + end]
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        view[:start] = len(header).to_bytes(8, "little") + header
        for name, (begin, stop) in places.items():
            tensor = part.tensors[name]
            copy = buffer[start + begin : start + stop].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=self._pinned)
        return view
