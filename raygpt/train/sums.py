"""Tensors along the tree of lanes (``tree.py``): slices of them, and their sum."""

import torch
from torch import Tensor

from raygpt.train.tree import Node, parent, sibling


def tree_sum(values: dict[Node, Tensor], total: int, into: Node | None = None) -> Tensor:
    """The sum at the root, added in place, level by level from the given complete cover.

    With ``into`` it ends up in that node's tensor: which of two summands is overwritten makes
    no difference to their sum.
    """
    values = dict(values)
    for level in range(total.bit_length() - 1):
        for node in sorted(node for node in values if node[0] == level):
            if node in values:
                target, other = sorted((node, sibling(node, total)))
                if other == into:
                    target, other = other, target
                if target == into:
                    into = parent(node, total)
                values[parent(node, total)] = values.pop(target).add_(values.pop(other))
    (root,) = values.values()
    return root


def slices_of(flat: Tensor, world_size: int) -> list[Tensor]:
    """A slice for each worker: n // W elements, and for the last one the rest, too."""
    size = len(flat) // world_size
    return list(flat.split([size] * (world_size - 1) + [len(flat) - (world_size - 1) * size]))


def flat(tensors: list[Tensor]) -> Tensor:
    """One tensor (n,) of all elements; a copy where there are several."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
