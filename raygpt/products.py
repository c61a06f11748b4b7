"""Products of fp32 matrices on CPUs, by the faster of the two libraries that torch has for them.

torch multiplies with MKL, which leaves out AVX-512 on processors that are not Intel's.  oneDNN
uses what the processor has, which is up to twice as fast there.  The choice is made by the kind of
processor and not by a clock, since the last bits of a product depend on it.

What it gives up: gradients of gradients, where oneDNN multiplies.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raygpt import device as devices

ROWS = 4096
"""Of a sum of products at a time: what is not added yet is memory."""


class Linear(nn.Linear):
    """``x @ weight.T + bias``, (..., C) to (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        if not by_onednn(x):
            return super().forward(x)
        y: Tensor = _Linear.apply(x, self.weight, self.bias)
        return y


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """(m, k) times (k, n); without a graph.

    Args:
        out: memory for the result (m, n), which oneDNN cannot use.
    """
    return times(a, b.t()) if by_onednn(a) else torch.mm(a, b, out=out)


class ProductSum:
    """Adds up products in ``total``, (m, n), which starts as zeros; without a graph."""

    def __init__(self, total: Tensor) -> None:
        self._total = total
        self._turned: Tensor | None = None
        """The sum so far, (n, m), where it is made so."""

    def add(self, a: Tensor, b: Tensor) -> None:
        """Another one, (m, k) times (k, n); both may be of a narrower type."""
        if by_onednn(a):
            self._add_by_onednn(a, b)
        elif a.dtype == self._total.dtype:
            self._total.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(self._total, a, b, out_dtype=self._total.dtype, out=self._total)
        else:
            self._total += a @ b

    def finish(self) -> None:
        """To be called once, when all are added."""
        if self._turned is not None:
            self._total.copy_(self._turned.t())

    def _add_by_onednn(self, a: Tensor, b: Tensor) -> None:
        """Into memory of the product's size, since oneDNN cannot add to what is there.

        It would copy an ``a`` that lies transposed, each time.  So the sum is made transposed, and
        is turned once, where a second one is no larger than ``a``.  Else it is made in parts.
        """
        if self._turned is not None:
            self._turned += times(b.t(), a)
        elif self._total.numel() <= a.numel():
            self._turned = times(b.t(), a)
        else:
            for part, rows in zip(self._total.split(ROWS), a.split(ROWS), strict=True):
                part += times(rows, b.t())


def products(a: Tensor, b: Tensor) -> Tensor:
    """(n, m, k) times (n, k, l); without a graph."""
    if not by_onednn(a):
        return a @ b
    return torch.stack([times(*pair) for pair in zip(a, b.mT, strict=True)])


def products_and(total: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta`` times ``total`` (n, m, l) and ``alpha`` times :func:`products`; without a graph."""
    if not by_onednn(a):
        return torch.baddbmm(total, a, b, beta=beta, alpha=alpha)
    return products(a, b).mul_(alpha).add_(total, alpha=beta)


def by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies ``x``; what is compiled or not fp32 is torch's to decide."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return is_faster() and not torch.is_autocast_enabled("cpu")


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is, and torch has it."""
    return devices.mkl_lacks_avx512() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, in memory of its own; without a graph."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN would fall back to something very slow
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    # No view, so that it may be changed in place behind a function of autograd's.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        asked = ctx.needs_input_grad
        return (
            times(gradient, weight.t()) if asked[0] else None,
            times(rows.t(), x.flatten(0, -2).t()) if asked[1] else None,
            rows.sum(0) if asked[2] else None,
        )
