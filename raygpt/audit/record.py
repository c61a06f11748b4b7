"""What a run's folder says of itself, read for an audit: settings, metrics, ledger, checkpoints.

Nothing is taken on trust: a line that is no entry, a step that the run cannot have, a step that
is missing or stands twice is a finding, and reading goes on.  Neither torch nor Ray is imported,
so a run can be audited where it cannot be trained.  What it gives up: the weights; a checkpoint's
files are looked at only where it claims steps that metrics.jsonl has not.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from raygpt.audit.words import steps
from raygpt.config import Config
from raygpt.errors import UserError
from raygpt.storage import Folder, reason_of
from raygpt.values import from_dict

CONFIG, METRICS, LEDGER = "config.json", "metrics.jsonl", "ledger.jsonl"
_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_METADATA = "checkpoint.json"
_HASH = re.compile(r"[0-9a-f]{16}")
_READ_BYTES = 2**20
_ORDER_SETTINGS = (
    *("data.seed", "model.block_size", "batch.tokens", "batch.lanes"),
    *("batch.ramp_start_tokens", "batch.ramp_tokens"),
)
"""All that the batches depend on, beside the corpus."""

Kind = Literal[
    "corpus", "settings", "order", "batch", "redone", "missing", "twice", "disagree", "tokens",
    "lines",
]  # fmt: skip
"""Kinds of findings, the most telling first."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Row = dict[str, Any]


@dataclass
class Findings:
    """What is wrong, by kind, and what is merely worth knowing."""

    faults: dict[Kind, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: Kind, *texts: str) -> None:
        if texts:
            self.faults.setdefault(kind, []).extend(texts)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's metadata says; ``step`` steps were done when it was written."""

    folder: Folder
    step: int
    tokens: int
    settings: dict[str, Any]
    corpus: str
    fingerprint: str
    files: dict[str, dict[str, Any]]
    steps: list[dict[str, Row]]
    """Lines of metrics and ledger that rank 0 may not have written, where it died before."""

    @property
    def name(self) -> str:
        return self.folder.split()[1]


@dataclass(frozen=True)
class LedgerRow:
    """What a step was trained on, in one attempt."""

    step: int
    attempt: int
    lanes: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """What a run's folder holds, sorted out."""

    folder: Folder
    config: Config
    saved: list[Saved]
    """Readable checkpoints, by step."""
    done: int
    """Finished steps: those that a checkpoint or metrics.jsonl has."""
    metrics: dict[int, Row]
    ledger: dict[int, LedgerRow]
    """The attempt of each step that counts."""
    lost: list[LedgerRow]
    """The attempts that a restart took back."""

    def attempts(self) -> list[LedgerRow]:
        """Every row of the ledger."""
        return [*self.ledger.values(), *self.lost]

    @property
    def finished(self) -> bool:
        return self.done >= self.config.train.steps


def read_record(path: str, findings: Findings) -> Record:
    """Read a run's folder, local path or URI; what is wrong in it goes to ``findings``.

    Raises:
        UserError: it is no run's folder, no step was finished, or its settings are unreadable.
    """
    folder = Folder.from_path(path)
    if not folder.exists():
        raise UserError(f"no run in {folder}: there is no such folder; give <run.storage>/<name>")
    if not folder.exists(METRICS):
        raise UserError(
            f"{folder} has no {METRICS}: it is no run's folder, or no step of it was finished"
        )
    saved = _read_checkpoints(folder, findings)
    config = _read_config(folder, saved, findings)
    limit = max([config.train.steps, *(checkpoint.step for checkpoint in saved)])
    metrics = _by_step(_read_rows(folder, METRICS, limit, _is_metrics, findings), findings)
    if not metrics:
        raise UserError(f"{folder.child(METRICS)} has no step: there is nothing to audit")
    standing, lost = _read_ledger(folder, limit, config.batch.lanes, findings)
    done = max(metrics) + 1
    proof = _beyond(done, saved, findings)
    if proof is not None:
        done = proof.step
        _add_rescued(proof, metrics, standing, findings)
    record = Record(folder, config, saved, done, metrics, standing, lost)
    _check_steps(record, findings)
    return record


def _read_checkpoints(folder: Folder, findings: Findings) -> list[Saved]:
    found = []
    for name in folder.list():
        place = folder.child(name)
        if not _CHECKPOINT.fullmatch(name) or not place.exists(_METADATA):
            continue  # without metadata it was never finished
        try:
            value = json.loads(place.read_bytes(_METADATA))
            position, corpus = value["position"], value["corpus"]
            found.append(
                Saved(
                    folder=place,
                    step=int(position["step"]),
                    tokens=int(position["tokens"]),
                    settings=dict(value["settings"]),
                    corpus=str(corpus["path"]),
                    fingerprint=str(corpus["fingerprint"]),
                    files=dict(value["files"]),
                    steps=[
                        {"metrics": dict(entry["metrics"]), "ledger": dict(entry["ledger"])}
                        for entry in value.get("steps", [])
                    ],
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            findings.notes.append(
                f"{place.child(_METADATA)} is damaged ({type(error).__name__}: {error}); "
                "it was left out"
            )
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _read_config(folder: Folder, saved: list[Saved], findings: Findings) -> Config:
    """The settings; where config.json and a checkpoint differ, the checkpoint is believed.

    Its settings went through the check that a run must pass before it goes on.
    """
    values, source = _read_settings(folder), folder.child(CONFIG)
    if values is None and saved:
        values, source = saved[-1].settings, saved[-1].folder.child(_METADATA)
        findings.notes.append(f"there is no {CONFIG}; the settings are those of {saved[-1].name}")
    if values is None:
        raise UserError(f"{folder} has neither {CONFIG} nor a checkpoint: its settings are unknown")
    try:
        config = from_dict(values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for checkpoint in saved[-1:]:
        try:
            believed = from_dict(checkpoint.settings)
        except UserError as error:
            raise UserError(f"{checkpoint.folder.child(_METADATA)}: {error}") from error
        for name in _ORDER_SETTINGS:
            here, there = _setting(config, name), _setting(believed, name)
            if here != there:
                findings.add("settings", f"{CONFIG} says {name} {here}, {checkpoint.name} {there}")
                config = believed
    return config


def _read_settings(folder: Folder) -> dict[str, Any] | None:
    try:
        values = json.loads(folder.read_bytes(CONFIG))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder.child(CONFIG)} is damaged: it is not JSON ({error})") from error
    return values  # of any type: from_dict says so


def _setting(config: Config, name: str) -> Any:
    section, _, field_name = name.partition(".")
    return getattr(getattr(config, section), field_name)


def _read_rows(
    folder: Folder, name: str, limit: int | None, valid: Callable[[Row], bool], findings: Findings
) -> list[Row]:
    """The objects of a file of JSON lines that are entries of a step, below a limit or any."""
    data = folder.read_bytes(name)
    *lines, rest = data.split(b"\n")
    if rest:
        findings.notes.append(f"the last line of {name} was cut off; it was left out")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("step"), int) and valid(row)):
                raise ValueError
        except (ValueError, RecursionError):
            findings.add("lines", f"line {number} of {name} is no entry of a step")
            continue
        if row["step"] >= 0 and (limit is None or row["step"] < limit):
            rows.append(row)
        else:
            where = f"line {number} of {name}"
            findings.add("lines", _no_step_of_the_run(where, row["step"], limit))
    return rows


def _no_step_of_the_run(where: str, step: int, limit: int | None) -> str:
    return f"{where} is of step {step}" + (f"; the run has {limit:,}" if limit is not None else "")


def _is_metrics(row: Row) -> bool:
    return isinstance(row.get("tokens"), int) and _is_hash(row.get("batch_hash"))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def _is_lanes(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count > 0 and all(map(_is_hash, value))


def _by_step(rows: list[Row], findings: Findings) -> dict[int, Row]:
    counts = Counter(row["step"] for row in rows)
    for step, count in sorted(counts.items()):
        if count > 1:
            often = "twice" if count == 2 else f"{count} times"
            findings.add("twice", f"step {step} stands {often} in {METRICS}")
    return {row["step"]: row for row in rows}


def _read_ledger(
    folder: Folder, limit: int, n_lanes: int, findings: Findings
) -> tuple[dict[int, LedgerRow], list[LedgerRow]]:
    """Rows that count and rows that were lost, in the order of the file.

    A row of a step that is not beyond the one before it is a restart: it takes back all rows
    from its step on.  Attempts are not asked: one that ended in its first step leaves its number
    to the next.
    """

    def valid(row: Row) -> bool:
        return isinstance(row.get("attempt"), int) and _is_lanes(row.get("lanes"), n_lanes)

    if not folder.exists(LEDGER):
        findings.add("missing", f"{LEDGER} is missing: lanes and lost steps cannot be checked")
        return {}, []
    standing: list[LedgerRow] = []
    lost: list[LedgerRow] = []
    for row in _read_rows(folder, LEDGER, None, valid, findings):
        entry = LedgerRow(row["step"], row["attempt"], tuple(row["lanes"]))
        if entry.step >= limit and not (standing and standing[-1].step == entry.step - 1):
            findings.add("lines", _no_step_of_the_run(f"a line of {LEDGER}", entry.step, limit))
            continue
        while standing and standing[-1].step >= entry.step:
            lost.append(standing.pop())
        standing.append(entry)
    while standing and standing[-1].step >= limit:
        findings.add(
            "lines", _no_step_of_the_run(f"a line of {LEDGER}", standing.pop().step, limit)
        )
    beyond = [entry.step for entry in lost if entry.step >= limit]
    if beyond:
        findings.notes.append(
            f"{steps(beyond)} lost, and not due any more: the run was shortened to {limit:,}"
        )
    return {entry.step: entry for entry in standing}, [e for e in lost if e.step < limit]


def _beyond(in_metrics: int, saved: list[Saved], findings: Findings) -> Saved | None:
    """The newest whole checkpoint of more steps than metrics.jsonl has: it proves them."""
    for checkpoint in reversed(saved):
        if checkpoint.step <= in_metrics:
            break
        damaged = next(filter(None, map(_damage(checkpoint.folder), checkpoint.files.items())), "")
        if not damaged:
            return checkpoint
        findings.notes.append(f"{damaged}; its steps were not counted")
    return None


def _add_rescued(
    proof: Saved, metrics: dict[int, Row], standing: dict[int, LedgerRow], findings: Findings
) -> None:
    """Put in the lines that a checkpoint keeps of steps whose writer died.

    The run itself does so when it goes on.
    """
    added = set()
    n_lanes = len(next(iter(standing.values())).lanes) if standing else 0  # 0: no ledger at all
    for entry in proof.steps:
        row, ledger = entry["metrics"], entry["ledger"]
        step = row.get("step")
        if not isinstance(step, int) or not _is_metrics(row) or not 0 <= step < proof.step:
            continue
        if step not in metrics:
            metrics[step] = row
            added.add(step)
        lanes: Any = ledger.get("lanes")
        if step not in standing and _is_lanes(lanes, n_lanes):
            standing[step] = LedgerRow(step, -1, tuple(lanes))
    if added:
        findings.notes.append(f"{steps(added)} so far in {proof.name} only, which rescued them")


def _damage(folder: Folder) -> Callable[[tuple[str, dict[str, Any]]], str]:
    def check(item: tuple[str, dict[str, Any]]) -> str:
        name, entry = item
        problem = file_damage(folder, name, entry["size"], entry["sha256"])
        return f"{folder.child(name)} {problem}" if problem else ""

    return check


def file_damage(folder: Folder, name: str, size: int, sha256: str) -> str:
    """What is wrong with a file of known size and sha256, as a verb phrase; "" if nothing."""
    digest, found = hashlib.sha256(), 0
    try:
        with folder.open_stream(name, None) as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
                found += len(data)
    except FileNotFoundError:
        return "is missing"
    except (UserError, OSError) as error:
        return f"cannot be read: {reason_of(error)}"
    if found != size:
        return f"was changed: it has {found:,} bytes instead of {size:,}"
    return "" if digest.hexdigest() == sha256 else "was changed: its sha256 does not match"


def _check_steps(record: Record, findings: Findings) -> None:
    """Every finished step stands in both files."""
    last = f"; {record.saved[-1].name} says that they were done" if record.saved else ""
    missing = sorted(set(range(record.done)) - record.metrics.keys())
    tail = [step for step in missing if step > max(record.metrics)]
    inner = [step for step in missing if step <= max(record.metrics)]
    if inner:
        findings.add("missing", f"{steps(inner)} missing in {METRICS}")
    if tail:
        findings.add("missing", f"the last {steps(tail)} missing in {METRICS}{last}")
    if record.ledger:
        unwritten = sorted(set(range(record.done)) - record.ledger.keys())
        if unwritten:
            findings.add("missing", f"{steps(unwritten)} missing in {LEDGER}")
    ahead = sorted(step for step in record.ledger if step >= record.done)
    if ahead:
        findings.notes.append(f"{steps(ahead)} in {LEDGER} only: the run ended before it was done")
