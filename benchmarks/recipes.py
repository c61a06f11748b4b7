"""What the embedded text's presets reach, against nanoGPT's recipe in the same time.

    python -m benchmarks.recipes [--short] [--rounds 3] [--preset NAME ...]

raygpt's sides are whole commands: ``jobs/train.py PRESET``, from the start of Ray to the sample at
the end.  nanoGPT's recipe (plain_recipe.py) gets as long as the slowest of them took, and as many
steps as fit.  All learn from the same part of the text and are held against the rest of it,
each in its own tokens (nanoGPT's are bytes) and windows; the loss is in nats a byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.step import ROOT
from benchmarks.turns import Row, add_rounds, machine, rounds, turns
from raygpt.data.corpus import SPLITS, open_corpus
from raygpt.data.tokenizer import load_tokenizer

PRESETS = ("shakespeare", "shakespeare-modern")


class Result(NamedTuple):
    seconds: float
    """From the command to its end."""
    val_loss: float


class Sides:
    """The commands, with their files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs, self._longest = folder, 0, 0.0

    def ours(self, preset: str) -> Result:
        self._runs += 1
        name = str(self._runs)
        seconds = self._call(
            *(sys.executable, "jobs/train.py", preset),
            *(f"--run.storage={self._folder}", f"--run.name={name}"),
        )
        self._longest = max(self._longest, seconds)
        lines = (self._folder / name / "metrics.jsonl").read_text().splitlines()
        return Result(seconds, json.loads(lines[-1])["val_loss_per_byte"])

    def nanogpt(self) -> Result:
        corpus = open_corpus(str(next(self._folder.glob("*/manifest.json")).parent))
        tokenizer = load_tokenizer(corpus.tokenizer)
        files: dict[str, str] = {}
        for split in SPLITS:
            files[split] = str(self._folder / f"{split}.bin")
            chunks = range(len(corpus.chunks(split)))
            tokens = np.concatenate([corpus.read_chunk(split, index) for index in chunks])
            text = tokenizer.decode(tokens[tokens != tokenizer.eot])
            np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(files[split])
        result = self._folder / "result.json"
        settings = {**files, "end": time.time() + self._longest, "result": str(result)}
        file = self._folder / "settings.json"
        file.write_text(json.dumps(settings))
        seconds = self._call(
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("benchmarks/plain_recipe.py", str(file)),
        )
        return Result(seconds, json.loads(result.read_text())["val_loss"])

    def _call(self, *command: str) -> float:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return time.monotonic() - began


def rows(asked: int, presets: tuple[str, ...] = PRESETS) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder))
        ours: dict[str, list[Result]] = {preset: [] for preset in presets}
        theirs: list[Result] = []
        for _ in range(asked):
            for turn in turns(len(presets), 1):
                ours[presets[turn]].append(sides.ours(presets[turn]))
            theirs.append(sides.nanogpt())
    for preset, results in ours.items():
        yield Row(
            f"validation loss, {preset}",
            _middle(results),
            "nanoGPT's recipe, as long",
            _middle(theirs),
            f"{_loss(theirs) / _loss(results):.3f}",
        )


def _loss(results: list[Result]) -> float:
    return statistics.median(result.val_loss for result in results)


def _middle(results: list[Result]) -> str:
    seconds = statistics.median(result.seconds for result in results)
    return f"{_loss(results):.3f} in {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=3, short=2)
    parser.add_argument("--preset", nargs="*", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    asked = rounds(parser, arguments)
    print(machine())
    for row in rows(asked, tuple(arguments.preset)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
