"""What a run's folder says of itself: steps lost, missing or twice, and edits, are found."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from audited import LANES, Run
from audited import corpus_path as corpus_path
from audited import run as run
from helpers import WEIGHTS_FILE

from raygpt.runs.files import LEDGER, METRICS
from raygpt.train.checkpoints import METADATA, checkpoint_name

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


def test_steps_lost_beyond_the_end_of_a_run_that_was_shortened(run: Run) -> None:
    """It was killed at step 29, and submitted again with an end at step 20."""
    run.play(stop=29)
    run.save(15)
    run.shorten(20)
    run.play(first=15, stop=20)
    run.save(20)
    report = run.audit()
    assert report.ok and report.steps == 20
    assert report.findings.notes == [
        "steps 20 to 28 lost, and not due any more: the run was shortened to 20",
        "steps 15 to 19 lost and redone with the same batches",
    ]


def test_steps_beyond_the_end_are_not_lost_but_wrong(run: Run) -> None:
    """Where nothing took them back, or they do not follow on what was done."""
    run.play()
    run.save()
    lines = run.rows(LEDGER)
    run.rewrite(
        LEDGER, [*lines[:8], {**lines[8], "step": 10**12}, *lines[8:], {**lines[29], "step": 30}]
    )
    assert run.wrong() == [
        f"a line of {LEDGER} is of step {10**12}; the run has 30",
        f"a line of {LEDGER} is of step 30; the run has 30",
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
    weights = run.path / checkpoint_name(30) / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    report = run.audit()
    assert report.ok and report.steps == 27
    (note,) = report.findings.notes
    assert note.startswith(f"{weights} was changed: it has ")


# --- files that were edited


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
