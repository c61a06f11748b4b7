"""Training speed of a whole raygpt job, against the least that one would write with torch alone.

    python -m benchmarks.step [--short] [--rounds 5] [--case NAME ...]

Both sides are commands as a user starts them, in turns: ``jobs/train.py`` and ``torchrun`` with
plain_ddp.py, with the same model, batch, threads and number of workers; and bare matrix products on
as many cores.  A side's speed is that from one step to the other, with all that lies between (data,
logging), once it is warm.  Printed are medians over rounds and the quartiles of the ratio within a
round.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.products import product_rates
from benchmarks.turns import Row, add_rounds, in_turns, machine, ratio, rounds
from raygpt.config import ModelConfig
from raygpt.data.prepare import prepare
from raygpt.data.tokenizer import load_tokenizer
from raygpt.device import describe, local_device
from raygpt.peak import peak_flops_of
from raygpt.products import is_faster
from raygpt.sizes import flops_per_token

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """What is trained: sizes, and windows of a step over all workers."""

    tokenizer: str
    model: ModelConfig
    workers: int
    threads: int
    windows: int
    micro: int
    steps: int
    warm_up: int
    lanes: int = 0
    """By default one for each worker."""
    gpu: bool = False
    """A GPU for each worker, and bf16; else fp32 on CPUs."""
    compile: bool = False
    """Layers of raygpt, the whole network of the other."""


CASES = {
    "bytes, 6 x 384, two workers": Case(
        "bytes", ModelConfig(6, 6, 384, 256, 320), 2, 1, 8, 4, 40, 10
    ),
    "50k words, 4 x 128, two workers": Case(
        "gpt2", ModelConfig(4, 4, 128, 64, 50304), 2, 1, 32, 16, 60, 10
    ),
    "bytes, 6 x 384, one worker": Case(
        "bytes", ModelConfig(6, 6, 384, 256, 320), 1, 2, 8, 8, 40, 10
    ),
}
_GPT2 = Case("gpt2", ModelConfig(12, 12, 768, 1024, 50304), 1, 1, 64, 16, 30, 10, 4, gpu=True)
MORE_CASES = {
    "bytes, 6 x 384, 64 windows": Case(  # nanoGPT's batch for this size
        "bytes", ModelConfig(6, 6, 384, 256, 320), 2, 1, 64, 4, 6, 2
    ),
    "GPT-2 124M, one GPU": _GPT2,
    "GPT-2 124M, one GPU, compiled": replace(_GPT2, compile=True, steps=40),
}


class Sides:
    """Both commands for a case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._folder = case, folder
        self.metrics: list[list[dict[str, Any]]] = []
        """Of each run of raygpt, the lines of metrics.jsonl."""
        text = resources.files("raygpt") / "assets" / "tinyshakespeare.txt"
        with resources.as_file(text) as file:
            self._corpus = str(folder / "corpus")
            prepare([str(file)], self._corpus, case.tokenizer, val_fraction=0.01, on_ray=False)
            tokens = load_tokenizer(case.tokenizer).encode(file.read_text())
        np.array(tokens, np.uint16).tofile(folder / "tokens.bin")

    def ours(self, *more: str) -> list[float]:
        """Unix times at which steps ended.

        Args:
            more: further settings, as on the command line.
        """
        case, name = self._case, str(len(self.metrics))
        model = [f"--model.{key}={value}" for key, value in asdict(case.model).items()]
        tokens = case.windows * case.model.block_size
        self._call(
            *(sys.executable, "jobs/train.py", *model, f"--data.corpus={self._corpus}"),
            *(f"--run.storage={self._folder}", f"--run.name={name}"),
            *(f"--batch.tokens={tokens}", f"--batch.lanes={case.lanes or case.workers}"),
            *(f"--batch.micro={case.micro}", f"--train.steps={case.steps}"),
            *("--train.eval_tokens=0", "--train.sample_prompt=", "--train.log_every=10"),
            *("--train.checkpoint_every=100000", f"--train.compile={case.compile}"),
            f"--train.precision={'bf16' if case.gpu else 'fp32'}",
            f"--scale.gpus_per_worker={int(case.gpu)}",
            *(f"--scale.workers={case.workers}", f"--scale.threads={case.threads}", *more),
        )
        lines = (self._folder / name / "metrics.jsonl").read_text().splitlines()
        self.metrics.append([json.loads(line) for line in lines])
        return [row["time"] for row in self.metrics[-1]]

    def plain(self) -> list[float]:
        """Unix times at which steps ended."""
        return self.torchrun("plain_ddp.py")

    def rates(self, torchs: bool = False) -> list[float]:
        """FLOP/s that each worker's device reaches, or should, by raygpt's products or torch's."""
        case = self._case
        if case.gpu:
            peak = peak_flops_of(describe(local_device()), torch.bfloat16)
            return [peak or math.nan] * case.workers
        return product_rates(case.workers, case.threads, torchs)

    def torchrun(self, script: str) -> list[float]:
        """The times that a script of this folder wrote on all workers, which torchrun started."""
        return self.script(
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nproc-per-node={self._case.workers}", f"benchmarks/{script}"),
        )

    def script(self, *command: str) -> list[float]:
        """The times that a command wrote, which gets a file of settings as its last argument."""
        case = self._case
        settings = {
            "model": asdict(case.model),
            "workers": case.workers,
            "threads": case.threads,
            "tokens": str(self._folder / "tokens.bin"),
            "windows": case.windows,
            "micro": case.micro,
            "steps": case.steps,
            "gpu": case.gpu,
            "compile": case.compile,
            "times": str(self._folder / "times.json"),
        }
        file = self._folder / "settings.json"
        file.write_text(json.dumps(settings))
        self._call(*command, str(file))
        times: list[float] = json.loads((self._folder / "times.json").read_text())
        return times

    def _call(self, *command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)


def speed(case: Case, times: list[float]) -> float:
    """Tokens a second, once it is warm."""
    warm = times[case.warm_up :]
    tokens = case.windows * case.model.block_size
    return tokens * (len(warm) - 1) / (warm[-1] - warm[0])


def rows(asked: int, cases: Iterable[str] = CASES) -> Iterator[Row]:
    for name in cases:
        case = (CASES | MORE_CASES)[name]
        with tempfile.TemporaryDirectory() as folder:
            sides = Sides(case, Path(folder))
            machines: dict[str, Callable[[], list[float]]] = {
                "the GPU's data sheet" if case.gpu else "its products alone": sides.rates
            }
            if not case.gpu and is_faster():
                machines["torch.mm alone"] = partial(sides.rates, torchs=True)
            ours, plain, *rates = in_turns([sides.ours, sides.plain, *machines.values()], asked)
        speeds = [[speed(case, t) for t in side] for side in (ours, plain)]
        yield Row(
            f"training, {name}",
            f"{statistics.median(speeds[0]):,.0f} tokens/s",
            "torchrun, DDP",
            f"{statistics.median(speeds[1]):,.0f} tokens/s",
            ratio(*speeds),
        )
        flops = [s * flops_per_token(case.model) / 1e9 for s in speeds[0]]
        for what, side in zip(machines, rates, strict=True):
            reached = [sum(workers) / 1e9 for workers in side]
            yield Row(
                f"share of the machine, {name}",
                f"{statistics.median(flops):.0f} GFLOP/s",
                what,
                f"{statistics.median(reached):.0f} GFLOP/s",
                ratio(flops, reached),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=5, short=2)
    parser.add_argument(
        "--case",
        nargs="*",
        choices=CASES | MORE_CASES,
        default=list(CASES),
        help=f"default: {', '.join(CASES)}",
    )
    arguments = parser.parse_args()
    asked = rounds(parser, arguments)
    print(machine())
    for row in rows(asked, arguments.case):
        print(row, flush=True)


if __name__ == "__main__":
    main()
