"""Causal attention, forward and backward: raygpt's, which has the library for products that is
faster on this kind of processor, and torch's.

    python -m benchmarks.attention [--short] [--rounds 15] [--threads 1]

In fp32 on the CPU, in turns; printed are medians of milliseconds.  Where raygpt leaves it to
torch's kernel, the ratio is one.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import Row, against_torch, print_rows
from raygpt.attention import causal_attention

SIZES = [(16, 64, 4, 32), (4, 256, 6, 64), (1, 1024, 12, 64)]
"""Windows of a micro-batch, tokens, heads and their size: of the embedded text's preset, of 6 x 384
and of GPT-2."""
CALLS = 10
"""Of one turn; the first ones find memory that the other side left."""


def ms(function: Callable[..., Tensor], together: Tensor, heads: int, gradient: Tensor) -> float:
    B, T, C = gradient.shape
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        parts = (part.view(B, T, heads, -1).transpose(1, 2) for part in together.split(C, 2))
        y = function(*parts).transpose(1, 2).reshape(B, T, C)
        torch.autograd.grad(y, together, gradient)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def rows(asked: int, threads: int = 1) -> Iterator[Row]:
    torch.set_num_threads(threads)
    torchs = partial(F.scaled_dot_product_attention, is_causal=True)
    functions: list[Callable[..., Tensor]] = [causal_attention, torchs]
    for windows, tokens, heads, size in SIZES:
        torch.manual_seed(0)
        together = torch.randn(windows, tokens, 3 * heads * size, requires_grad=True)
        gradient = torch.randn(windows, tokens, heads * size)
        ours, theirs = (partial(ms, f, together, heads, gradient) for f in functions)
        what = f"attention, {windows} x {tokens:,} tokens, {heads} heads of {size}"
        yield against_torch(what, ours, theirs, asked)


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=15, short=5, threads=True)
