"""The same training with transformers' Trainer, as its users write it.

    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/plain_trainer.py SETTINGS.json

GPT2LMHeadModel without dropout, AdamW, clipping and a cosine, all by TrainingArguments.  It is held
against raygpt by :mod:`benchmarks.users`, which writes SETTINGS.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Windows(Dataset):
    """Random windows of a file of tokens."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._tokens = np.memmap(settings["tokens"], np.uint16, "r")
        self._length = settings["model"]["block_size"]
        most = len(self._tokens) - self._length
        count = settings["windows"] * settings["steps"]
        self._starts = np.random.default_rng(0).integers(0, most, count)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._starts[index]
        window = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        return {"input_ids": window, "labels": window}  # the model shifts them


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.time())


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    model, workers = settings["model"], int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model["vocab_size"],
            n_positions=model["block_size"],
            n_embd=model["n_embd"],
            n_layer=model["n_layer"],
            n_head=model["n_head"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings["micro"],
            gradient_accumulation_steps=settings["windows"] // (workers * settings["micro"]),
            max_steps=settings["steps"],
            learning_rate=1e-3,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
        )
        Trainer(
            model=network, args=arguments, train_dataset=Windows(settings), callbacks=[clock]
        ).train()
    if os.environ["RANK"] == "0":
        Path(settings["times"]).write_text(json.dumps(clock.times))


if __name__ == "__main__":
    main()
