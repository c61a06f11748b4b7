"""A linear layer, forward and backward: raygpt's, which has the library for products that is faster
on this kind of processor, and torch's.

    python -m benchmarks.linear [--short] [--rounds 15] [--threads 1]

In fp32 on the CPU, in turns; printed are medians of GFLOP/s.  Where both have the same library, the
ratio is one.
"""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.products import Linear

SIZES = [(1024, 384), (1024, 768), (1024, 128)]
"""Tokens of a micro-batch and the model's width."""
CALLS = 10
"""Of one turn; the first ones find memory that the other side left."""


def rate(layer: nn.Linear, x: Tensor, gradient: Tensor) -> float:
    """GFLOP/s."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)
        times.append(time.perf_counter() - began)
    return 6 * len(x) * layer.weight.numel() / statistics.median(times) / 1e9


def rows(asked: int, threads: int = 1) -> Iterator[Row]:
    torch.set_num_threads(threads)
    for tokens, width in SIZES:
        torch.manual_seed(0)
        layers = [kind(width, 4 * width) for kind in (Linear, nn.Linear)]
        x, gradient = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, 4 * width)
        sides = [partial(rate, layer, x, gradient) for layer in layers]
        ours, theirs = (rates[1:] for rates in in_turns(sides, asked + 1))  # warm
        yield Row(
            f"linear layer, {tokens:,} tokens, {width} to 4 x {width}",
            f"{statistics.median(ours):.0f} GFLOP/s",
            "torch's",
            f"{statistics.median(theirs):.0f} GFLOP/s",
            ratio(ours, theirs),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=15, short=5, threads=True)
