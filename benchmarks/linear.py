"""A linear layer, forward and backward: raygpt's, which has the library for products that is faster
on this kind of processor, and torch's.

    python -m benchmarks.linear [--short] [--rounds 15] [--threads 1]

In fp32 on the CPU, in turns; printed are medians of milliseconds.  Where both have the same
library, the ratio is one.
"""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.turns import Row, against_torch, print_rows
from raygpt.products import Linear

SIZES = [(1024, 384), (1024, 768), (1024, 128)]
"""Tokens of a micro-batch and the model's width."""
CALLS = 10
"""Of one turn; the first ones find memory that the other side left."""


def ms(layer: nn.Linear, x: Tensor, gradient: Tensor) -> float:
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def rows(asked: int, threads: int = 1) -> Iterator[Row]:
    torch.set_num_threads(threads)
    for tokens, width in SIZES:
        torch.manual_seed(0)
        x, gradient = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, 4 * width)
        ours, theirs = (
            partial(ms, kind(width, 4 * width), x, gradient) for kind in (Linear, nn.Linear)
        )
        what = f"linear layer, {tokens:,} tokens, {width} to {4 * width:,}"
        yield against_torch(what, ours, theirs, asked)


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=15, short=5, threads=True)
