"""What one would write with Ray Train and torch alone, to be held against raygpt.

    python benchmarks/plain_ray.py CONFIG NAME

Trains the model of a raygpt settings file on random windows of its text under DDP, elastic, with
Ray Train's defaults, until it is stopped: a checkpoint as often as the settings say, in place, by
rank 0; failures restart from the latest one.  It writes the lines of a run that
:mod:`benchmarks.chaos` reads.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import yaml
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from raygpt.config import ModelConfig
from raygpt.model import GPT

STATE = "state.pt"


def train(settings: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ModelConfig(**settings["model"])
    network = GPT(config)
    model = prepare_model(network)  # under DDP, unless this worker is the only one
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["lr"], betas=(0.9, 0.95))
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    text = np.fromfile(settings["text"], np.uint8)
    random = np.random.default_rng((first, rank))
    log = Log(Path(settings["run"]), first, size) if rank == 0 else None
    windows, micro = settings["windows"] // size, settings["micro"]
    for step in itertools.count(first):
        done = 0
        while done < windows:
            count = min(micro, windows - done)
            starts = random.integers(0, len(text) - config.block_size - 1, count)
            tokens = np.stack([text[s : s + config.block_size + 1] for s in starts]).astype(int)
            batch = torch.from_numpy(tokens)
            done += count
            model.require_backward_grad_sync = done == windows
            (model(batch[:, :-1], batch[:, 1:]) * count / windows).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if log is not None:
            log.step(step)
        if (step + 1) % settings["every"] == 0:
            report(rank, {"model": network.state_dict(), "optimizer": optimizer.state_dict()}, step)


def report(rank: int, state: dict[str, Any], step: int) -> None:
    """A checkpoint, the simple way."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save({**state, "step": step + 1}, Path(folder) / STATE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint)


class Log:
    """The lines that the benchmark reads."""

    def __init__(self, run: Path, first: int, size: int) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._size, self._attempt = size, time.time_ns()
        self._files = [(run / name).open("a", 1) for name in ("ledger.jsonl", "metrics.jsonl")]
        with (run / "events.jsonl").open("a") as events:
            print(json.dumps({"kind": "start", "step": first}), file=events)

    def step(self, step: int) -> None:
        row = {"step": step, "time": time.time(), "world_size": self._size}
        for file in self._files:
            print(json.dumps(row | {"attempt": self._attempt}), file=file)


def main() -> None:
    file, name = sys.argv[1:]
    settings = yaml.safe_load(Path(file).read_text())
    model, batch = settings["model"], settings["batch"]
    low, high = map(int, settings["scale"]["workers"].split(":"))
    storage = Path(settings["run"]["storage"])
    TorchTrainer(
        train,
        train_loop_config={
            "model": model,
            "lr": settings["optim"]["max_lr"],
            "text": str(Path(file).parent / "text.txt"),
            "run": str(storage / name),
            "windows": batch["tokens"] // model["block_size"],
            "micro": batch["micro"],
            "every": settings["train"]["checkpoint_every"],
        },
        scaling_config=ScalingConfig(num_workers=(low, high)),  # type: ignore[arg-type]
        run_config=RunConfig(
            name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main()
