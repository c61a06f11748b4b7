"""The activation between a layer's two matrices, forward and backward: raygpt's GELU and torch's.

    python -m benchmarks.gelu [--short] [--rounds 15] [--threads 1]

In fp32 on the CPU, in turns; printed are medians of milliseconds.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import Row, against_torch, print_rows
from raygpt.gelu import gelu

SIZES = [(1024, 384), (768, 128)]
"""Tokens of a micro-batch and the model's width: of 6 x 384, and of the embedded text's preset."""
CALLS = 20
"""Of one turn; the first ones find memory that the other side left."""


def ms(function: Callable[[Tensor], Tensor], leaf: Tensor, gradient: Tensor) -> float:
    times = []
    for _ in range(CALLS):
        x = leaf.clone()  # as a layer's output: no leaf, and free to be overwritten
        began = time.perf_counter()
        torch.autograd.grad(function(x), x, gradient)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def rows(asked: int, threads: int = 1) -> Iterator[Row]:
    torch.set_num_threads(threads)
    functions: list[Callable[[Tensor], Tensor]] = [gelu, partial(F.gelu, approximate="tanh")]
    for tokens, width in SIZES:
        torch.manual_seed(0)
        leaf = torch.randn(tokens, 4 * width, requires_grad=True)
        gradient = torch.randn(tokens, 4 * width)
        ours, theirs = (partial(ms, function, leaf, gradient) for function in functions)
        yield against_torch(f"GELU, {tokens:,} tokens of 4 x {width}", ours, theirs, asked)


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=15, short=5, threads=True)
