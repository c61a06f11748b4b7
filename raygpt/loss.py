"""The output head and its cross entropy in one: no full matrix of logits is ever in memory.

The logits of N tokens over V words are the largest thing of a small model.  They are made in
chunks, turned into probabilities, and these at once into gradients; the backward pass only scales
what is there (as in Hsu et al. 2024, "Liger Kernel", section 3.2).  Beside the three matrix
products and the softmax, a chunk is read twice, for its largest logits and probabilities.

What it gives up: gradients of gradients.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Of fp32 logits at a time.  A GPU's products want more rows, and each chunk costs a pass over the
head's gradient; not measured there."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
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
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        head, x = weight.to(dtype), x.to(dtype)
        rows = math.ceil(len(x) / math.ceil(4 * len(x) * len(weight) / CHUNK_BYTES[kind]))
        # Kept from chunk to chunk: fresh pages would cost as much as the softmax.
        all_logits = x.new_empty(rows, len(weight))
        all_p = all_logits  # in their place, if they are of its type
        if dtype != torch.float32:
            all_p = x.new_empty(rows, len(weight), dtype=torch.float32)
        losses = x.new_empty(len(x), dtype=torch.float32)
        for first in range(0, len(x), rows):
            here = slice(first, first + rows)
            part, right = x[here], targets[here, None]
            logits, p = all_logits[: len(part)], all_p[: len(part)]
            torch.mm(part, head.t(), out=logits)
            logits[:, n_vocab:] = -math.inf
            top, chosen = logits.amax(dim=1), logits.gather(1, right)[:, 0]
            torch.softmax(logits, dim=1, dtype=torch.float32, out=p)
            # At the top, p is one over the sum of exp(logits - top).
            losses[here] = top.float() - chosen.float() - p.amax(dim=1).log()
            if grad_x is not None and grad_weight is not None:
                p.scatter_(1, right, p.gather(1, right) - 1)
                errors = p.to(dtype)
                grad_x[here] = errors @ head
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(errors.t(), part)
                else:
                    grad_weight += errors.t() @ part
        return losses
