"""Losses of a chunk of logits and their gradient, on a GPU: the logits are read, and overwritten.

torch's own operators go over them several times, since what they keep in bf16 is too coarse for a
loss.  Here a program takes a row, first for its largest logit and the sum of the exponentials
together (Milakov & Gimelshein 2018, algorithm 3), then for the gradient, while the row is still in
the GPU's cache.  Sizes of blocks are fixed, not found by measuring, so the same logits give the
same bits.

What it gives up: anything but NVIDIA's GPUs from Ampere on, for which Triton is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _row(logits, right, losses, n_vocab, n_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_columns
    token = tl.load(right + row)
    chosen = tl.load(logits + token).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for first in range(0, n_vocab, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < n_vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher))
        top = higher
    of_all = top + tl.log(total)
    tl.store(losses + row, of_all - chosen)
    for first in range(0, n_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < n_vocab, other=float("-inf")).to(tl.float32)
        error = tl.exp(x - of_all) - (column == token).to(tl.float32)
        tl.store(logits + column, error.to(logits.dtype.element_ty), mask=column < n_columns)


def to_errors(logits: Tensor, right: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """As :func:`raygpt.loss.to_errors`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _row[(len(logits),)](
        logits, right, losses, n_vocab, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
    )
    return losses, logits
