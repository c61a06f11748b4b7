"""The same training with litgpt's pretraining, by a Python that has litgpt.

    python benchmarks/plain_litgpt.py SETTINGS.json

litgpt trains on several devices with FSDP, which needs GPUs; so this is one process with as
many threads as all workers together have.
Its layers are GPT-NeoX's: no learned positions, rotary ones instead.  It compiles the model; steps
count once it has.  It is held against raygpt by :mod:`benchmarks.users`, which writes SETTINGS.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt import Config
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class Windows(IterableDataset):
    """Random windows of a file of tokens; notes when a step has ended, and ends the program after
    the last, since saving is not compared."""

    def __init__(self, settings: dict[str, Any], timed: bool) -> None:
        self._settings, self._timed = settings, timed

    def __iter__(self) -> Iterator[Tensor]:
        tokens = np.memmap(self._settings["tokens"], np.uint16, "r")
        random = np.random.default_rng(0)
        length = self._settings["model"]["block_size"] + 1
        windows, times, given = self._settings["windows"], [], 0
        while True:
            if self._timed and given and given % windows == 0:
                times.append(time.time())
                if len(times) == self._settings["steps"]:
                    Path(self._settings["times"]).write_text(json.dumps(times))
                    os._exit(0)
            start = random.integers(0, len(tokens) - length)
            yield torch.from_numpy(tokens[start : start + length].astype(np.int64))
            given += 1


class Data(DataModule):
    """Both loaders, without workers: the windows lie in memory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self._settings = settings

    def connect(self, *_: Any, **__: Any) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self._settings, True), batch_size=self._settings["micro"])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self._settings, False), batch_size=self._settings["micro"])


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    model = settings["model"]
    torch.set_num_threads(settings["workers"] * settings["threads"])
    config = Config(
        name="plain",
        block_size=model["block_size"],
        n_layer=model["n_layer"],
        n_head=model["n_head"],
        n_embd=model["n_embd"],
        padded_vocab_size=model["vocab_size"],
        parallel_residual=False,
        rotary_percentage=1.0,
        gelu_approximate="tanh",
        attn_bias=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        setup(
            "plain",
            model_config=config,
            out_dir=Path(folder),
            precision="32-true",
            data=Data(settings),
            train=TrainArgs(
                save_interval=None,
                log_interval=10,
                global_batch_size=settings["windows"],
                micro_batch_size=settings["micro"],
                # One step more than is timed, so that the last one's end is seen.
                max_tokens=(settings["steps"] + 1) * settings["windows"] * model["block_size"],
                max_norm=1.0,
                lr_warmup_steps=10,
                tie_embeddings=True,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
            optimizer={
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1},
            },
            devices=1,
            logger_name="csv",
        )


if __name__ == "__main__":
    main()
