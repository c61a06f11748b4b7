"""The least that trains the same model on several workers: no Ray, no checkpoints, no data order.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/plain_ddp.py SETTINGS.json

What one writes with torch alone: DDP with its own settings, random windows of a file of tokens,
cross entropy over the full logits, fused AdamW, clipping, a cosine; on a GPU bf16 autocast, copies
from page-locked memory and, if asked, torch.compile.  It is held against raygpt by
:mod:`benchmarks.step`, which writes SETTINGS.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_model import PlainLoss
from raygpt.config import ModelConfig


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    gpu = settings["gpu"]
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    config = ModelConfig(**settings["model"])
    model = PlainLoss(config).to(device)
    if gpu:
        torch.set_float32_matmul_precision("high")
    if settings["compile"]:
        model.compile()
    ddp = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), fused=True)
    tokens = np.memmap(settings["tokens"], np.uint16, "r")
    random = np.random.default_rng(rank)
    length, micro = config.block_size + 1, settings["micro"]
    passes = settings["windows"] // (size * micro)
    times = []
    for step in range(settings["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / settings["steps"])) / 2
        total = torch.zeros((), device=device)
        for i in range(passes):
            starts = random.integers(0, len(tokens) - length, micro)
            batch = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(int))
            if gpu:
                batch = batch.pin_memory().to(device, non_blocking=True)
            if isinstance(ddp, DistributedDataParallel):
                ddp.require_backward_grad_sync = i == passes - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                loss = ddp(batch[:, :-1], batch[:, 1:]) / passes
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == settings["steps"] - 1:
            mean = total.item() / size  # a GPU is waited for
            if rank == 0:
                print(f"step {step}: {mean:.4f}", flush=True)
        times.append(time.time())
    if rank == 0:
        Path(settings["times"]).write_text(json.dumps(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
