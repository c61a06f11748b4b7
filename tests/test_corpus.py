"""Opening and reading a corpus, whole and damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from raygpt.data.corpus import MANIFEST, Corpus, ShardWriter, Split, open_corpus
from raygpt.data.prepare import prepare
from raygpt.errors import UserError
from raygpt.storage import Folder

TEXT = "".join(f"line {i} of the text\n" for i in range(2000))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "in.txt").write_text(TEXT)
    prepare(
        [str(folder / "in.txt")], str(folder / "corpus"), "bytes", val_fraction=0.2, on_ray=False
    )
    return folder / "corpus"


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def fails(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0xFF
    file.write_bytes(data)


def test_reads_back_the_text(made: Path) -> None:
    corpus = open_corpus(str(made))
    assert (corpus.tokenizer, corpus.n_vocab, corpus.eot) == ("bytes", 257, 256)
    assert corpus.dtype == np.uint16
    corpus.check_files()
    text = TEXT.encode()
    cut = int(len(text) * (1 - 0.2))
    parts: list[tuple[Split, bytes]] = [("train", text[:cut]), ("val", text[cut:])]
    for split, expected in parts:
        chunks = corpus.chunks(split)
        tokens = [corpus.read_chunk(split, i) for i in range(len(chunks))]
        assert [len(t) for t in tokens] == [chunk.tokens for chunk in chunks]
        assert {t.dtype for t in tokens} == {np.dtype(np.uint16)}
        assert [hashlib.sha256(t.astype("<u2").tobytes()).hexdigest() for t in tokens] == [
            chunk.sha256 for chunk in chunks
        ]
        assert {len(t) for t in tokens[:-1]} == {2049}
        assert np.concatenate(tokens).tolist() == [256, *expected]
        assert corpus.tokens(split) == len(expected) + 1


def test_pickles_small_with_its_files_open(made: Path) -> None:
    corpus = open_corpus(str(made))
    first = corpus.read_chunk("train", 0)
    data = cloudpickle.dumps(corpus)
    copy: Corpus = cloudpickle.loads(data)
    assert copy == corpus and hash(copy) == hash(corpus) and len(data) < 10_000
    assert np.array_equal(copy.read_chunk("train", 0), first)
    assert np.array_equal(corpus.read_chunk("train", 0), first)


def test_many_shards_with_few_open(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(str(i) * 10)
    output = tmp_path / "corpus"
    prepare([str(tmp_path / "*.txt")], str(output), "bytes", fragment_bytes=1, on_ray=False)
    corpus = open_corpus(str(output))
    assert len({chunk.shard for chunk in corpus.chunks("train")}) == 8
    for _ in range(2):
        texts = [bytes(corpus.read_chunk("train", i)[1:].astype(np.uint8)) for i in range(8)]
        assert sorted(texts) == texts and len({*texts}) == 8
    assert len(corpus._open) == 4


def test_fingerprint_follows_the_data_only(made: Path, path: Path, tmp_path: Path) -> None:
    fingerprint = open_corpus(str(made)).fingerprint
    assert open_corpus(str(path)).fingerprint == fingerprint
    edit(path, lambda m: m["splits"]["train"]["shards"][0].update(name="renamed", size=1))
    assert open_corpus(str(path)).fingerprint == fingerprint
    edit(path, lambda m: m["splits"]["val"]["shards"][0]["chunks"].reverse())
    assert open_corpus(str(path)).fingerprint != fingerprint
    edit(path, lambda m: m["splits"]["val"]["shards"][0]["chunks"].reverse())
    edit(path, lambda m: m["tokenizer"].update(hash="other"))
    assert open_corpus(str(path)).fingerprint != fingerprint


def test_no_corpus(path: Path, tmp_path: Path) -> None:
    assert fails(lambda: open_corpus(str(tmp_path / "none"))) == (
        f"corpus {tmp_path}/none does not exist; jobs/prepare.py makes one"
    )
    (path / MANIFEST).unlink()
    assert fails(lambda: open_corpus(str(path))).startswith(f"{path} has no manifest.json: ")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"version": "1"}', '{"version": 1}', '"\\', "\udcff"]
)
def test_damaged_manifest(path: Path, content: str) -> None:
    (path / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert fails(lambda: open_corpus(str(path))).startswith(f"{path}/manifest.json is damaged (")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dtype="float32"),
        lambda m: m["tokenizer"].pop("hash"),
        lambda m: m["splits"].pop("val"),
        lambda m: m["splits"]["val"]["shards"][0].update(size="12"),
        lambda m: m["splits"]["val"]["shards"][0].update(name=7),
        lambda m: m["splits"]["val"].update(tokens=1),
        lambda m: m["splits"]["train"].update(shards=None),
    ],
)
def test_manifest_with_wrong_fields(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(path, change)
    assert fails(lambda: open_corpus(str(path))).startswith(f"{path}/manifest.json is damaged (")


def test_unknown_version(path: Path) -> None:
    edit(path, lambda m: m.update(version=2))
    assert fails(lambda: open_corpus(str(path))) == (
        f"corpus {path} has format version 2; this raygpt reads 1: prepare it anew"
    )


@pytest.mark.parametrize("name", ["../train-00000.parquet", "/etc/passwd", "a\\b"])
def test_shard_outside(path: Path, name: str) -> None:
    edit(path, lambda m: m["splits"]["train"]["shards"][0].update(name=name))
    assert fails(lambda: open_corpus(str(path))).startswith(
        f"corpus {path} points outside its folder: {name!r} is not a name inside a folder"
    )


def test_missing_shard(path: Path) -> None:
    corpus = open_corpus(str(path))
    (path / "train-00000.parquet").unlink()
    assert fails(corpus.check_files) == (
        f"{path}/train-00000.parquet is missing; every machine must reach it"
    )
    assert fails(lambda: corpus.read_chunk("train", 1)) == (
        f"cannot read {path}/train-00000.parquet, row group 1: No such file or directory"
    )


def test_truncated_shard(path: Path) -> None:
    corpus = open_corpus(str(path))
    file = path / "val-00000.parquet"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert fails(corpus.check_files) == (
        f"{file} is damaged: it has {size - 1} bytes instead of {size}; "
        "restore the file or prepare anew"
    )
    assert fails(lambda: corpus.read_chunk("val", 0)).startswith(
        f"cannot read {file}, row group 0: Parquet magic bytes not found"
    )


def test_other_tokens_in_the_shard(path: Path) -> None:
    corpus = open_corpus(str(path))
    name = corpus.chunks("val")[0].shard

    def replace(tokens: np.ndarray) -> None:
        with ShardWriter(Folder.from_path(str(path)), name, tokens.dtype, 2049) as writer:
            writer.add(tokens)

    where = f"{path}/{name}, row group 0 is damaged: "
    tokens = corpus.read_chunk("val", 0).copy()
    tokens[17] += 1
    replace(tokens)
    corpus = open_corpus(str(path))
    assert fails(lambda: corpus.read_chunk("val", 0)).startswith(
        f"{where}its tokens do not match the manifest's sha256"
    )
    assert fails(lambda: corpus.read_chunk("val", 1)).startswith(
        f"cannot read {path}/{name}, row group 1: "
    )
    replace(tokens[:-1])
    assert fails(lambda: corpus.read_chunk("val", 0)).startswith(
        f"{where}2048 tokens of uint16 instead of 2049 of uint16"
    )
    replace(tokens.astype(np.uint32))
    assert fails(lambda: corpus.read_chunk("val", 0)).startswith(
        f"{where}2049 tokens of uint32 instead of 2049 of uint16"
    )


def test_damage_in_the_middle_is_found_and_mending_too(path: Path) -> None:
    file = path / "train-00000.parquet"
    whole = file.read_bytes()
    damage(file)
    corpus = open_corpus(str(path))
    corpus.check_files()
    messages = []
    for index in range(len(corpus.chunks("train"))):
        try:
            corpus.read_chunk("train", index)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) == 1 and f"{file}, row group " in messages[0]
    file.write_bytes(whole)
    for index in range(len(corpus.chunks("train"))):
        corpus.read_chunk("train", index)


def test_shard_writer_without_tokens_makes_no_file(tmp_path: Path) -> None:
    with ShardWriter(Folder.from_path(str(tmp_path)), "x", np.dtype(np.uint16), 8) as writer:
        writer.add(np.empty(0, np.uint16))
    assert writer.finished() is None
    assert list(tmp_path.iterdir()) == []
