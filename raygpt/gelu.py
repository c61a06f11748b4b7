"""GELU for training in fp32 on CPUs: one pass makes its value and its derivative from one sigmoid.

torch's two kernels each compute a hyperbolic tangent, which costs a CPU more than all else in them.
Here the forward pass leaves the derivative where its argument was, as the loss does with its
gradients (``loss.py``), and the backward pass is one product.  It goes through blocks that stay in
a core's cache.

What it gives up: gradients of gradients, and a second backward pass (torch refuses it, as what it
needs was overwritten); the argument is overwritten.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from raygpt.recompute import Again

CUBIC = 0.044715
SCALE = 2 * math.sqrt(2 / math.pi)
BLOCK = 131_072
"""Elements a thread; a smaller block costs more calls, a larger one more memory traffic."""


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of Hendrycks & Gimpel 2016, section 2, of the same shape as ``x``.

    x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.

    Args:
        x: overwritten where a gradient will be asked for.
    """
    if not _is_ours(x):
        return F.gelu(x, approximate="tanh")
    y: Tensor = _Gelu.apply(x)
    return y


def gelu_again(x: Tensor) -> tuple[Tensor, Again]:
    """:func:`gelu`, and what makes it again: to be called in the backward pass, once and before the
    gradient of ``x`` is asked for, or not at all.

    The derivative is computed there, too, so that ``x`` is overwritten only then.
    """
    if not _is_ours(x):
        y = F.gelu(x, approximate="tanh")
        return y, partial(F.gelu, x.detach(), approximate="tanh")
    argument = _Argument(x.detach())
    y = _Late.apply(x, argument)
    return y, argument.last_value


def _is_ours(x: Tensor) -> bool:
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    return ours and not torch.compiler.is_compiling()


def _value(x: Tensor, derived: bool) -> Tensor:
    """GELU of ``x``, which, if asked, becomes the derivative."""
    y = torch.empty_like(x)
    offset = torch.tensor(SCALE)
    block = min(BLOCK * torch.get_num_threads(), x.numel())
    scratch = torch.empty(3, block)
    for a, b in zip(x.view(-1).split(block), y.view(-1).split(block), strict=True):
        c, u, s = scratch[:, : a.numel()]
        torch.mul(a, a, out=c)
        torch.addcmul(a, a, c, value=CUBIC, out=u).mul_(SCALE)
        torch.sigmoid(u, out=s)
        torch.mul(a, s, out=b)
        if derived:  # s + y (1 - s) 2u'
            torch.addcmul(b, b, s, value=-1, out=u)
            torch.add(offset, c, alpha=3 * CUBIC * SCALE, out=c)
            torch.addcmul(s, u, c, out=a)
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        derived = ctx.needs_input_grad[0]
        y = _value(x.detach(), derived)
        if derived:
            ctx.save_for_backward(x.detach())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return torch.mul(gradient, derivative, out=derivative)


class _Argument:
    """Of a call of GELU, until it becomes the derivative."""

    def __init__(self, x: Tensor) -> None:
        self.x, self._derived = x, False

    def last_value(self) -> Tensor:
        self._derived = True
        return _value(self.x, derived=True)

    def derivative(self) -> Tensor:
        if not self._derived:
            self.last_value()
        return self.x


class _Late(torch.autograd.Function):
    """Keeps the argument itself: torch would refuse a saved one that was overwritten meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, argument: _Argument) -> Tensor:
        ctx.argument = argument
        return _value(argument.x, derived=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        argument, ctx.argument = ctx.argument, None
        if argument is None:
            raise RuntimeError("a second backward pass: what it needs was overwritten by the first")
        derivative = argument.derivative()
        return torch.mul(gradient, derivative, out=derivative), None
