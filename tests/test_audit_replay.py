"""What the audit computes again: data that changed is named, and the order is not believed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audited import LANES, STEPS, Run
from audited import corpus_path as corpus_path
from audited import run as run

from raygpt.audit.replay import Coverage
from raygpt.audit.words import ranges
from raygpt.data.corpus import MANIFEST, _chunk_hash, open_corpus
from raygpt.data.order import DataOrder
from raygpt.data.reader import WindowReader
from raygpt.train.checkpoints import checkpoint_name

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


# --- the order


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
