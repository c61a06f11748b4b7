"""GELU for training in fp32 on CPUs: one pass makes its value and its derivative from one sigmoid.

torch's two kernels each compute a hyperbolic tangent, which costs a CPU more than all else in them.
Here the forward pass leaves the derivative where its argument was, as the loss does with its
gradients (``loss.py``), and the backward pass is one product.  It goes through blocks that stay in
a core's cache.

What it gives up: gradients of gradients, and a second backward pass (torch refuses it, as what it
needs was overwritten); the argument is overwritten.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous()
    if plain or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    y: Tensor = _Gelu.apply(x)
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        derived = ctx.needs_input_grad[0]
        y = torch.empty_like(x)
        offset = torch.tensor(SCALE)
        block = min(BLOCK * torch.get_num_threads(), x.numel())
        scratch = torch.empty(3, block)
        for a, b in zip(x.detach().view(-1).split(block), y.view(-1).split(block), strict=True):
            c, u, s = scratch[:, : a.numel()]
            torch.mul(a, a, out=c)
            torch.addcmul(a, a, c, value=CUBIC, out=u).mul_(SCALE)
            torch.sigmoid(u, out=s)
            torch.mul(a, s, out=b)
            if derived:  # s + y (1 - s) 2u'
                torch.addcmul(b, b, s, value=-1, out=u)
                torch.add(offset, c, alpha=3 * CUBIC * SCALE, out=c)
                torch.addcmul(s, u, c, out=a)
        if derived:
            ctx.save_for_backward(x.detach())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return torch.mul(gradient, derivative, out=derivative)
