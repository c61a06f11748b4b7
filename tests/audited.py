"""A run that is played: batches come from the plain reader, files are as a worker writes them."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raygpt.audit import Report, audit
from raygpt.audit.words import ranges
from raygpt.config import BatchConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from raygpt.data.corpus import open_corpus
from raygpt.data.hashes import batch_hash, lane_hash
from raygpt.data.prepare import prepare
from raygpt.data.reader import WindowReader
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.storage import Folder
from raygpt.train.checkpoints import Position
from raygpt.train.job import resolve
from raygpt.train.progress import RunLog, StepRecord
from raygpt.train.state import save

T, LANES, STEPS = 64, 2, 30
Windows = dict[tuple[int, int], np.ndarray]


# Fixtures; a test file imports them under their own names: ``from audited import run as run``.
@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of about 9 chunks; no two windows are alike."""
    folder = tmp_path_factory.mktemp("audit")
    chance = random.Random(1)
    for number in range(5):
        texts = ("".join(chance.choices("abcdefgh ", k=500)) for _ in range(40))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    prepare(
        [str(folder / "*.jsonl")], str(folder / "corpus"), "bytes",
        val_fraction=0.05, fragment_bytes=10_000, on_ray=False,
    )  # fmt: skip
    assert len(open_corpus(str(folder / "corpus")).shards("train")) == 5
    return folder / "corpus"


class Run:
    """A run that is played, and may be played wrongly."""

    def __init__(self, folder: Path, corpus: Path, **batch: Any) -> None:
        self.corpus = folder / "corpus"
        shutil.copytree(corpus, self.corpus)
        steps = batch.pop("steps", STEPS)
        settings: dict[str, Any] = {"tokens": LANES * T * 4, "lanes": LANES, "micro": 2, **batch}
        self.job = resolve(
            Config(
                run=RunConfig(name="run", storage=str(folder)),
                data=DataConfig(corpus=str(self.corpus), seed=7),
                model=ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=T, vocab_size=320),
                batch=BatchConfig(**settings),
                train=TrainConfig(steps=steps, eval_tokens=T),
            )
        )
        self.steps, self.lanes = steps, self.job.plan.lanes
        self.path = folder / "run"
        self.folder = Folder.from_path(str(self.path))
        self.reader = WindowReader(self.job.plan)
        self.folder.write_bytes("config.json", json.dumps(self.job.settings()).encode())

    def windows(self, step: int, lane: int) -> np.ndarray:
        return self.reader.read(lane, step, step + 1)

    def play(self, wrong: Windows | None = None, first: int = 0, stop: int | None = None) -> None:
        """One start of the run, from its first step to the last, and a checkpoint at the end."""
        log = RunLog(self.folder, first)
        for step in range(first, self.steps if stop is None else stop):
            used = [
                (wrong or {}).get((step, lane), self.windows(step, lane))
                for lane in range(self.lanes)
            ]
            log.step(self.record(step, [lane_hash(windows) for windows in used]), board=False)
        log.close()

    def record(self, step: int, hashes: list[str]) -> StepRecord:
        metrics = {
            "step": step,
            "tokens": self.job.schedule.tokens_before(step + 1),
            "epoch": self.reader.epoch(step),
            "batch_hash": batch_hash(hashes),
            "skipped": 0,
        }
        return StepRecord(metrics, {"step": step, "world_size": 1, "lanes": hashes})

    def save(self, step: int | None = None, rescued: Sequence[int] = ()) -> None:
        step = self.steps if step is None else step
        torch.manual_seed(0)
        model = GPT(self.job.config.model, self.job.n_vocab)
        optimizer = build_optimizer(model, self.job.config.optim)
        position = Position(step=step, tokens=self.job.schedule.tokens_before(step))
        metadata = self.job.metadata()
        if rescued:
            hashes = {
                s: [lane_hash(self.windows(s, k)) for k in range(self.lanes)] for s in rescued
            }
            metadata["steps"] = [asdict(self.record(s, hashes[s])) for s in rescued]
        save(self.folder, position, model, optimizer, metadata)

    def shorten(self, steps: int) -> None:
        """Submit it again with an earlier end."""
        settings = json.loads(self.folder.read_bytes("config.json"))
        settings["train"]["steps"] = steps
        self.folder.write_bytes("config.json", json.dumps(settings).encode())

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    def rewrite(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def audit(self) -> Report:
        return audit(str(self.path), say=lambda _: None)

    def wrong(self) -> list[str]:
        """What the audit finds wrong, in its order."""
        report = self.audit()
        lines = [line for line in report.lines() if line.startswith("wrong: ")]
        assert report.ok == (not lines)
        return [line.removeprefix("wrong: ") for line in lines]

    def text(self, step: int, lane: int, first: int = 0, stop: int | None = None) -> str:
        """Some windows of a batch, as the audit calls them."""
        before = self.reader.schedule.windows_before
        spans = self.reader.order.spans(lane, before(step), before(step + 1))
        flat = [(chunk, int(window)) for chunk, windows in spans for window in windows]
        chunks = self.reader._corpus.chunks("train")
        parts: dict[int, list[int]] = {}
        for chunk, window in flat[first:stop]:
            parts.setdefault(chunk, []).append(window)
        return ", ".join(
            f"window{'s' if len(windows) > 1 else ''} {ranges(windows)} of chunk "
            f"{chunks[chunk].row_group} of shard {chunks[chunk].shard}"
            for chunk, windows in parts.items()
        )


@pytest.fixture
def run(tmp_path: Path, corpus_path: Path) -> Run:
    return Run(tmp_path, corpus_path)
