"""The output head and its cross entropy in one: no full matrix of logits is ever in memory.

The logits of N tokens over V words are the largest thing of a small model.  They are made in
chunks, turned into probabilities, and these at once into gradients; the backward pass only scales
what is there (as in Hsu et al. 2024, "Liger Kernel", section 3.2).  Beside the three matrix
products and the softmax, a chunk in fp32 is read twice, for its largest logits and probabilities;
one in bf16 is widened by the softmax and narrowed once.

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
        all_wide = x.new_empty(0, dtype=torch.float32)
        if dtype != torch.float32:
            all_wide = all_wide.new_empty(rows, len(weight))
        losses = x.new_empty(len(x), dtype=torch.float32)
        for first in range(0, len(x), rows):
            here = slice(first, first + rows)
            part, right = x[here], targets[here, None]
            logits = all_logits[: len(part)]
            torch.mm(part, head.t(), out=logits)
            logits[:, n_vocab:] = -math.inf
            losses[here] = _to_errors(logits, right, all_wide[: len(part)])
            if grad_x is not None and grad_weight is not None:
                grad_x[here] = logits @ head
                _add_product(grad_weight, logits.t(), part)
        return losses


def _to_errors(logits: Tensor, right: Tensor, wide: Tensor) -> Tensor:
    """The losses of a chunk, (n,) fp32; its logits (n, V) become the gradient of their sum.

    Args:
        right: the tokens that are right, (n, 1) int64.
        wide: room for the logits in fp32, where they are of another type.
    """
    if logits.dtype == torch.float32:
        top, chosen = logits.amax(dim=1), logits.gather(1, right)[:, 0]
        torch.softmax(logits, dim=1, out=logits)
        # At the top, p is one over the sum of exp(logits - top).
        losses = top - chosen - logits.amax(dim=1).log()
        logits.scatter_(1, right, logits.gather(1, right) - 1)
        return losses
    torch.log_softmax(logits, dim=1, dtype=torch.float32, out=wide)
    log_p = wide.gather(1, right)
    torch.exp(wide, out=logits)
    logits.scatter_(1, right, log_p.expm1().to(logits.dtype))
    return -log_p[:, 0]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product of matrices, which may be of a narrower type, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
