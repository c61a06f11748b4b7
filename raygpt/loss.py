"""The output head and its cross entropy in one: no full matrix of logits is ever in memory.

The logits of N tokens over V words are the largest thing of a small model.  They are made in
chunks, turned into probabilities, and these at once into gradients; the backward pass only scales
what is there (as in Hsu et al. 2024, "Liger Kernel", section 3.2).  Beside the three matrix
products and the softmax, a chunk in fp32 on a CPU is not read again; others have a second softmax,
since losses need fp32.  A GPU has a kernel for it all.

What it gives up: gradients of gradients.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygpt import device as devices
from raygpt.products import ProductSum, by_onednn, product

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Of fp32 logits at a time.  A GPU's products want more rows."""

UNSURE = 60.0
"""Nats, from which on the logarithm of a probability in fp32 may have lost digits, or all."""


def to_errors(logits: Tensor, right: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """The losses of a chunk, (n,) fp32, and the gradient of their sum, (n, V).  On a CPU, losses
    beyond :data:`UNSURE` may be infinite.

    Args:
        logits: (n, V), contiguous; overwritten, where that saves a matrix.
        right: the tokens that are right, (n, 1) int64.
        n_vocab: columns from there on are padding.
    """
    logits[:, n_vocab:] = -math.inf
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        p = torch.softmax(logits, dim=1, out=logits)
        chosen = p.gather(1, right)
        return -chosen[:, 0].log(), p.scatter_(1, right, chosen - 1)
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32).gather(1, right)
    p = torch.softmax(logits, dim=1)
    return -log_p[:, 0], p.scatter_(1, right, log_p.expm1().to(p.dtype))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
) -> Tensor:
    """Mean cross entropy of ``softmax(x @ weight[:n_vocab].T)`` in nats a token, an fp32 scalar.

    Matrix products run in autocast's type where that is on, everything else in fp32.

    Args:
        x: hidden states, (N, C).
        weight: of the head, (V, C); rows from ``n_vocab`` on are padding, whose gradient is zero.
        targets: the token that is right for each, (N,) int64.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, n_vocab)
        return loss
    return _losses(x, weight, targets, n_vocab).mean()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        losses = _losses(x, weight, targets, n_vocab, grad_x, grad_weight)
        ctx.gradients = grad_x, grad_weight
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.gradients
        del ctx.gradients  # scaled in place, so a second pass would be wrong
        scale = grad / len(grad_x)
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None


@torch.no_grad()
def _losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    grad_x: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> Tensor:
    """Of each token, (N,) fp32; fills the gradients of their sum, which start as zeros."""
    kind, errors_of = x.device.type, to_errors
    if devices.has_triton(x.device):
        from raygpt.loss_triton import to_errors as errors_of  # here, as it is not everywhere
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        head, x = weight.to(dtype), x.to(dtype)
        rows = _chunk_rows(len(x), 4 * len(weight), CHUNK_BYTES[kind])
        # Kept from chunk to chunk: where fresh pages come, they cost as much as the softmax.
        kept = None if by_onednn(x) else x.new_empty(rows, len(weight))
        losses = x.new_empty(len(x), dtype=torch.float32)
        grad_head = None if grad_weight is None else ProductSum(grad_weight)
        for first in range(0, len(x), rows):
            here = slice(first, first + rows)
            part, right = x[here], targets[here, None]
            logits = product(part, head.t(), None if kept is None else kept[: len(part)])
            losses[here], errors = errors_of(logits, right, n_vocab)
            if kind == "cpu":
                _mend(losses[here], part, head, right, n_vocab)
            if grad_x is not None and grad_head is not None:
                grad_x[here] = product(errors, head)
                grad_head.add(errors.t(), part)
            del logits, errors  # or they would be there beside the next chunk
        if grad_head is not None:
            grad_head.finish()
        return losses


def _mend(losses: Tensor, x: Tensor, head: Tensor, right: Tensor, n_vocab: int) -> None:
    """Compute again, in place, the losses of probabilities that are too small for fp32."""
    unsure = losses > UNSURE
    if unsure.any():
        logits = product(x[unsure], head.t()).float()[:, :n_vocab]
        losses[unsure] = F.cross_entropy(logits, right[unsure, 0], reduction="none")


def _chunk_rows(tokens: int, row_bytes: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: all have the same number, if one at most twice as small allows it."""
    least = math.ceil(tokens * row_bytes / chunk_bytes)
    even = (n for n in range(least, min(2 * least, tokens) + 1) if tokens % n == 0)
    return math.ceil(tokens / next(even, least))
