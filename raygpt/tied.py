"""One matrix for the token embedding and the output head, with one gradient for both uses.

Alone, torch makes a second gradient of the matrix's size for the embedding, nearly all of it zeros,
and adds it to the head's.  Over a large vocabulary that is a good part of a worker's memory, and
several passes over it.  Here the embedding's gradient is that of the rows that were looked up, and
they are added to the head's in place.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def two_uses(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix for a look-up of its rows, whose gradient must be sparse, and as a whole."""
    uses: tuple[Tensor, Tensor] = _Tied.apply(weight)
    return uses


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(_: Any, rows: Tensor, whole: Tensor) -> Tensor:
        tokens, gradients = rows._indices()[0], rows._values()
        if whole.is_cuda:  # where index_add_ has no fixed order, and unique waits for the device
            add_up = torch.ops.aten.embedding_dense_backward
            return whole.add_(add_up(gradients, tokens, len(whole), -1, False))
        # What belongs to one token is added up first, in its order, as torch's own gradient has it;
        # not by coalesce(), whose order depends on the processor.
        tokens, place = tokens.unique(return_inverse=True)
        sums = gradients.new_zeros(len(tokens), gradients.shape[1])
        return whole.index_add_(0, tokens, sums.index_add_(0, place, gradients))
