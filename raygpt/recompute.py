"""Selective activation recomputation (Korthikanti et al. 2022, section 5): what takes little time
to make again is not kept for the backward pass.

Of a layer that is what goes into its linear layers behind a norm or an activation function, 6 of
the 16 matrices of (T, C) that are kept otherwise.  The bits are the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

WIDE = 512
"""Channels from which on it is done: a token's matrix products grow with their square, and narrow
layers would spend some percent of a step for memory that nobody lacks."""

Again = Callable[[], Tensor]
"""Makes a tensor again, without a graph."""


def pays(x: Tensor) -> bool:
    """Whether a layer with this input (..., C) shall recompute: on a CPU, where it is wide, if
    there will be a backward pass.  What is compiled decides for itself what it keeps."""
    wide = x.device.type == "cpu" and x.shape[-1] >= WIDE
    return wide and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def linear(layer: nn.Linear, x: Tensor, again: Again | None) -> Tensor:
    """``layer(x)``, which keeps ``again`` for the backward pass, if given, in place of ``x``."""
    if again is None:
        return layer(x)
    with saved_tensors_hooks(partial(_pack, x.data_ptr(), again), _unpack):
        return layer(x)


def _pack(address: int, again: Again, saved: Tensor) -> Any:
    return (again, saved.shape) if saved.data_ptr() == address else saved


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, shape = kept
    x: Tensor = again()
    return x.view(shape)
