"""How glibc allocates in the processes of workers; a process reads this as it starts.

Memory that was freed is kept, which is fast.  Where memory matters more, free pages are given back
at the peak, or between layers, too.
"""

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what starts processes has no torch
    from torch import nn

    from raygpt.model import GPT

NAME = "GLIBC_TUNABLES"
_TUNABLES = {
    # Kernels allocate and free the same sizes in each step.  Left alone, glibc hands large ones
    # back to the kernel, which fills fresh pages with zeros the next time: up to 10 % of a step.
    "mmap_threshold": 2**30,
    "trim_threshold": 2**32,
    "top_pad": 2**24,
    "arena_max": 1,  # the training thread would have heaps of its own, of 64 MiB
    "hugetlb": 1,
    # Small pieces that a thread keeps for itself stay between large free ones, which remain apart.
    "tcache_count": 0,
}

LAYERS_APART = 4


def tunables() -> str:
    """The value of ``GLIBC_TUNABLES`` for workers; a user's own goes first."""
    ours = ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())
    return os.environ.get(NAME, ours)


def give_back(*_: object) -> None:
    """Give free memory back to the kernel; without glibc it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_in_passes(model: "GPT") -> None:
    """Let a model on a CPU give free memory back between its layers' forward pass and the loss,
    where it needs the most, and twice within the layers of both passes: what they needed for a
    moment left holes among what they keep.  More often, it takes time that shows."""
    import torch

    layers = model.transformer.h
    thirds = [layers[i] for i in sorted({len(layers) // 3, 2 * len(layers) // 3})]
    # Layers may be compiled, with their hooks.
    hook = torch.compiler.disable(_give_back_in_training)
    for module in (*thirds, model.transformer):
        module.register_forward_hook(hook)
    for block in thirds:
        _first(block).register_post_accumulate_grad_hook(give_back)


def give_back_between_layers(model: "GPT") -> None:
    """Let a model on a CPU give free memory back before each forward pass, and in the backward pass
    after each fourth layer.

    Gradients come to lie among what a layer needs for a moment, and leave holes that add up.
    Fresh pages take time, so it is not done after every layer.
    """
    model.register_forward_pre_hook(give_back)
    for block in list(model.transformer.h)[::LAYERS_APART]:
        _first(block).register_post_accumulate_grad_hook(give_back)


def _first(block: "nn.Module") -> "nn.Parameter":
    """The parameter whose gradient is the layer's last."""
    return next(block.parameters())


def _give_back_in_training(module: "nn.Module", *_: object) -> None:
    if module.training:
        give_back()
