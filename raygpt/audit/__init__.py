"""The audit of a run: was every window used that should have been, once, in its step and lane?

The batch of a step follows from corpus, seed and settings; the run wrote down the hash of what
each lane used.  The audit computes the first again (``replay.py``), reads the second
(``record.py``), and names what was used instead where they differ (``explain.py``).  It imports
neither torch nor Ray.  What it gives up: proof against whoever rewrites all files of a run and
knows how; hashes of 64 bits; whether the weights are what these batches make of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raygpt.audit.explain import MAX_SEARCHES, Explainer
from raygpt.audit.record import KINDS, LEDGER, METRICS, Findings, Record, file_damage, read_record
from raygpt.audit.replay import Replay
from raygpt.audit.words import steps
from raygpt.config import EMBEDDED_CORPUS
from raygpt.data.corpus import SPLITS, Corpus, Shard, Split, open_corpus
from raygpt.data.hashes import batch_hash
from raygpt.data.reader import ReadPlan
from raygpt.errors import UserError
from raygpt.storage import Folder

MAX_LINES = 10
"""Lines of one kind of finding; the others are counted."""


@dataclass(frozen=True)
class Report:
    """What an audit found."""

    run: str
    corpus: str
    steps: int
    finished: bool
    tokens: int
    epochs: float
    findings: Findings

    @property
    def ok(self) -> bool:
        return not self.findings.faults

    def lines(self) -> list[str]:
        """What to print: findings, the most telling first, notes and the verdict."""
        state = "finished" if self.finished else "not finished"
        lines = [f"{self.run}: {self.steps:,} steps, {state}; corpus {self.corpus}"]
        for kind in KINDS:
            found = self.findings.faults.get(kind, [])
            lines += [f"wrong: {text}" for text in found[:MAX_LINES]]
            if len(found) > MAX_LINES:
                lines.append(f"wrong: {len(found) - MAX_LINES:,} more like the last line")
        lines += [f"note: {text}" for text in self.findings.notes]
        if self.ok:
            counted = f"{self.tokens:,} tokens, each once"
            lines.append(f"{counted}; {self.epochs:.2f} epochs, each window once an epoch")
        else:
            count = sum(map(len, self.findings.faults.values()))
            lines.append(f"{count:,} finding{'s' if count > 1 else ''}; this run is not proven")
        return lines


def audit(run: str, corpus: str | None = None, say: Callable[[str], None] = print) -> Report:
    """Hold what a run used against what it must have used.

    Args:
        run: the run's folder, local path or URI.
        corpus: where its corpus is now; by default where it was.
        say: told of progress, seldom.

    Raises:
        UserError: the run or its corpus is not there, or cannot be read at all.
    """
    findings = Findings()
    record = read_record(run, findings)
    opened = _open_corpus(record, corpus)
    changed = _check_fingerprint(record, opened, findings)
    replay = Replay(ReadPlan.from_config(record.config, opened), opened)
    _check_files(replay, findings, say)
    n_steps = max([record.done, *(row.step + 1 for row in record.attempts())])
    expected, known, coverage = replay.lane_hashes(n_steps, say)
    position = replay.schedule.windows_before(n_steps)
    left = min(replay.order.epoch(lane, position) for lane in range(replay.plan.lanes))
    findings.add("order", *coverage.problems(left))
    _check_batches(record, replay, expected, known, changed, findings)
    _check_redone(record, expected, known, findings)
    _check_metrics(record, replay, expected, known, findings)
    tokens = replay.schedule.tokens_before(record.done)
    return Report(
        run=record.folder.uri,
        corpus=f"{opened.path} ({opened.fingerprint[:12]})",
        steps=record.done,
        finished=record.finished,
        tokens=tokens,
        epochs=tokens / (replay.order.epoch_windows * replay.plan.block_size),
        findings=findings,
    )


def _open_corpus(record: Record, path: str | None) -> Corpus:
    place = path or (record.saved[-1].corpus if record.saved else record.config.data.corpus)
    if place == EMBEDDED_CORPUS:
        raise UserError(
            f"{record.folder} has no checkpoint, so it is unknown where the embedded text was "
            "prepared; give --corpus"
        )
    try:
        return open_corpus(place)
    except UserError as error:
        hint = "" if path else "; if the corpus was moved, give --corpus with its place"
        raise UserError(f"{error}{hint}") from error


def _check_fingerprint(record: Record, corpus: Corpus, findings: Findings) -> bool:
    """Whether the corpus is another than at some checkpoint."""
    if not record.saved:
        findings.notes.append("no checkpoint yet, so the corpus's fingerprint cannot be compared")
    others = [saved for saved in record.saved if saved.fingerprint != corpus.fingerprint]
    for saved in others[-1:]:
        findings.add(
            "corpus",
            f"corpus {corpus.path} is not the one of the run: its manifest gives fingerprint "
            f"{corpus.fingerprint[:12]}, {saved.name} has {saved.fingerprint[:12]}",
        )
    return bool(others)


def _check_files(replay: Replay, findings: Findings, say: Callable[[str], None]) -> None:
    """Every shard of both splits: its bytes, and each of its row groups."""
    corpus, folder = replay.corpus, Folder.from_path(replay.corpus.path)
    size = sum(shard.size for split in SPLITS for shard in corpus.shards(split))
    if size > 2**30:
        say(f"checking {size / 2**30:.1f} GiB of shards")
    for split in SPLITS:
        first = 0
        for shard in corpus.shards(split):
            problem = file_damage(folder, shard.name, shard.size, shard.sha256)
            if problem:
                damaged = _damaged_chunks(replay, split, shard, first)
                where = folder.child(shard.name)
                if problem == "is missing":
                    damaged = damaged[:1]
                elif not damaged:
                    problem += "; all its row groups are right"
                findings.add("corpus", f"{where} {problem}", *damaged)
            else:
                findings.add("corpus", *_damaged_chunks(replay, split, shard, first))
            first += len(shard.chunks)


def _damaged_chunks(replay: Replay, split: Split, shard: Shard, first: int) -> list[str]:
    found = []
    for index in range(first, first + len(shard.chunks)):
        if split == "train":
            if replay.tokens(index) is None:
                found.append(replay.damaged[index])
            continue
        try:
            replay.corpus.read_chunk(split, index)
        except UserError as error:
            found.append(str(error))
    return found


def _check_batches(
    record: Record,
    replay: Replay,
    expected: np.ndarray,
    known: np.ndarray,
    changed: bool,
    findings: Findings,
) -> None:
    """The lanes of every step that counts, as the ledger has them."""
    right = np.zeros_like(known)
    wrong: dict[tuple[int, int], int] = {}
    unknown: set[int] = set()
    for step, row in record.ledger.items():
        for lane, value in enumerate(int(text, 16) for text in row.lanes):
            if not known[step, lane]:
                unknown.add(step)
            elif value == int(expected[step, lane]):
                right[step, lane] = True
            else:
                wrong[step, lane] = value
    explainer = Explainer(replay, expected, wrong, right, changed)
    findings.add("batch", *explainer.explain())
    if explainer.cut_short:
        findings.notes.append(
            f"parts of batches were looked for in the first {MAX_SEARCHES} odd lanes only"
        )
    if unknown:
        text = f"{steps(unknown)} used damaged row groups, so not every lane could be checked"
        findings.add("corpus", text)


def _check_redone(
    record: Record, expected: np.ndarray, known: np.ndarray, findings: Findings
) -> None:
    """Steps that a restart took back: the second time they must use the same."""
    same, waiting = set[int](), set[int]()
    for row in record.lost:
        again = record.ledger.get(row.step)
        lanes = again.lanes if again else tuple(f"{value:016x}" for value in expected[row.step])
        differing = [
            lane
            for lane, (first, second) in enumerate(zip(row.lanes, lanes, strict=True))
            if first != second and (again or known[row.step, lane])
        ]
        if not differing:
            (same if again else waiting).add(row.step)
            continue
        attempts = f"attempt {row.attempt}" + (f", then {again.attempt}" if again else "")
        verb = "redone with another batch" if again else "had another batch than it must"
        findings.add(
            "redone",
            f"step {row.step} was lost and {verb} ({attempts}): lanes "
            f"{', '.join(map(str, differing))} differ",
        )
    if same:
        findings.notes.append(f"{steps(same)} lost and redone with the same batches")
    if waiting:
        findings.notes.append(f"{steps(waiting)} lost and not redone yet")


def _check_metrics(
    record: Record, replay: Replay, expected: np.ndarray, known: np.ndarray, findings: Findings
) -> None:
    """Each row of metrics.jsonl: its hash is the ledger's, its tokens are the schedule's."""
    bare: dict[int, str] = {}
    for step, row in sorted(record.metrics.items()):
        due = batch_hash(f"{value:016x}" for value in expected[step])
        entry = record.ledger.get(step)
        held = due if entry is None else batch_hash(entry.lanes)
        if entry is None and known[step].all() and row["batch_hash"] != due:
            bare[step] = row["batch_hash"]
        elif entry is not None and row["batch_hash"] != held:
            right = {held: f"{LEDGER} is", row["batch_hash"]: f"{METRICS} is"}.get(
                due, "neither is"
            )
            findings.add(
                "disagree",
                f"step {step}: {METRICS} has batch_hash {row['batch_hash']}, the lanes in {LEDGER} "
                f"give {held}" + (f"; {right} right" if known[step].all() else ""),
            )
        tokens = replay.schedule.tokens_before(step + 1)
        if row["tokens"] != tokens:
            findings.add(
                "tokens",
                f"step {step}: {METRICS} has {row['tokens']:,} tokens, the schedule {tokens:,}",
            )
        epoch = replay.order.epoch(0, replay.schedule.windows_before(step))
        if row.get("epoch", epoch) != epoch:
            findings.add("tokens", f"step {step}: {METRICS} has epoch {row['epoch']}, not {epoch}")
    findings.add("batch", *_bare_steps(bare, expected))
    for saved in record.saved:
        tokens = replay.schedule.tokens_before(saved.step)
        if saved.tokens != tokens:
            findings.add("tokens", f"{saved.name} has {saved.tokens:,} tokens, not {tokens:,}")
    skipped = record.metrics[max(record.metrics)].get("skipped", 0)
    if skipped:
        findings.notes.append(f"{skipped} steps changed no weights: loss or norm was not finite")


def _bare_steps(bare: dict[int, str], expected: np.ndarray) -> list[str]:
    """Wrong steps of which there is no ledger: only a whole batch can be named."""
    if not bare:
        return []
    sources: dict[str, int] = {}
    for step, lanes in enumerate(expected):
        sources.setdefault(batch_hash(f"{value:016x}" for value in lanes), step)
    return [
        f"step {step} used the whole batch of step {sources[value]}"
        if value in sources
        else f"step {step} used unknown windows: its batch_hash is {value}"
        for step, value in bare.items()
    ]
