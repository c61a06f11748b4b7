"""What a user can get wrong: one line that says what and where, exit status 2, nothing written."""

import gzip
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from head import Head

from raygpt.data.corpus import Corpus
from raygpt.data.prepare import prepare

ROOT = Path(__file__).parent.parent
Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Job:
    """Runs a script of ``jobs/`` in ``tmp_path``: exit status, standard output and error."""

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"jobs/{name}.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        status = 0
        try:
            runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capfd.readouterr()
        return status, out, err

    return run


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(job: Job, folder: Path, name: str, *arguments: str | Path) -> str:
    """The one line that a job refuses its arguments with; the folder stays as it is."""
    before = files_under(folder)
    status, _, err = job(name, *arguments)
    assert status == 2
    assert files_under(folder) == before
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


PREPARE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing.txt": (lambda path: None, ["missing.txt does not exist"]),
    "empty.txt": (lambda path: path.write_text(""), ["holds no text"]),
    "broken.parquet": (
        lambda path: path.write_bytes(b"PAR1 no"),
        ["cannot read", "broken.parquet"],
    ),
    "other.parquet": (
        lambda path: pq.write_table(pa.table({"body": ["x"]}), path),
        ["other.parquet: no column 'text'; there are: body (--text-column)"],
    ),
    "other.jsonl": (lambda path: path.write_text('{"body": "x"}\n'), ["line 1: no column 'text'"]),
    "cut.txt.gz": (
        lambda path: path.write_bytes(gzip.compress(b"x" * 9999)[:-9]),
        ["cannot read", "cut.txt.gz"],
    ),
    "picture.txt": (lambda path: path.write_bytes(b"\x89PNG\0\0"), ["is not UTF-8 text"]),
}


@pytest.mark.parametrize("name", PREPARE)
def test_prepare_refuses(job: Job, tmp_path: Path, ray_session: None, name: str) -> None:
    make, said = PREPARE[name]
    make(tmp_path / name)
    before = set(tmp_path.rglob("*"))
    status, out, err = job("prepare", "--input", tmp_path / name, "--output", tmp_path / "corpus")
    (line,) = err.splitlines()
    assert status == 2 and line.startswith("error: ")
    # What it says every ten seconds, on a busy machine, and nothing else.
    assert re.fullmatch(r"(prepared [01] of 1 fragments\n)*", out)
    assert all(part in line for part in said), line
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= before


def test_invalid_utf8_is_replaced_counted_and_reported(
    job: Job, tmp_path: Path, ray_session: None
) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff text \xc3( and more\n" * 3)
    status, out, _ = job("prepare", "--input", tmp_path / "a.txt", "--output", tmp_path / "corpus")
    assert status == 0
    (line,) = (line for line in out.splitlines() if "invalid characters replaced" in line)
    assert " 6 " in line


def test_an_existing_corpus_is_not_overwritten(
    job: Job, tmp_path: Path, tiny_corpus: Corpus
) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = refused(
        job,
        Path(tiny_corpus.path),
        *("prepare", "--input", tmp_path / "a.txt", "--output", tiny_corpus.path),
    )
    assert "holds a corpus already" in line


SMALL = (
    *("--model.n_layer", "1", "--model.n_head", "1", "--model.n_embd", "16"),
    *("--batch.tokens", "128", "--batch.lanes", "2", "--train.steps", "3"),
)
TRAIN: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "unknown setting": (
        ("--optim.lr", "1e-3"),
        ["unknown option --optim.lr; did you mean --optim.max_lr?"],
    ),
    "unknown preset": (("gtp2",), ["unknown preset 'gtp2'; did you mean 'gpt2'?"]),
    "batch": (("--batch.tokens", "700"), ["batch.tokens 700 is not divisible", "640 would be"]),
    "workers": (("--scale.workers", "3"), ["scale.workers 3 is more than batch.lanes 2"]),
    "no corpus": (("gpt2",), ["data.corpus is not set"]),
    "missing corpus": (("--data.corpus", "nowhere"), ["nowhere does not exist", "prepare.py"]),
    "tokenizer": (
        ("--data.corpus", "CORPUS", "--model.vocab_size", "50304"),
        ["model.vocab_size 50304 does not fit", "'bytes' has 257 tokens"],
    ),
    "short corpus": (
        ("--data.corpus", "CORPUS", "--batch.tokens", "131072"),
        ["windows of 64 tokens, fewer than the 2,048 of one batch"],
    ),
    "no storage": (("--run.storage", "/dev/null/runs"), ["cannot write to /dev/null/runs"]),
    "read-only storage": (("--run.storage", "/proc/runs"), ["cannot write to /proc/runs"]),
    "name": (("--run.name", "../x"), ["run.name must be a plain folder name"]),
    "no file": (("--config", "none.yaml"), ["cannot read none.yaml: No such file"]),
}


@pytest.mark.parametrize("name", TRAIN)
def test_train_refuses(job: Job, tmp_path: Path, tiny_corpus: Corpus, name: str) -> None:
    arguments, said = TRAIN[name]
    filled = [tiny_corpus.path if argument == "CORPUS" else argument for argument in arguments]
    line = refused(job, tmp_path, "train", *filled)
    assert all(part in line for part in said), line
    assert not (tmp_path / "runs" / "shakespeare").exists()


def test_no_cluster_at_the_address(tmp_path: Path, tiny_corpus: Corpus) -> None:
    """In a process of its own: this one may have a Ray already."""
    process = subprocess.run(
        [
            *(sys.executable, str(ROOT / "jobs" / "train.py"), *SMALL),
            *("--run.storage", str(tmp_path), "--data.corpus", tiny_corpus.path),
        ],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 ")
    assert not list(tmp_path.iterdir())


_OTHER_RAY = "import ray; ray.__version__ = '2.1.0'; import runpy, sys;"


@pytest.mark.parametrize(
    ("before", "environment", "said"),
    [
        ("", {"RAY_AUTH_TOKEN": "0" * 32}, ["refuses this driver", "another token"]),
        ("", {"RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": None}, ["oken"]),
        (_OTHER_RAY, {}, ["Version mismatch", "Ray: 2.1.0", f"Ray: {ray.__version__}"]),
    ],
    ids=["wrong token", "no token", "other version"],
)
def test_a_cluster_that_does_not_let_in(
    head: Head,
    tmp_path: Path,
    tiny_corpus: Corpus,
    before: str,
    environment: dict[str, str | None],
    said: list[str],
) -> None:
    """One line, and nothing of Ray's own attempts."""
    script = str(ROOT / "jobs" / "train.py")
    code = before or "import runpy, sys;"
    code += f"sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    everything = {**head.environment, "HOME": str(tmp_path), **environment}
    process = subprocess.run(
        [
            *(sys.executable, "-c", code, *SMALL),
            *("--run.storage", str(tmp_path / "runs"), "--data.corpus", tiny_corpus.path),
        ],
        env={name: value for name, value in everything.items() if value is not None},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: no Ray cluster answers at RAY_ADDRESS={head.address} ")
    assert all(part in line for part in said), line
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs" / "shakespeare").exists()


def test_no_space_for_the_corpus(job: Job, small_disk: Path) -> None:
    """The embedded corpus is the first thing that a run writes."""
    line = refused(job, small_disk.parent / "none", "train", "--run.storage", small_disk)
    assert "cannot write" in line and "No space left on device" in line


@pytest.mark.parametrize("name", ["sample", "export"])
def test_no_checkpoint(job: Job, tmp_path: Path, name: str) -> None:
    extra = ["--prompt", "x"] if name == "sample" else ["--output", "out"]
    line = refused(job, tmp_path, name, "--checkpoint", tmp_path / "nowhere", *extra)
    assert f"no checkpoint in {tmp_path / 'nowhere'}" in line


def test_damaged_shard_is_found_before_work(job: Job, tmp_path: Path) -> None:
    """A cut file; one whose bytes changed is found when it is read."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "c"), "bytes", val_fraction=0.1, on_ray=False)
    shard = tmp_path / "c" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    line = refused(job, tmp_path, "train", "--data.corpus", tmp_path / "c", *SMALL)
    assert f"{shard} is damaged" in line
