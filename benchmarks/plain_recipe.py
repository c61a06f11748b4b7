"""nanoGPT's recipe for the embedded text, re-created from its published settings, in a given time.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/plain_recipe.py SETTINGS.json

The settings are those that its README gives for a CPU (4 layers of 128, windows of 64, batches of
12, no dropout), with the rates of its configuration for the text; the number of steps is the one
that fits into the time.  https://github.com/karpathy/nanoGPT has both.  It is held against raygpt
by :mod:`benchmarks.recipes`, which writes SETTINGS.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_model import PlainLoss
from raygpt.config import ModelConfig

MODEL = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=320)
BATCH, RATE, LOWEST, WARM_UP, BETAS, DECAY = 12, 1e-3, 1e-4, 100, (0.9, 0.99), 0.1
CALIBRATION, RESERVE = 40, 2.0
"""Steps until it is clear how many fit; seconds for the validation."""


def rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return RATE * (step + 1) / (WARM_UP + 1)
    share = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
    return LOWEST + (RATE - LOWEST) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def validate(model: nn.Module, tokens: np.ndarray) -> float:
    """Mean loss over all windows."""
    length = MODEL.block_size
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].reshape(count, length)
    targets = tokens[1 : count * length + 1].reshape(count, length)
    total = 0.0
    for first in range(0, count, 256):
        part = slice(first, first + 256)
        x, y = (torch.from_numpy(a[part].astype(np.int64)) for a in (inputs, targets))
        total += model(x, y).item() * len(x)
    return total / count


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = PlainLoss(MODEL)
    ddp = DistributedDataParallel(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)
    tokens = np.fromfile(settings["train"], np.uint16)
    random = np.random.default_rng(rank)
    length, step = MODEL.block_size + 1, 0
    steps = torch.tensor(10**9)
    began = time.time()
    while step < int(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, int(steps))
        starts = random.integers(0, len(tokens) - length, BATCH // size)
        batch = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(int))
        ddp(batch[:, :-1], batch[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step == CALIBRATION:
            now = time.time()
            left = settings["end"] - RESERVE - now
            steps.fill_(step + int(left * CALIBRATION / (now - began)))
            dist.broadcast(steps, 0)
    if rank == 0:
        val_loss = validate(model, np.fromfile(settings["val"], np.uint16))
        result = {"val_loss": val_loss, "steps": step}
        Path(settings["result"]).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
