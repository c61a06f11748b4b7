"""Memory that was freed: kept by workers, and given back between layers where that is asked for."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from raygpt.config import ModelConfig
from raygpt.model import GPT
from raygpt.train import malloc

MIB = 2**20
PROGRAM = """
import json, sys
import psutil, torch
from raygpt.config import ModelConfig
from raygpt.model import GPT
from raygpt.train import malloc

torch.set_num_threads(1)

def resident_after_much_was_freed():
    pieces = [torch.ones(2**18) for _ in range(256)]
    last = torch.ones(1)  # behind them, so that the heap cannot simply end earlier
    del pieces
    return psutil.Process().memory_info().rss, last

def loss(idx):
    return model(idx[:, :-1], idx[:, 1:])

torch.manual_seed(1)
model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32))
idx = torch.randint(0, 32, (2, 9))
loss(idx).backward()
model.zero_grad()
if sys.argv[1] != "keep":
    getattr(malloc, sys.argv[1])(model)
found, after_layers = [], []
model.transformer.ln_f.register_forward_pre_hook(
    lambda *_: after_layers.append(psutil.Process().memory_info().rss)
)
before, _ = resident_after_much_was_freed()
result = loss(idx)
found.append(before - after_layers[0])
found.append(before - psutil.Process().memory_info().rss)
before, _ = resident_after_much_was_freed()
result.backward()
found.append(before - psutil.Process().memory_info().rss)
model.eval()
before, _ = resident_after_much_was_freed()
loss(idx)
found.append(before - psutil.Process().memory_info().rss)
print(json.dumps([*found, result.item(), model.lm_head.weight.grad.sum().item()]))
"""


def outcome(what: str) -> tuple[list[bool], list[float]]:
    """Whether the layers' forward pass, all of it, a backward pass and a validation gave memory
    back; the loss and a sum of gradients."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        env={**os.environ, malloc.NAME: malloc.tunables()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *given, loss, gradients = json.loads(done.stdout)
    assert all(abs(size) < 64 * MIB or size > 192 * MIB for size in given)
    return [size > 192 * MIB for size in given], [loss, gradients]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_memory_is_kept_or_given_back() -> None:
    kept, numbers = outcome("keep")
    assert kept == [False] * 4
    assert outcome("give_back_in_passes") == ([True, True, True, False], numbers)
    assert outcome("give_back_between_layers") == ([True] * 4, numbers)


def test_layers_that_give_memory_back_are_compiled_as_the_others() -> None:
    torch.compiler.reset()
    counters.clear()
    graphs = CompileCounter()
    runs: list[int] = []
    model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=16, block_size=8, vocab_size=32))
    malloc.give_back_in_passes(model)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled = graphs(graph, inputs)

        def run(*arguments: Any) -> Any:
            runs.append(1)
            return compiled(*arguments)

        return run

    model.compile_layers(backend=backend)
    idx = torch.randint(0, 32, (2, 9))
    model(idx[:, :-1], idx[:, 1:]).backward()
    assert graphs.frame_count == 1 and len(runs) == 3 and not counters["graph_break"]
