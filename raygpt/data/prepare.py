"""Text to a corpus: tokenize documents, divide them into train and val, write shards.

Input files in sorted order are grouped by size into fragments; each fragment is one unit of
work and writes its own shards, named after its number.  So the corpus is byte for byte the
same, however many tasks made it and in whatever order.  Every document is preceded by the
end-of-text token, and documents flow across the borders of chunks.

Two things can only be known once all is read: a small split is cut into smaller chunks
(:func:`chunk_size`), and where chance put every document into one split, one has to move
(:func:`_mend_splits`).  The few shards concerned are then written again.  What it gives
up: resuming.  An unfinished corpus has no manifest and is made again from the start.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raygpt.data.corpus import (
    COLUMN,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Shard,
    ShardWriter,
    Split,
    check_shards,
)
from raygpt.data.sources import (
    Fragment,
    InputFile,
    Tally,
    list_inputs,
    plan_fragments,
    read_documents,
)
from raygpt.data.tokenizer import Tokenizer, load_tokenizer
from raygpt.errors import UserError
from raygpt.storage import Folder

CHUNK_UNIT = 1024
CHUNK_TOKENS = CHUNK_UNIT * 1024 + 1
"""A window of T tokens needs one more for its last target; with it, no T that is a power of two
and at most 2**20 leaves a tail."""
MIN_CHUNK_TOKENS = 2 * CHUNK_UNIT + 1
MIN_CHUNKS = 256
FRAGMENT_BYTES = 64 * 2**20
SEED = 1337
_HASH_RANGE = 2**64


@dataclass(frozen=True)
class Summary:
    """What a finished prepare did; ``seconds`` is wall time."""

    path: str
    files: int
    input_bytes: int
    documents: dict[Split, int]
    """Documents that went into each split; a divided one counts in both."""
    divided: bool
    """Whether there was one document only, so that it was cut in two."""
    empty: int
    """Documents left out because they were null or empty."""
    replaced: int
    """U+FFFD put in place of what was not valid Unicode."""
    tokens: dict[Split, int]
    shards: dict[Split, int]
    chunks: dict[Split, int]
    seconds: float


@dataclass(frozen=True)
class _Settings:
    """What the content of every shard depends on, beside its input."""

    output: Folder
    tokenizer: str
    text_column: str
    val_fraction: float
    chunk_tokens: int
    seed: int


@dataclass(frozen=True)
class _Result:
    """What a fragment gave; plain values only, since it travels as JSON."""

    index: int
    documents: dict[Split, int]
    shards: dict[Split, dict[str, Any]]
    empty: int
    replaced: int
    lowest: tuple[int, int]
    """(hash, position in the fragment) of the document with the lowest hash."""
    highest: tuple[int, int]


@dataclass(frozen=True)
class _Move:
    """One document of a fragment, by its position, that does not go where its hash says."""

    position: int
    split: Split | None
    """Where it goes instead; None cuts it in two."""


def prepare(
    inputs: list[str],
    output: str,
    tokenizer: str,
    *,
    text_column: str = "text",
    val_fraction: float = 0.005,
    chunk_tokens: int = CHUNK_TOKENS,
    seed: int = SEED,
    fragment_bytes: int = FRAGMENT_BYTES,
    on_ray: bool = True,
    tasks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Make a corpus: as a Ray Data job, in the running Ray session if any, or in this process.

    A document is validation if a hash of its content, keyed by ``seed``, falls into the lowest
    ``val_fraction`` of all hashes.  If that leaves a split empty, the document with the lowest
    (highest) hash becomes validation (training).  If there is one document of n tokens only,
    its first ``int(n * (1 - val_fraction))`` are training and the others validation; both
    begin with the end-of-text token, as every split does.

    Args:
        inputs: files, folders and globs, local or cloud; every node must reach them.
        output: folder or URI of the corpus; empty or not there yet.
        val_fraction: share of validation, above 0 and below 1.
        chunk_tokens: tokens of a full chunk; a small split gets smaller ones.
        fragment_bytes: input bytes, as stored, that a shard is made of at least.
        on_ray: False does the same work here, without Ray, to the same bytes.
        tasks: Ray tasks that the fragments are dealt to; by default one for each.
        progress: called with the fragments done and their total.

    Raises:
        UserError: an input or the output is at fault.  No manifest is written then.
    """
    started = time.monotonic()
    if not 0 < val_fraction < 1:
        raise UserError(f"val-fraction must lie above 0 and below 1, got {val_fraction}")
    load_tokenizer(tokenizer)
    files = list_inputs(inputs)
    fragments = plan_fragments(files, text_column, fragment_bytes)
    folder = Folder.from_path(output)
    _check_output(folder)
    settings = _Settings(folder, tokenizer, text_column, val_fraction, chunk_tokens, seed)

    run = (
        _on_ray(settings, fragments, min(tasks or len(fragments), len(fragments)))
        if on_ray
        else (_prepare_fragment(settings, fragment) for fragment in fragments)
    )
    results = []
    for result in run:
        results.append(result)
        if progress is not None:
            progress(len(results), len(fragments))
    results.sort(key=lambda result: result.index)
    divided = _mend_splits(settings, fragments, results)
    shards = {split: _cut_chunks(settings, split, results) for split in SPLITS}
    try:
        check_shards(folder, [shard for split in SPLITS for shard in shards[split]])
    except UserError as error:
        raise UserError(f"{error}; the output must be storage shared by all nodes") from error
    manifest = _manifest(settings, files, results, divided, shards)
    folder.write_bytes(MANIFEST, json.dumps(manifest, indent=1).encode())
    return Summary(
        path=folder.uri,
        **manifest["input"],
        documents={split: manifest["splits"][split]["documents"] for split in SPLITS},
        divided=divided,
        tokens={split: manifest["splits"][split]["tokens"] for split in SPLITS},
        shards={split: len(shards[split]) for split in SPLITS},
        chunks={split: sum(len(shard.chunks) for shard in shards[split]) for split in SPLITS},
        seconds=time.monotonic() - started,
    )


def chunk_size(tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """Tokens of a chunk in a split of ``tokens`` tokens.

    ``chunk_tokens``, unless that makes fewer than 256 full chunks: a lane goes through one chunk
    after the other, so a text in few chunks is hardly shuffled.  A small split is cut into at
    most 256, of a multiple of 1,024 tokens and one, and at least 2,049.
    """
    if tokens // chunk_tokens >= MIN_CHUNKS:
        return chunk_tokens
    units = -(-tokens // (MIN_CHUNKS * CHUNK_UNIT))
    return min(chunk_tokens, max(MIN_CHUNK_TOKENS, units * CHUNK_UNIT + 1))


def _check_output(folder: Folder) -> None:
    if folder.exists(MANIFEST):
        raise UserError(f"{folder} holds a corpus already; choose another output")
    if folder.list():
        raise UserError(
            f"output {folder} is not empty (an unfinished corpus?); delete it or choose another"
        )
    folder.check_writable()


def _on_ray(settings: _Settings, fragments: list[Fragment], tasks: int) -> Iterator[_Result]:
    """Results of all fragments, in the order in which they are ready."""
    import ray.data  # here, so that work in this process does without Ray

    if not ray.is_initialized():  # this late, so that mistakes in the input are told at once
        ray.init(log_to_driver=False, logging_level=logging.ERROR)

    def work(row: dict[str, int]) -> dict[str, str]:
        # A user's mistake comes back as a value: an exception would be wrapped in Ray's traces.
        try:
            result = _prepare_fragment(settings, fragments[row["index"]])
        except UserError as error:
            return {"result": "", "error": str(error)}
        return {"result": json.dumps(dataclasses.asdict(result)), "error": ""}

    with _quiet(ray.data.DataContext):
        items = [{"index": fragment.index} for fragment in fragments]
        dataset = ray.data.from_items(items, override_num_blocks=tasks).map(work, num_cpus=1)
        for row in dataset.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield _Result(**json.loads(row["result"]))


@contextlib.contextmanager
def _quiet(data_context: Any) -> Iterator[None]:
    """Ray Data without bars and chatter, for as long as this lasts."""
    context, logger = data_context.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    context.enable_progress_bars = context.print_on_execution_start = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])


def _prepare_fragment(
    settings: _Settings, fragment: Fragment, move: _Move | None = None
) -> _Result:
    """Tokenize one fragment and write its shards; the same call writes the same bytes."""
    tokenizer = load_tokenizer(settings.tokenizer)
    eot = np.array([tokenizer.eot], tokenizer.dtype)
    tally = Tally()
    documents: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    lowest, highest = (_HASH_RANGE, -1), (-1, -1)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    settings.output,
                    f"{split}-{fragment.index:05d}.parquet",
                    tokenizer.dtype,
                    settings.chunk_tokens,
                )
            )
            for split in SPLITS
        }
        for position, text in enumerate(_documents(settings, fragment, tally)):
            key = _content_hash(text, settings.seed)
            lowest = min(lowest, (key, position))
            highest = max(highest, (key, position))
            split: Split | None = "val" if key < settings.val_fraction * _HASH_RANGE else "train"
            if move is not None and move.position == position:
                split = move.split
            for name, tokens in _destinations(tokenizer, text, split, settings.val_fraction):
                writers[name].add(eot)
                writers[name].add(tokens)
                documents[name] += 1
    finished = {split: writer.finished() for split, writer in writers.items()}
    shards = {split: shard.to_json() for split, shard in finished.items() if shard is not None}
    return _Result(fragment.index, documents, shards, tally.empty, tally.replaced, lowest, highest)


def _documents(settings: _Settings, fragment: Fragment, tally: Tally) -> Iterator[str]:
    for part in fragment.parts:
        yield from read_documents(part, settings.text_column, tally)


def _content_hash(text: str, seed: int) -> int:
    """64 bits that depend on the text and the seed only, so equal documents stay together."""
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def _destinations(
    tokenizer: Tokenizer, text: str, split: Split | None, val_fraction: float
) -> list[tuple[Split, np.ndarray]]:
    tokens = tokenizer.encode(text)
    if split is not None:
        return [(split, tokens)]
    if len(tokens) < 2:
        raise UserError("the input is one document of one token; train and val need one each")
    cut = min(max(1, int(len(tokens) * (1 - val_fraction))), len(tokens) - 1)
    return [("train", tokens[:cut]), ("val", tokens[cut:])]


def _mend_splits(settings: _Settings, fragments: list[Fragment], results: list[_Result]) -> bool:
    """Give an empty split a document, in place; True if the only document had to be divided.

    Raises:
        UserError: there is no document at all.
    """
    counts = {split: sum(result.documents[split] for result in results) for split in SPLITS}
    if not sum(counts.values()):
        raise UserError("the input holds no text: every document is empty")
    if all(counts.values()):
        return False
    filled = [result for result in results if any(result.documents.values())]
    alone = sum(counts.values()) == 1
    if not counts["val"]:
        chosen = min(filled, key=lambda result: (result.lowest[0], result.index))
        move = _Move(chosen.lowest[1], None if alone else "val")
    else:
        chosen = max(filled, key=lambda result: (result.highest[0], result.index))
        move = _Move(chosen.highest[1], None if alone else "train")
    for shard in chosen.shards.values():
        settings.output.delete_file(shard["name"])
    fragment = fragments[chosen.index]
    results[results.index(chosen)] = _prepare_fragment(settings, fragment, move)
    return alone


def _cut_chunks(settings: _Settings, split: Split, results: list[_Result]) -> list[Shard]:
    """The shards of a split, written again where the split is too small for full chunks."""
    shards = [Shard.from_json(r.shards[split]) for r in results if split in r.shards]
    size = chunk_size(sum(shard.tokens for shard in shards), settings.chunk_tokens)
    return [
        shard
        if all(chunk.tokens <= size for chunk in shard.chunks)
        else _rewrite(settings, shard, size)
        for shard in shards
    ]


def _rewrite(settings: _Settings, shard: Shard, chunk_tokens: int) -> Shard:
    """Only for small splits (under 256 full chunks), so a shard fits into memory."""
    file = pa.BufferReader(settings.output.read_bytes(shard.name))
    tokens = pq.read_table(file, columns=[COLUMN]).column(0).to_numpy()
    with ShardWriter(settings.output, shard.name, tokens.dtype, chunk_tokens) as writer:
        writer.add(tokens)
    rewritten = writer.finished()
    assert rewritten is not None, "a shard that is rewritten has tokens"
    return rewritten


def _manifest(
    settings: _Settings,
    files: list[InputFile],
    results: list[_Result],
    divided: bool,
    shards: dict[Split, list[Shard]],
) -> dict[str, Any]:
    """Nothing in it depends on time, place or the number of tasks."""
    tokenizer = load_tokenizer(settings.tokenizer)
    return {
        "version": FORMAT_VERSION,
        "tokenizer": {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            "n_vocab": tokenizer.n_vocab,
            "eot": tokenizer.eot,
        },
        "dtype": tokenizer.dtype.name,
        "val_fraction": settings.val_fraction,
        "seed": settings.seed,
        "divided": divided,
        "input": {
            "files": len(files),
            "input_bytes": sum(file.size for file in files),
            "empty": sum(result.empty for result in results),
            "replaced": sum(result.replaced for result in results),
        },
        "splits": {
            split: {
                "documents": sum(result.documents[split] for result in results),
                "tokens": sum(shard.tokens for shard in shards[split]),
                "shards": [shard.to_json() for shard in shards[split]],
            }
            for split in SPLITS
        },
    }
