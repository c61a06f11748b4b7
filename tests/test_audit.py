"""The audit: a healthy run is proven, a faulty one is not, and the job says which."""

import subprocess
import sys
from pathlib import Path

from audited import LANES, STEPS, Run, T
from audited import corpus_path as corpus_path
from audited import run as run

from raygpt.audit import MAX_LINES
from raygpt.runs.files import LEDGER, METRICS

ROOT = Path(__file__).parent.parent


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
    assert report.ok


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


# --- the report


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
