"""The audit: a healthy run is proven, and each fault is named by step, lane, shard and window.

A run is played: batches come from the plain reader, files are written as a worker writes them.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raygpt.audit import MAX_LINES, Report, audit
from raygpt.audit.replay import Coverage
from raygpt.audit.words import ranges
from raygpt.config import BatchConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from raygpt.data.corpus import MANIFEST, _chunk_hash, open_corpus
from raygpt.data.hashes import batch_hash, lane_hash
from raygpt.data.order import DataOrder, windows_in
from raygpt.data.prepare import prepare
from raygpt.data.reader import WindowReader, cut
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.storage import Folder
from raygpt.train.job import resolve
from raygpt.train.progress import LEDGER, METRICS, RunLog, StepRecord
from raygpt.train.state import METADATA, MODEL, Position, checkpoint_name, save

ROOT = Path(__file__).parent.parent
T, LANES, STEPS = 64, 2, 30
Windows = dict[tuple[int, int], np.ndarray]


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


# --- all is well


def test_a_ramp_over_several_epochs_is_proven(tmp_path: Path, corpus_path: Path) -> None:
    run = Run(
        tmp_path, corpus_path, steps=600, ramp_start_tokens=LANES * T, ramp_tokens=LANES * T * 200
    )
    run.play(stop=100)
    run.save(90)
    run.play(first=90)
    run.save()
    report = run.audit()
    tokens = run.job.schedule.tokens_before(600)
    epochs = tokens / (run.job.epoch_windows * T)
    assert epochs > 2.5
    head, note, verdict = report.lines()
    assert head.startswith(f"{run.path}: 600 steps, finished; corpus {run.corpus} (")
    assert note == "note: steps 90 to 99 lost and redone with the same batches"
    assert verdict == (
        f"{tokens:,} tokens, each once; {epochs:.2f} epochs, each window once an epoch"
    )
    assert report.ok and "," in verdict.split(";")[0]


def test_an_unfinished_run_is_proven_so_far(run: Run) -> None:
    """Without a checkpoint, with a line cut off and a step that the ledger alone has."""
    run.play(stop=11)
    rows = run.rows(METRICS)
    run.rewrite(METRICS, rows[:10])
    with open(run.path / METRICS, "a") as file:
        file.write('{"step": 10, "tok')
    lines = run.audit().lines()
    assert f": 10 steps, not finished; corpus {run.corpus}" in lines[0]
    assert lines[1:-1] == [
        f"note: the last line of {METRICS} was cut off; it was left out",
        f"note: step 10 in {LEDGER} only: the run ended before it was done",
        "note: no checkpoint yet, so the corpus's fingerprint cannot be compared",
    ]
    assert lines[-1].startswith("5,120 tokens, each once; ")


def test_a_corpus_that_moved(run: Run, tmp_path: Path) -> None:
    run.play()
    run.save()
    moved = run.corpus.rename(tmp_path / "moved")
    status, _, err = job("audit", run.path)
    assert status == 2 and "does not exist" in err and err.count("\n") == 1
    assert "if the corpus was moved, give --corpus" in err
    status, out, err = job("audit", run.path, "--corpus", moved)
    assert (status, err) == (0, "") and "15,360 tokens, each once;" in out


def test_neither_torch_nor_ray_is_needed() -> None:
    code = "import sys, raygpt.audit; print({'torch', 'ray', 'tensorboardX'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- other windows than those that were due


def test_a_batch_used_twice(run: Run) -> None:
    run.play({(17, 1): run.windows(16, 1)})
    run.save()
    assert run.wrong() == [
        f"step 17, lane 1 used the windows of step 16 again: {run.text(16, 1)} used twice, "
        f"those of step 17 never ({run.text(17, 1)})"
    ]


def test_a_stream_one_step_behind(run: Run) -> None:
    """All lanes, from step 20 to the end: one batch twice, the last one never."""
    late = {(s, lane): run.windows(s - 1, lane) for s in range(20, 30) for lane in range(LANES)}
    run.play(late)
    run.save()
    (line,) = run.wrong()
    assert line.startswith(
        "steps 20 to 29, all lanes used the windows of steps 19 to 28 again: "
        f"{run.text(19, 0)}, {run.text(19, 1)} used twice, those of step 29 never "
    )


def test_a_skipped_batch(run: Run) -> None:
    """Lane 0 is a step ahead from step 25 on: its last batch is one that was not due yet."""
    run.play({(s, 0): run.windows(s + 1, 0) for s in range(25, 30)})
    run.save()
    assert run.wrong() == [
        "steps 25 to 29, lane 0 used the windows of steps 26 to 30: "
        f"those of step 25 never ({run.text(25, 0)})"
    ]


def test_lanes_swapped(tmp_path: Path, corpus_path: Path) -> None:
    """Two of four, for two steps."""
    run = Run(tmp_path, corpus_path, steps=15, tokens=4 * T * 4, lanes=4)
    swapped = {(s, a): run.windows(s, b) for s in (5, 6) for a, b in ((1, 3), (3, 1))}
    run.play(swapped)
    run.save()
    assert run.wrong() == [
        "steps 5, 6, lanes 1, 3 used each other's windows: each window once, but not in its place"
    ]


def test_lanes_in_a_ring(tmp_path: Path, corpus_path: Path) -> None:
    run = Run(tmp_path, corpus_path, steps=15, tokens=4 * T * 4, lanes=4)
    run.play({(5, a): run.windows(5, b) for a, b in ((0, 1), (1, 2), (2, 0))})
    run.save()
    assert run.wrong() == [
        "step 5, lanes 0 to 2 used the windows of lanes 1, 2, 0: each window once, but not in its "
        "place"
    ]


def test_a_lane_in_the_place_of_another(run: Run) -> None:
    run.play({(5, 0): run.windows(8, 1)})
    run.save()
    assert run.wrong() == [
        f"step 5, lane 0 used the windows of step 8, lane 1: {run.text(8, 1)} used twice, "
        f"those of step 5 never ({run.text(5, 0)})"
    ]


def test_a_cut_batch(run: Run) -> None:
    run.play({(29, 1): run.windows(29, 1)[:3]})
    run.save()
    assert run.wrong() == [
        "step 29, lane 1 used only the first 3 of 4 windows: those of step 29 never "
        f"({run.text(29, 1, 3)})"
    ]


def test_a_window_left_out(run: Run) -> None:
    """What follows moves up by one, until the end."""
    sequence = np.delete(run.reader.read(0, 10, 31), 2, axis=0)
    run.play({(10 + i, 0): sequence[4 * i : 4 * i + 4] for i in range(20)})
    run.save()
    assert run.wrong() == [
        "step 10, lane 0 left out a window and used the next step's first: "
        f"those of step 10 never ({run.text(10, 0, 2, 3)})",
        "steps 11 to 29, lane 0 used windows 1 window ahead of their place: "
        "each window once, but not in its place",
    ]


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([0, 1, 1, 2], "used a window twice and left out the last: {1} used twice, {3} never"),
        ([0, 1, 0, 3], "used a window of the batch in the place of another: {0} used twice, "
                       "{2} never"),
        ([3, 2, 1, 0], "used the right windows in another order: each window once, but not in "
                       "its place"),
        ([2, 1, 0, 3], "used the right windows in another order: each window once, but not in "
                       "its place"),
    ],
)  # fmt: skip
def test_a_batch_in_disorder(run: Run, indices: list[int], told: str) -> None:
    run.play({(12, 1): run.windows(12, 1)[indices]})
    run.save()
    places = [run.text(12, 1, index, index + 1) for index in range(4)]
    told = told.replace("{2} never", "those of step 12 never ({2})")
    told = told.replace("{3} never", "those of step 12 never ({3})")
    assert run.wrong() == [f"step 12, lane 1 {told.format(*places)}"]


def test_a_changed_window(run: Run) -> None:
    changed = run.windows(9, 0).copy()
    changed[2, 5] += 1
    run.play({(9, 0): changed})
    run.save()
    (line,) = run.wrong()
    assert line == f"step 9, lane 0 used unknown windows instead of {run.text(9, 0)}"


def test_the_search_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beyond is unknown, and it is said that it was not looked for."""
    monkeypatch.setattr("raygpt.audit.explain.MAX_SEARCHES", 2)
    changed = {(s, 0): run.windows(s, 0)[:2] for s in (8, 10, 12)}
    run.play(changed)
    run.save()
    report = run.audit()
    assert ["used only the first 2 of 4" in line for line in run.wrong()] == [True, True, False]
    assert run.wrong()[2] == f"step 12, lane 0 used unknown windows instead of {run.text(12, 0)}"
    (note,) = report.findings.notes
    assert note.startswith("parts of batches were looked for in the first ")


def shard_without(run: Run) -> tuple[str, list[int]]:
    """A shard of the training split, and the chunks of all others."""
    corpus = run.reader._corpus
    shard = corpus.shards("train")[2].name
    return shard, [i for i, c in enumerate(corpus.chunks("train")) if c.shard != shard]


@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("numbered", [True, False])
def test_an_order_without_a_shard(run: Run, first: int, numbered: bool) -> None:
    """The order of a corpus that lacks a shard, its chunks numbered anew or not."""
    shard, kept = shard_without(run)
    corpus = run.reader._corpus
    sizes = [windows_in(chunk.tokens, T) for chunk in corpus.chunks("train")]
    some = [sizes[i] if i in kept else 0 for i in range(len(sizes))]
    order = DataOrder([sizes[i] for i in kept] if numbered else some, LANES, run.job.plan.seed)
    names = kept if numbered else list(range(len(sizes)))

    def windows(step: int, lane: int) -> np.ndarray:
        spans = order.spans(lane, 4 * step, 4 * step + 4)
        return np.concatenate(
            [cut(corpus.read_chunk("train", names[chunk]), found, T) for chunk, found in spans]
        )

    run.play({(s, lane): windows(s, lane) for s in range(first, 30) for lane in range(LANES)})
    run.save()
    (line,) = run.wrong()
    count = sum(sizes) - sum(sizes[i] for i in kept)
    assert line == (
        f"from step {first} on lanes follow an order without shard {shard}: its {count} windows "
        f"were skipped (steps {first} to 29)"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_sequence_without_a_shard_or_a_chunk(
    tmp_path: Path, corpus_path: Path, whole: bool
) -> None:
    """The order is the run's, but a shard, or one chunk, is passed over."""
    run = Run(tmp_path, corpus_path, steps=100)
    corpus = run.reader._corpus
    chunks = corpus.chunks("train")
    shard, kept = shard_without(run)
    gone = [i for i in range(len(chunks)) if i not in kept]
    if not whole:
        gone = gone[:1]
    wrong: Windows = {}
    firsts: dict[int, int] = {}
    for lane in range(LANES):
        windows: list[np.ndarray] = []
        for chunk, found in run.reader.order.spans(lane, 0, 600):
            if chunk in gone:
                continue
            windows += list(cut(corpus.read_chunk("train", chunk), found, T))
        for step in range(100):
            used = np.stack(windows[4 * step : 4 * step + 4])
            if not np.array_equal(used, run.windows(step, lane)):
                wrong[step, lane] = used
                firsts.setdefault(lane, step)
    assert len(firsts) == 2 if whole else len(firsts) == 1
    run.play(wrong)
    run.save()
    (line,) = run.wrong()
    lanes = "all lanes" if whole else f"lane {min(firsts)}"
    name = f"shard {shard}" if whole else f"chunk 0 of shard {shard}"
    start = min(firsts.values())
    assert line.startswith(f"from step {start} on {lanes} went on without {name}: ")
    assert " never (" in line and f"of shard {shard}" in line.partition(" never (")[2]
    assert "used twice" not in line


# --- data that changed since


def flip(path: Path) -> None:
    """Change a byte in the midst of a shard's data."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def test_an_edited_shard(run: Run) -> None:
    """Bytes changed in place, in two files; what does not use them is checked all the same."""
    run.play()
    run.save()
    shards = run.reader._corpus.shards("train")
    for shard in shards[1], shards[3]:
        flip(run.corpus / shard.name)
    used = {
        (step, chunks[chunk].shard, chunks[chunk].row_group)
        for chunks in [run.reader._corpus.chunks("train")]
        for step in range(STEPS)
        for lane in range(LANES)
        for chunk, _ in run.reader.order.spans(lane, 4 * step, 4 * step + 4)
    }
    lines = run.wrong()
    damaged = set()
    for shard in shards[1], shards[3]:
        where = run.corpus / shard.name
        at = lines.index(f"{where} was changed: its sha256 does not match")
        assert str(where) in lines[at + 1] and ", row group " in lines[at + 1]
        group = int(lines[at + 1].split(", row group ")[1].split()[0].rstrip(":"))
        damaged.add((shard.name, group))
    steps = {step for step, shard, group in used if (shard, group) in damaged}
    assert steps and len(lines) == 5
    assert lines[4].startswith(f"step{'s' if len(steps) > 1 else ''} {ranges(steps)} used damaged")


def test_a_missing_shard(run: Run) -> None:
    run.play()
    run.save()
    shard = run.corpus / run.reader._corpus.shards("train")[1].name
    shard.unlink()
    lines = run.wrong()
    assert lines[0] == f"{shard} is missing"
    assert lines[1].startswith(f"cannot read {shard}, row group 0: ")
    assert len(lines) == 3 and "used damaged row groups" in lines[2]


def test_an_edited_file_with_right_row_groups(run: Run) -> None:
    """The same tokens, written by another hand."""
    run.play()
    run.save()
    path = run.corpus / run.reader._corpus.shards("val")[0].name
    table = pq.read_table(path)
    pq.write_table(table, path, row_group_size=2049)
    size = run.reader._corpus.shards("val")[0].size
    (line,) = run.wrong()
    assert line == (
        f"{path} was changed: it has {path.stat().st_size:,} bytes instead of {size:,}; "
        "all its row groups are right"
    )


def edit_consistently(corpus: Path, shard_name: str, row_group: int) -> None:
    """Change a token and put the manifest right."""
    manifest = json.loads((corpus / MANIFEST).read_text())
    (shard,) = (s for s in manifest["splits"]["train"]["shards"] if s["name"] == shard_name)
    path = corpus / shard_name
    file = pq.ParquetFile(path)
    groups = [
        file.read_row_group(i).column(0).to_numpy().copy() for i in range(file.num_row_groups)
    ]
    groups[row_group][:] = groups[row_group][::-1]
    schema = file.schema_arrow
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(pa.table([group], schema=schema), row_group_size=len(group))
    data = path.read_bytes()

    shard |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shard["chunks"][row_group]["sha256"] = _chunk_hash(groups[row_group])
    (corpus / MANIFEST).write_text(json.dumps(manifest))


def test_a_shard_edited_together_with_its_manifest(run: Run) -> None:
    run.play()
    run.save()
    corpus = run.reader._corpus
    chunk, _ = run.reader.order.spans(1, 4 * 14, 4 * 14 + 4)[0]
    edited = corpus.chunks("train")[chunk]
    used = {
        step
        for step in range(STEPS)
        for lane in range(LANES)
        for found, _ in run.reader.order.spans(lane, 4 * step, 4 * step + 4)
        if found == chunk
    }
    edit_consistently(run.corpus, edited.shard, edited.row_group)
    now = open_corpus(str(run.corpus)).fingerprint
    assert run.wrong() == [
        f"corpus {run.corpus} is not the one of the run: its manifest gives fingerprint "
        f"{now[:12]}, {checkpoint_name(STEPS)} has {corpus.fingerprint[:12]}",
        f"chunk {edited.row_group} of shard {edited.shard} was changed since: steps "
        f"{ranges(used)} used other tokens of it",
    ]


# --- steps lost, missing, twice


def test_a_step_redone_with_another_batch(run: Run) -> None:
    run.play(stop=12)
    run.save(9)
    run.play({(10, 1): run.windows(13, 1)}, first=9)
    run.save()
    report = run.audit()
    assert report.findings.notes == ["steps 9, 11 lost and redone with the same batches"]
    assert run.wrong() == [
        f"step 10, lane 1 used the windows of step 13: {run.text(13, 1)} used twice, "
        f"those of step 10 never ({run.text(10, 1)})",
        "step 10 was lost and redone with another batch (attempt 0, then 1): lanes 1 differ",
    ]


def test_a_wrong_batch_that_was_lost(run: Run) -> None:
    """It left no trace in the weights, but it was no reproduction."""
    run.play({(10, 0): run.windows(3, 0)}, stop=12)
    run.save(9)
    run.play(first=9)
    run.save()
    assert run.wrong() == [
        "step 10 was lost and redone with another batch (attempt 0, then 1): lanes 0 differ"
    ]


def test_steps_lost_and_not_redone_yet(run: Run) -> None:
    run.play(stop=12)
    run.save(8)
    run.play(first=8, stop=9)
    report = run.audit()
    assert report.ok and report.findings.notes == [
        "step 8 lost and redone with the same batches",
        "steps 9 to 11 lost and not redone yet",
    ]


def test_the_last_steps_are_missing(run: Run) -> None:
    """The run says that it is finished."""
    run.play(stop=27)
    run.save()
    assert run.wrong() == [
        f"the last steps 27 to 29 missing in {METRICS}; {checkpoint_name(30)} says that they "
        "were done",
        f"steps 27 to 29 missing in {LEDGER}",
    ]


def test_rescued_steps(run: Run) -> None:
    """A checkpoint of survivors has the lines that rank 0 could not write any more."""
    run.play(stop=12)
    run.save(14, rescued=[11, 12, 13])
    report = run.audit()
    assert report.ok and report.steps == 14
    assert report.findings.notes == [
        f"steps 12, 13 so far in {checkpoint_name(14)} only, which rescued them"
    ]
    run.save(15, rescued=[13, 14])
    assert run.wrong() == [f"step 12 missing in {METRICS}", f"step 12 missing in {LEDGER}"]


def test_a_damaged_checkpoint_claims_nothing(run: Run) -> None:
    run.play(stop=27)
    run.save()
    weights = run.path / checkpoint_name(30) / MODEL
    weights.write_bytes(weights.read_bytes()[:-1])
    report = run.audit()
    assert report.ok and report.steps == 27
    (note,) = report.findings.notes
    assert note.startswith(f"{weights} was changed: it has ")


Edit = Callable[[list[dict[str, Any]]], Any]


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        (METRICS, lambda rows: rows.pop(7), [f"step 7 missing in {METRICS}"]),
        (METRICS, lambda rows: rows.insert(9, rows[7]), [f"step 7 stands twice in {METRICS}"]),
        (METRICS, lambda rows: rows[7].update(tokens=5), [
            f"step 7: {METRICS} has 5 tokens, the schedule 4,096"]),
        (METRICS, lambda rows: rows[7].update(epoch=3), [f"step 7: {METRICS} has epoch 3, not 0"]),
        (METRICS, lambda rows: rows[7].update(batch_hash="0123456789abcdef"), [
            f"step 7: {METRICS} has batch_hash 0123456789abcdef, the lanes in {LEDGER} give ",
            f"; {LEDGER} is right"]),
        (METRICS, lambda rows: rows[7].update(batch_hash=1), [
            f"line 8 of {METRICS} is no entry of a step"]),
        (METRICS, lambda rows: rows[7].update(step=10**12), [
            f"line 8 of {METRICS} is of step {10**12}; the run has 30"]),
        (LEDGER, lambda rows: rows.pop(7), [f"step 7 missing in {LEDGER}"]),
        (LEDGER, lambda rows: rows[7].update(lanes=rows[7]["lanes"][:1]), [
            f"line 8 of {LEDGER} is no entry of a step"]),
        (LEDGER, lambda rows: rows[7].update(lanes=["0" * 16, rows[7]["lanes"][1]]), [
            "step 7, lane 0 used unknown windows instead of ", f"; {METRICS} is right"]),
    ],
)  # fmt: skip
def test_an_edited_file(run: Run, name: str, edit: Edit, told: list[str]) -> None:
    run.play()
    run.save()
    rows = run.rows(name)
    edit(rows)
    run.rewrite(name, rows)
    lines = run.wrong()
    assert all(text in "\n".join(lines) for text in told), lines
    assert len(lines) <= 2 and all("step 7" in line or "line 8" in line for line in lines)


def test_without_a_ledger_steps_are_checked_as_a_whole(run: Run) -> None:
    again = {(17, lane): run.windows(16, lane) for lane in range(LANES)}
    run.play(again)
    run.save()
    (run.path / LEDGER).unlink()
    assert run.wrong() == [
        "step 17 used the whole batch of step 16",
        f"{LEDGER} is missing: lanes and lost steps cannot be checked",
    ]


def test_settings_that_were_edited(run: Run) -> None:
    """The checkpoint's are believed."""
    run.play()
    run.save()
    settings = run.job.settings()
    settings["data"]["seed"] = 8
    (run.path / "config.json").write_text(json.dumps(settings))
    assert run.wrong() == [f"config.json says data.seed 8, {checkpoint_name(30)} 7"]


def test_a_checkpoints_tokens(run: Run) -> None:
    run.play()
    run.save()
    path = run.path / checkpoint_name(30) / METADATA
    path.write_text(path.read_text().replace('"tokens": 15360', '"tokens": 15872'))
    assert run.wrong() == [f"{checkpoint_name(30)} has 15,872 tokens, not 15,360"]


def test_many_findings_of_a_kind_are_counted(run: Run) -> None:
    run.play()
    run.save()
    rows = run.rows(METRICS)
    run.rewrite(METRICS, [row | {"tokens": 1} for row in rows])
    report = run.audit()
    assert len(report.findings.faults["tokens"]) == STEPS
    assert len(run.wrong()) == MAX_LINES + 1
    assert report.lines()[-2] == "wrong: 20 more like the last line"
    assert report.lines()[-1] == "30 findings; this run is not proven"


def test_coverage_counts_windows() -> None:
    """The order is not believed."""
    coverage = Coverage([3, 2])
    coverage.add(0, 0, np.array([0, 2, 1]))
    coverage.add(0, 1, np.array([1]))
    assert coverage.problems(0) == []
    (never,) = coverage.problems(1)
    assert "uses 1 windows never, the first of them number 0 of chunk 1" in never
    coverage.add(0, 1, np.array([1]))
    (twice,) = coverage.problems(0)
    assert "uses 1 windows more than once, the first of them number 1 of chunk 1" in twice


def test_an_order_that_repeats_a_window_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reader and audit agree, and both are wrong."""
    before = DataOrder._permute_windows
    monkeypatch.setattr(
        DataOrder,
        "_permute_windows",
        lambda order, epoch, chunk: np.maximum(before(order, epoch, chunk), 1),
    )
    run.reader = WindowReader(run.job.plan)
    run.play()
    run.save()
    assert any("the order of epoch 0 uses" in line for line in run.wrong())


# --- the job


def job(name: str, *arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_status_and_output(run: Run) -> None:
    run.play({(17, 1): run.windows(16, 1)})
    run.save()
    status, out, err = job("audit", run.path)
    assert (status, err) == (1, "")
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == [
        "wrong",
        "1 finding; this run is not proven",
    ]


def test_mistakes(run: Run, tmp_path: Path) -> None:
    run.play()
    (tmp_path / "empty").mkdir()
    for place, told in (
        (tmp_path / "none", "no run in "),
        (tmp_path / "empty", f"empty has no {METRICS}"),
    ):
        status, out, err = job("audit", place)
        assert (status, out) == (2, "") and told in err and err.count("\n") == 1
    (run.path / "config.json").write_text("{")
    status, out, err = job("audit", run.path)
    assert status == 2 and "config.json is damaged: it is not JSON" in err
    (run.path / "config.json").unlink()
    status, out, err = job("audit", run.path)
    assert status == 2 and "its settings are unknown" in err
