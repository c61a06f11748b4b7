"""From text to shards: the same bytes from any number of tasks, and the rules of the split."""

import gzip
import hashlib
import json
import os
import resource
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from raygpt.data.corpus import SPLITS, Split, open_corpus
from raygpt.data.prepare import Summary, chunk_size, prepare
from raygpt.data.tokenizer import load_tokenizer
from raygpt.errors import UserError

ROOT = Path(__file__).parent.parent


def tokens_of(path: Path | str, split: Split) -> np.ndarray:
    corpus = open_corpus(str(path))
    chunks = [corpus.read_chunk(split, i) for i in range(len(corpus.chunks(split)))]
    return np.concatenate([np.empty(0, corpus.dtype), *chunks])


def documents_of(path: Path | str, split: Split) -> list[str]:
    """The documents of a split, cut at the end-of-text tokens that begin them."""
    corpus = open_corpus(str(path))
    tokens = tokens_of(path, split)
    starts = np.flatnonzero(tokens == corpus.eot)
    assert len(tokens) == 0 or starts[0] == 0
    decode = load_tokenizer(corpus.tokenizer).decode
    return [decode(part[1:]) for part in np.split(tokens, starts[1:])] if len(tokens) else []


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def local(source: Path, output: Path, tokenizer: str = "bytes", **options: Any) -> Summary:
    return prepare([str(source)], str(output), tokenizer, on_ray=False, **options)


def fails(source: Path, output: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        local(source, output, **options)
    assert "\n" not in str(error.value)
    assert not (output / "manifest.json").exists()
    return str(error.value)


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    words = [f"document {i}: {'word ' * (i % 50)}" for i in range(600)]
    (folder / "a.txt").write_text("one document\n" * 40)
    write_lines(folder / "b.jsonl", words[:200])
    (folder / "c.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": t}) for t in [*words[200:300], ""]).encode())
    )
    pq.write_table(pa.table({"text": words[300:500]}), folder / "d.parquet", row_group_size=50)
    write_lines(folder / "e.json", words[500:])
    (folder / "f.txt.zst").write_bytes(pa.compress(b"\xff end", codec="zstd", asbytes=True))
    return folder


def test_same_bytes_from_any_number_of_tasks(
    ray_session: None, mixed: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"val_fraction": 0.05, "chunk_tokens": 1000, "fragment_bytes": 2000}
    expected = local(mixed, tmp_path / "local", "gpt2", **options)
    assert expected.shards["train"] >= 5 and expected.shards["val"] >= 2
    assert (expected.files, expected.empty, expected.replaced) == (6, 1, 1)
    assert sum(expected.documents.values()) == 602
    for tasks in (1, 2, 3, None):
        output = tmp_path / f"tasks-{tasks}"
        seen: list[tuple[int, int]] = []
        summary = prepare(
            [str(mixed)],
            str(output),
            "gpt2",
            tasks=tasks,
            progress=lambda *counts: seen.append(counts),  # noqa: B023
            **options,
        )
        assert hashes(output) == hashes(tmp_path / "local")
        assert summary.tokens == expected.tokens
        assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) >= 5


def test_user_errors_come_back_from_ray(ray_session: None, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["fine"])
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError) as error:
        prepare([str(tmp_path / "*.jsonl")], str(tmp_path / "out"), "bytes", fragment_bytes=1)
    assert str(error.value) == f"{tmp_path}/b.jsonl, line 2: column 'text' holds int, not text"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ray_data_keeps_its_settings(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), "bytes")
    assert ray.data.DataContext.get_current() is context
    assert context.enable_progress_bars == before


def test_embedded_text_is_one_document_cut_in_two(tmp_path: Path) -> None:
    source = resources.files("raygpt") / "assets" / "tinyshakespeare.txt"
    data = source.read_bytes()
    summary = local(Path(str(source)), tmp_path / "out", val_fraction=0.1)
    assert summary.divided and summary.documents == {"train": 1, "val": 1}
    assert summary.tokens == {"train": 1 + 1_003_854, "val": 1 + 111_540}
    assert tokens_of(tmp_path / "out", "train").tolist() == [256, *data[:1_003_854]]
    assert tokens_of(tmp_path / "out", "val").tolist() == [256, *data[1_003_854:]]
    assert summary.chunks == {"train": 246, "val": 55}


def test_documents_go_by_the_hash_of_their_content(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(1000)]
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "b.jsonl", [*reversed(texts), *texts[:10]])
    for name in ("a", "b"):
        local(tmp_path / f"{name}.jsonl", tmp_path / name, val_fraction=0.1, fragment_bytes=1)
    val = documents_of(tmp_path / "a", "val")
    assert 60 < len(val) < 140
    assert documents_of(tmp_path / "a", "train") == [text for text in texts if text not in val]
    twice = set(val) & set(texts[:10])
    assert sorted(documents_of(tmp_path / "b", "val")) == sorted([*val, *twice])
    local(tmp_path / "a.jsonl", tmp_path / "seed", val_fraction=0.1, seed=7)
    assert documents_of(tmp_path / "seed", "val") != val
    local(tmp_path / "a.jsonl", tmp_path / "more", val_fraction=0.2)
    assert set(val) < set(documents_of(tmp_path / "more", "val"))


@pytest.mark.parametrize(("fraction", "small"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_no_split_stays_empty(tmp_path: Path, fraction: float, small: Split) -> None:
    """The document with the lowest hash is validation, the one with the highest training."""
    texts = [f"text {i}" for i in range(20)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    source = tmp_path / "*.txt"
    for name, size in (("one", 10**6), ("many", 1)):
        summary = local(source, tmp_path / name, val_fraction=fraction, fragment_bytes=size)
        assert summary.documents[small] == 1 and sum(summary.documents.values()) == 20
        assert not summary.divided
        named = {chunk.shard for s in SPLITS for chunk in open_corpus(summary.path).chunks(s)}
        assert {file.name for file in (tmp_path / name).iterdir()} == {"manifest.json", *named}
    (chosen,) = documents_of(tmp_path / "one", small)
    assert documents_of(tmp_path / "many", small) == [chosen]
    for percent in (20, 40, 60, 80):  # whoever is chosen by force is the last one left by hash
        output = tmp_path / f"at-{percent}"
        local(source, output, val_fraction=percent / 100)
        assert chosen in documents_of(output, small)


def test_equal_documents_still_fill_both_splits(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["same", "same", "same"])
    summary = local(tmp_path / "a.jsonl", tmp_path / "out")
    assert summary.documents == {"train": 2, "val": 1}


@pytest.mark.parametrize(
    ("tokens", "chunk_tokens", "expected"),
    [
        (1, 2**20 + 1, 2049),
        (256 * 2048, 2**20 + 1, 2049),
        (256 * 2048 + 1, 2**20 + 1, 3073),
        (1_003_855, 2**20 + 1, 4097),
        (304_223, 2**20 + 1, 2049),
        (256 * 2**20, 2**20 + 1, 2**20 + 1),
        (10**12, 2**20 + 1, 2**20 + 1),
        (128 * 2**20, 2**20 + 1, 2**19 + 1),
        (256 * 257, 257, 257),
        (10, 100, 100),
    ],
)
def test_chunk_size(tokens: int, chunk_tokens: int, expected: int) -> None:
    assert chunk_size(tokens, chunk_tokens) == expected


def test_full_and_smaller_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 6_000_000)
    local(tmp_path / "a.txt", tmp_path / "out", val_fraction=0.05, chunk_tokens=20_000)
    corpus = open_corpus(str(tmp_path / "out"))
    sizes_of: list[tuple[Split, int]] = [("train", 20_000), ("val", 2049)]
    for split, full in sizes_of:
        sizes = [chunk.tokens for chunk in corpus.chunks(split)]
        assert set(sizes[:-1]) == {full} and 0 < sizes[-1] <= full
        assert len(sizes) == -(-corpus.tokens(split) // full)
    assert len(corpus.chunks("train")) == 286 and len(corpus.chunks("val")) == 147


def test_what_lies_in_the_files(tmp_path: Path) -> None:
    """Plain Parquet that other programs read, as the manifest describes it."""
    (tmp_path / "a.txt").write_text("Hello, I'm a language model," * 3)
    local(tmp_path / "a.txt", tmp_path / "out", "gpt2", val_fraction=0.5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    stored = pq.read_table(tmp_path / "out" / "train-00000.parquet")
    assert manifest["dtype"] == "uint16" and stored.schema.types == [pa.uint16()]
    assert stored["tokens"].to_pylist()[:9] == [50256, 15496, 11, 314, 1101, 257, 3303, 2746, 11]
    for shard in (s for split in SPLITS for s in manifest["splits"][split]["shards"]):
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["size"], shard["sha256"])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(min_size=1), min_size=2, max_size=20),
    st.sampled_from(["bytes", "gpt2"]),
    st.integers(1, 50),
    st.integers(1, 200),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    tokenizer: str,
    chunk_tokens: int,
    fragment_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    half = len(texts) // 2
    write_lines(folder / "a.jsonl", texts[:half])
    pq.write_table(pa.table({"text": pa.array(texts[half:], pa.string())}), folder / "b.parquet")
    options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "fragment_bytes": fragment_bytes}
    summary = local(folder, folder / "out", tokenizer, val_fraction=0.3, **options)
    found = {split: documents_of(folder / "out", split) for split in SPLITS}
    assert {split: len(found[split]) for split in SPLITS} == summary.documents
    assert min(summary.documents.values()) >= 1
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    for split in SPLITS:  # in the order of the input
        rest = iter(texts)
        assert all(document in rest for document in found[split])


def test_into_and_out_of_a_store(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text in a store")
    uri = "mock:///bucket/prepared"
    prepare([str(tmp_path / "a.txt")], uri, "bytes", val_fraction=0.4, on_ray=False)
    open_corpus(uri).check_files()
    assert documents_of(uri, "train") == ["text in a"]
    assert documents_of(uri, "val") == [" store"]


def test_output_is_never_overwritten(tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some text")
    output.mkdir()
    (output / "precious").write_text("x")
    assert fails(source, output) == (
        f"output {output} is not empty (an unfinished corpus?); delete it or choose another"
    )
    (output / "precious").unlink()
    local(source, output)
    before = hashes(output)
    with pytest.raises(UserError) as error:
        local(source, output)
    assert str(error.value) == f"{output} holds a corpus already; choose another output"
    assert hashes(output) == before


def test_wrong_arguments(tmp_path: Path) -> None:
    source, output = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some text")
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        message = fails(source, output, val_fraction=fraction)
        assert message == f"val-fraction must lie above 0 and below 1, got {fraction}"
    assert fails(source, output, tokenizer="gpt4").startswith("unknown tokenizer 'gpt4'")
    assert fails(tmp_path / "b.txt", output) == f"input {tmp_path}/b.txt does not exist"
    assert fails(source, source / "out").startswith(f"cannot write to {source}/out: Not a dir")
    assert not output.exists()


def test_nothing_in_the_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    write_lines(tmp_path / "b.jsonl", ["", ""])
    assert fails(tmp_path / "*.*", tmp_path / "out") == (
        "the input holds no text: every document is empty"
    )
    (tmp_path / "a.txt").write_text("x")
    assert fails(tmp_path / "*.*", tmp_path / "out") == (
        "the input is one document of one token; train and val need one each"
    )


def test_no_manifest_after_a_failure_on_the_way(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "fine " * 100})] * 50 + ["{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out"
    assert fails(tmp_path / "a.jsonl", output, chunk_tokens=1000) == (
        f"{tmp_path}/a.jsonl, line 51: not valid JSON "
        "(Expecting property name enclosed in double quotes, column 2)"
    )
    assert fails(tmp_path / "a.jsonl", output).startswith(f"output {output} is not empty")


def test_no_space_left(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_bytes(rng.integers(32, 127, 300_000).astype(np.uint8).tobytes())
    output = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = fails(tmp_path / "a.txt", output, chunk_tokens=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == f"cannot write {output}/train-00000.parquet: File too large"


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "COLUMNS": "200",
    }
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_job(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    (tmp_path / "b.txt").write_text("more")
    output = str(tmp_path / "out")
    options = ("--tokenizer", "bytes", "--val-fraction", "0.2")
    inputs = ("--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"))
    done = run_job(*inputs, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    assert "train tokens" in done.stdout and output in done.stdout
    documents = documents_of(output, "train") + documents_of(output, "val")
    assert sorted(documents) == sorted([*(f"text {i}" for i in range(100)), "more"])
    again = run_job(*inputs, "--output", output)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1] == (
        f"error: {output} holds a corpus already; choose another output"
    )
    assert "Traceback" not in again.stderr
