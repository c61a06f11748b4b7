"""The files of a corpus: its manifest, its shards, and one chunk of tokens at a time.

A corpus is a folder with Parquet shards and ``manifest.json``, which is written last:
without it there is no corpus.  A shard has one column, ``tokens``; its row groups are the
chunks, each checked against the manifest whenever it is read.  What it gives up: reading
less than a chunk, and use by several threads at once (give each its own copy; copies are
small and share nothing).
"""

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raygpt.errors import UserError
from raygpt.storage import Folder, check_name, reason_of

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
COLUMN = "tokens"
_OPEN_SHARDS = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """One row group: ``tokens`` counts them, ``sha256`` is over their little-endian bytes."""

    shard: str
    row_group: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One Parquet file: ``size`` in bytes, ``sha256`` over the file."""

    name: str
    size: int
    sha256: str
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    def to_json(self) -> dict[str, Any]:
        chunks = [
            {"row_group": chunk.row_group, "tokens": chunk.tokens, "sha256": chunk.sha256}
            for chunk in self.chunks
        ]
        return {"name": self.name, "size": self.size, "sha256": self.sha256, "chunks": chunks}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Shard":
        """Inverse of :meth:`to_json`; UserError if the name points outside the folder."""
        name = check_name(_typed(value["name"], str))
        chunks = [
            Chunk(
                name,
                _typed(chunk["row_group"], int),
                _typed(chunk["tokens"], int),
                _typed(chunk["sha256"], str),
            )
            for chunk in value["chunks"]
        ]
        size, digest = _typed(value["size"], int), _typed(value["sha256"], str)
        return cls(name, size, digest, tuple(chunks))


@dataclass(frozen=True)
class Corpus:
    """An open corpus; made with :func:`open_corpus`. Pickles without its open files."""

    path: str
    tokenizer: str
    tokenizer_hash: str
    n_vocab: int
    eot: int
    dtype: np.dtype
    fingerprint: str
    """sha256 hex over what defines the data: tokenizer, dtype, chunks of both splits in order."""
    _shards: dict[Split, tuple[Shard, ...]] = field(repr=False, compare=False)
    _chunks: dict[Split, tuple[Chunk, ...]] = field(repr=False, compare=False)
    _open: "OrderedDict[str, pq.ParquetFile]" = field(
        default_factory=OrderedDict, repr=False, compare=False
    )

    def chunks(self, split: Split) -> tuple[Chunk, ...]:
        """The chunks of a split, in the order that numbers them."""
        return self._chunks[split]

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of a split, in the order of their chunks."""
        return self._shards[split]

    def tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return sum(chunk.tokens for chunk in self._chunks[split])

    def read_chunk(self, split: Split, index: int) -> np.ndarray:
        """The tokens of one chunk: 1-D, ``chunks(split)[index].tokens`` long, of ``dtype``.

        Raises:
            UserError: the shard is missing or damaged; names the file and the row group.
        """
        chunk = self._chunks[split][index]
        where = f"{Folder.from_path(self.path).child(chunk.shard)}, row group {chunk.row_group}"
        try:
            table = self._parquet(chunk.shard).read_row_group(
                chunk.row_group, columns=[COLUMN], use_threads=False
            )
            tokens = table.column(0).to_numpy()
        except (OSError, pa.ArrowException, IndexError) as error:
            self._open.pop(chunk.shard, None)  # what is mended meanwhile is found next time
            raise UserError(f"cannot read {where}: {reason_of(error)}") from error
        if tokens.dtype != self.dtype or len(tokens) != chunk.tokens:
            found = f"{len(tokens)} tokens of {tokens.dtype}"
            problem = f"{found} instead of {chunk.tokens} of {self.dtype}"
        elif _chunk_hash(tokens) != chunk.sha256:
            problem = "its tokens do not match the manifest's sha256"
        else:
            return tokens
        self._open.pop(chunk.shard, None)
        raise UserError(f"{where} is damaged: {problem}; restore the file or prepare anew")

    def check_files(self) -> None:
        """Check that every shard is there with the right size; reads none of them.

        Raises:
            UserError: names the first file that is not.
        """
        check_shards(
            Folder.from_path(self.path), [s for split in SPLITS for s in self._shards[split]]
        )

    def _parquet(self, shard: str) -> pq.ParquetFile:
        if shard not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close(force=True)
            source = Folder.from_path(self.path).open_input(shard)
            self._open[shard] = pq.ParquetFile(source)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_corpus(path: str) -> Corpus:
    """Open the corpus at a local path or cloud URI; reads the manifest only.

    Raises:
        UserError: there is no such folder, it has no manifest, the manifest is damaged or of
            another version, or it names a shard outside the folder.
    """
    folder = Folder.from_path(path)
    try:
        manifest = json.loads(folder.read_bytes(MANIFEST))
    except FileNotFoundError as error:
        if not folder.exists():
            raise UserError(f"corpus {folder} does not exist; jobs/prepare.py makes one") from error
        raise UserError(
            f"{folder} has no {MANIFEST}: it is no corpus, or one that was not finished; "
            "run jobs/prepare.py into a new folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, error) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(
            f"corpus {folder} has format version {version}; this raygpt reads {FORMAT_VERSION}: "
            "prepare it anew"
        )
    try:
        return _parse(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error


def _parse(folder: Folder, manifest: dict[str, Any]) -> Corpus:
    _typed(manifest["version"], int)
    tokenizer = manifest["tokenizer"]
    try:
        shards = {
            split: tuple(Shard.from_json(value) for value in manifest["splits"][split]["shards"])
            for split in SPLITS
        }
    except UserError as error:
        raise UserError(f"corpus {folder} points outside its folder: {error}") from error
    chunks = {
        split: tuple(chunk for shard in shards[split] for chunk in shard.chunks) for split in SPLITS
    }
    dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[manifest["dtype"]])
    for split in SPLITS:
        if sum(chunk.tokens for chunk in chunks[split]) != manifest["splits"][split]["tokens"]:
            raise ValueError(f"the chunks of {split} do not add up to its tokens")
    return Corpus(
        path=folder.uri,
        tokenizer=_typed(tokenizer["name"], str),
        tokenizer_hash=_typed(tokenizer["hash"], str),
        n_vocab=_typed(tokenizer["n_vocab"], int),
        eot=_typed(tokenizer["eot"], int),
        dtype=dtype,
        fingerprint=_fingerprint(tokenizer["hash"], dtype, chunks),
        _shards=shards,
        _chunks=chunks,
    )


def _fingerprint(
    tokenizer_hash: str, dtype: np.dtype, chunks: dict[Split, tuple[Chunk, ...]]
) -> str:
    # Without shard names and file hashes: the same tokens in other files are the same data.
    content = [
        tokenizer_hash,
        dtype.name,
        *([[chunk.tokens, chunk.sha256] for chunk in chunks[split]] for split in SPLITS),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class ShardWriter:
    """Streams tokens into a shard, a row group of ``chunk_tokens`` at a time (the last: the rest).

    To be used in a ``with`` block.  The file appears with its first chunk; without tokens there
    is none.  Memory: a chunk, and what Parquet needs to write one.

    Raises:
        UserError: the file cannot be written (permission, space).
    """

    def __init__(self, folder: Folder, name: str, dtype: np.dtype, chunk_tokens: int) -> None:
        self._folder, self._name = folder, name
        self._schema = pa.schema([pa.field(COLUMN, pa.from_numpy_dtype(dtype), nullable=False)])
        self._waiting = np.empty(chunk_tokens, dtype)
        self._count = 0
        self._chunks: list[Chunk] = []
        self._sink: _HashingSink | None = None
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._count:
            self._write(self._waiting[: self._count])
        if self._writer is not None and self._sink is not None:
            with self._explained():
                self._writer.close()
                self._sink.close()

    def add(self, tokens: np.ndarray) -> None:
        """Append 1-D ``tokens`` of the shard's dtype."""
        while len(tokens):
            taken = tokens[: len(self._waiting) - self._count]
            self._waiting[self._count : self._count + len(taken)] = taken
            self._count += len(taken)
            tokens = tokens[len(taken) :]
            if self._count == len(self._waiting):
                self._write(self._waiting)
                self._count = 0

    def finished(self) -> Shard | None:
        """After the ``with`` block: what was written; None if there was no token."""
        if self._sink is None:
            return None
        digest = self._sink.digest.hexdigest()
        return Shard(self._name, self._sink.size, digest, tuple(self._chunks))

    def _write(self, chunk: np.ndarray) -> None:
        with self._explained():
            if self._writer is None:
                self._sink = _HashingSink(self._folder.open_output(self._name))
                # Parquet stores 16 bits as 32; with the bytes apart, zstd finds the high ones 0.
                self._writer = pq.ParquetWriter(
                    pa.PythonFile(self._sink, mode="w"),
                    self._schema,
                    compression="zstd",
                    use_dictionary=False,
                    column_encoding={COLUMN: "BYTE_STREAM_SPLIT"},
                    write_statistics=False,
                )
            table = pa.table([pa.array(chunk)], schema=self._schema)
            self._writer.write_table(table, row_group_size=len(chunk))
        self._chunks.append(Chunk(self._name, len(self._chunks), len(chunk), _chunk_hash(chunk)))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            place = self._folder.child(self._name)
            raise UserError(f"cannot write {place}: {reason_of(error)}") from error


class _HashingSink:
    """A file for writing that knows its size and sha256 without being read again."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._file.close()


def _chunk_hash(tokens: np.ndarray) -> str:
    """sha256 hex over the little-endian bytes of 1-D ``tokens``."""
    return hashlib.sha256(
        tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).data
    ).hexdigest()


def check_shards(folder: Folder, shards: list[Shard]) -> None:
    """Check, with one listing of the folder, that the files are there with the right sizes.

    Raises:
        UserError: names the first that is missing or has another size.
    """
    sizes = dict(folder.walk())
    for shard in shards:
        if shard.name not in sizes:
            raise UserError(f"{folder.child(shard.name)} is missing; every machine must reach it")
        if sizes[shard.name] != shard.size:
            raise UserError(
                f"{folder.child(shard.name)} is damaged: it has {sizes[shard.name]} bytes "
                f"instead of {shard.size}; restore the file or prepare anew"
            )


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _damaged(folder: Folder, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}"
    return UserError(f"{folder.child(MANIFEST)} is damaged ({reason}); prepare the corpus anew")
