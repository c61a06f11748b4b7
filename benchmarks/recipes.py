"""What the embedded text's presets reach in the same time, against each other and nanoGPT's recipe.

    python -m benchmarks.recipes [--short] [--rounds 3] [--preset NAME ...]

raygpt's sides are whole commands: ``jobs/train.py PRESET``, from the start of Ray to the sample at
the end.  The time is what the first preset takes, which is tried once; the others and nanoGPT's
recipe (plain_recipe.py) get as many steps as fit into it.  All learn from the same part of the text
and are held against the rest of it, each in its own tokens (nanoGPT's are bytes) and windows; the
loss is in nats a byte.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.step import ROOT
from benchmarks.turns import Row, add_rounds, in_turns, machine, ratio, rounds
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
        self._folder, self._runs = folder, 0

    def ours(self, preset: str, steps: int | None) -> Result:
        """With the preset's own number of steps, or another."""
        self._runs += 1
        seconds = self._call(
            *(sys.executable, "jobs/train.py", preset),
            *(f"--run.storage={self._folder}", f"--run.name={self._runs}"),
            *([f"--train.steps={steps}"] if steps else []),
        )
        return Result(seconds, self._lines()[-1]["val_loss_per_byte"])

    def fitting(self, preset: str, seconds: float) -> int:
        """How many steps of a preset fit into so many seconds, by a run of its own."""
        took, lines = self.ours(preset, None).seconds, self._lines()
        a_step = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)
        return int(len(lines) + (seconds - took) / a_step)

    def nanogpt(self, seconds: float) -> Result:
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
        settings = {**files, "end": time.time() + seconds, "result": str(result)}
        file = self._folder / "settings.json"
        file.write_text(json.dumps(settings))
        took = self._call(
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("benchmarks/plain_recipe.py", str(file)),
        )
        return Result(took, json.loads(result.read_text())["val_loss"])

    def _lines(self) -> list[dict[str, Any]]:
        """Of the last run."""
        lines = (self._folder / str(self._runs) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

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
        seconds = sides.ours(presets[0], None).seconds
        others = {preset: sides.fitting(preset, seconds) for preset in presets[1:]}
        commands = [partial(sides.ours, preset, others.get(preset)) for preset in presets]
        *ours, theirs = in_turns([*commands, partial(sides.nanogpt, seconds)], asked)
    first = f"{presets[0]}, as long"
    for preset, results in zip(presets, ours, strict=True):
        yield _row(preset, results, "nanoGPT's recipe, as long", theirs)
        if preset in others:
            yield _row(preset, results, first, ours[0])


def _row(preset: str, results: list[Result], other: str, theirs: list[Result]) -> Row:
    losses, their_losses = ([result.val_loss for result in side] for side in (results, theirs))
    return Row(
        f"validation loss, {preset}",
        _middle(results),
        other,
        _middle(theirs),
        ratio(their_losses, losses),
    )


def _middle(results: list[Result]) -> str:
    seconds = statistics.median(result.seconds for result in results)
    loss = statistics.median(result.val_loss for result in results)
    return f"{loss:.3f} in {seconds:.0f} s"


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
