"""The head with its loss, forward and backward: raygpt's, torch's, and the matrix products alone.

    python -m benchmarks.loss [--short] [--rounds 9] [--threads 1]

In fp32 on the CPU, in turns; printed are medians of milliseconds.  The products are the three that
nobody can do without, by the faster library: logits, and the gradients of hidden states and of the
head.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.loss import linear_cross_entropy
from raygpt.products import product

SIZES = [(1024, 128, 50304, 50257), (1024, 768, 50304, 50257), (2048, 384, 320, 257)]
"""Tokens, width, words with padding and without."""


def sides(n: int, c: int, v: int, used: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    x = torch.randn(n, c, requires_grad=True)
    weight = (torch.randn(v, c) / c**0.5).requires_grad_()
    targets = torch.randint(used, (n,))
    mask = torch.zeros(v)
    mask[used:] = float("-inf")

    def backward(loss: Tensor) -> None:
        loss.backward()
        x.grad = weight.grad = None

    @torch.no_grad()
    def products() -> None:
        logits = product(x, weight.t())
        product(logits, weight)
        product(x.t(), logits)  # transposed, which is faster

    return {
        "raygpt": lambda: backward(linear_cross_entropy(x, weight, targets, used)),
        "torch": lambda: backward(F.cross_entropy(F.linear(x, weight, mask), targets)),
        "products alone": products,
    }


def ms(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def rows(asked: int, threads: int = 1) -> Iterator[Row]:
    torch.set_num_threads(threads)
    for size in SIZES:
        functions = sides(*size)
        took = in_turns([partial(ms, function) for function in functions.values()], asked + 1)
        times = {name: t[1:] for name, t in zip(functions, took, strict=True)}  # warm
        medians = {name: statistics.median(t) for name, t in times.items()}
        yield Row(
            f"head and loss, {size[0]:,} tokens of {size[1]}, {size[2]:,} words",
            f"{medians['raygpt']:.1f} ms",
            f"torch's (the products alone {medians['products alone']:.1f} ms)",
            f"{medians['torch']:.1f} ms",
            ratio(times["torch"], times["raygpt"]),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=9, short=3, threads=True)
