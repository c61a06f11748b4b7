"""Causal attention; in fp32 on CPUs by oneDNN, where that multiplies faster (``products.py``).

torch's own kernel is FlashAttention-2 (Dao 2023), whose products are MKL's there.  Here each head
goes through blocks of queries, whose scores stay in a core's cache, and keys that come after a
block are left out.  Probabilities are kept for the backward pass where they are few, and else made
again, to the same bits.

What it gives up, and leaves to torch's kernel: dropout, short windows, more than one thread.
Gradients of gradients it has not.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygpt.products import by_onednn, times

ROWS = 256
"""Queries at a time."""
SMALLEST = 16_384
"""Numbers in a head's keys, from which on it is faster: fewer make products that are too small."""
KEPT = 4
"""Times the size of a head: windows up to that length have no more probabilities than an MLP has
hidden values."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` over each token and those before it (Vaswani et al. 2017,
    eq. 1), (B, H, T, D) of all; the result lies in memory as (B, T, H, D).

    Args:
        dropout: probability with which a weight is left out.
    """
    small = q.shape[2] * q.shape[3] < SMALLEST
    if not by_onednn(q) or small or dropout or torch.get_num_threads() > 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    y: Tensor = _CausalAttention.apply(q, k, v)
    return y


def _blocks(tokens: int) -> list[slice]:
    return [slice(first, min(first + ROWS, tokens)) for first in range(0, tokens, ROWS)]


def _later(tokens: int) -> Tensor:
    """What is added to the scores of a block and its own keys: none looks ahead."""
    rows = min(ROWS, tokens)
    return torch.full((rows, rows), -math.inf).triu_(1)


def _probabilities(q: Tensor, k: Tensor, later: Tensor) -> Tensor:
    """Of queries (n, D) over keys (m, D), the last n of which are at their own places: (n, m)."""
    scores = times(q, k)
    n = len(q)
    scores[:, -n:].add_(later[:n, :n])
    return torch.softmax(scores, 1, out=scores)


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of each sequence and head, the (T, D) of each (B, H, T, D)."""
    sequences = (tensor.unbind() for tensor in tensors)
    for heads in zip(*sequences, strict=True):
        yield from zip(*(each.unbind() for each in heads), strict=True)


class _CausalAttention(torch.autograd.Function):
    """Keeps what it is given; heads are copied, one at a time, to where oneDNN can use them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, T, D = q.shape
        y = q.new_empty(B, T, H, D).transpose(1, 2)
        blocks, later = _blocks(T), _later(T)
        kept: list[Tensor] = []
        keeps = T <= KEPT * D and any(ctx.needs_input_grad)
        for head_q, head_k, head_v, head_y in _heads(q, k, v, y):
            head_q, head_k, head_v = head_q / math.sqrt(D), head_k.contiguous(), head_v.contiguous()
            for rows in blocks:
                seen = slice(0, rows.stop)
                p = _probabilities(head_q[rows], head_k[seen], later)
                head_y[rows] = times(p, head_v[seen].t())
                if keeps:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        B, H, T, D = q.shape
        gradients = q.new_empty(3, B, T, H, D).transpose(2, 3)
        blocks, later = _blocks(T), _later(T)
        # Rows of p times its gradient add up to those of y times its own (Dao 2022, appendix B.2).
        sums = (grad_y * y).sum(-1, keepdim=True)
        heads = _heads(q, k, v, grad_y, sums, *gradients)
        for head, (head_q, head_k, head_v, head_g, head_s, *into) in enumerate(heads):
            head_q, head_k, head_v = head_q / math.sqrt(D), head_k.contiguous(), head_v.contiguous()
            head_g = head_g.contiguous()
            grad_q, grad_k, grad_v = into
            for block, rows in reversed(list(enumerate(blocks))):
                seen = slice(0, rows.stop)
                some_q, some_k, some_g = head_q[rows], head_k[seen], head_g[rows]
                if kept:
                    p = kept[head * len(blocks) + block]
                else:
                    p = _probabilities(some_q, some_k, later)
                grad_s = times(some_g, head_v[seen]).sub_(head_s[rows]).mul_(p)
                grad_q[rows] = times(grad_s, some_k.t())
                # Transposed, so that what is turned is small.
                of_k, of_v = times(some_q.t(), grad_s.t()), times(some_g.t(), p.t())
                if rows.stop == T:
                    all_k, all_v = of_k, of_v
                else:
                    all_k[:, seen] += of_k
                    all_v[:, seen] += of_v
            grad_k.copy_(all_k.t().contiguous())
            grad_v.copy_(all_v.t().contiguous())
        grad_q, grad_k, grad_v = gradients
        return grad_q.div_(math.sqrt(D)), grad_k, grad_v
