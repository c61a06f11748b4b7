"""Input files of many kinds as one stream of documents.

=============================  =========================================================
``.parquet``                   one document a row, from the text column
``.jsonl .ndjson .json``       one JSON object a line, one document each; also ``.gz .zst``
anything else                  UTF-8 text, one document a file; also ``.gz .zst``
=============================  =========================================================

Parquet and JSON lines are read piece by piece; a plain text file is held whole,
since it is one document.  What it gives up: guessing.  Only names decide how a file
is read, and files or folders whose names begin with a dot are not looked at.
"""

import contextlib
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from raygpt.errors import UserError
from raygpt.storage import Folder, reason_of

Kind = Literal["parquet", "jsonl", "text"]
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_MAGIC = re.compile(r"[*?\[]")
_BOM = "\ufeff"
_REPLACEMENT = "\ufffd"
_PEEK = 2**16
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class InputFile:
    """A file to read: ``name`` inside ``folder``, ``size`` bytes as stored."""

    folder: Folder
    name: str
    size: int

    @property
    def uri(self) -> str:
        return self.folder.child(self.name).uri

    @property
    def codec(self) -> str | None:
        """``gzip``, ``zstd`` or None."""
        return _CODECS.get(posixpath.splitext(self.name.lower())[1])

    @property
    def kind(self) -> Kind:
        stem, extension = posixpath.splitext(self.name.lower())
        if extension in _CODECS:
            extension = posixpath.splitext(stem)[1]
        return _KINDS.get(extension, "text")


@dataclass(frozen=True)
class Part:
    """What is read in one go: a file, or some of a Parquet file's row groups; ``size`` in bytes."""

    file: InputFile
    row_groups: tuple[int, ...] | None
    size: int


@dataclass(frozen=True)
class Fragment:
    """Consecutive parts that one task reads; numbered from 0."""

    index: int
    parts: tuple[Part, ...]


@dataclass
class Tally:
    """What :func:`read_documents` met on its way."""

    empty: int = 0
    """Documents left out because they are null or have no character."""
    replaced: int = 0
    """U+FFFD put in place of what is not valid Unicode."""


def list_inputs(paths: Iterable[str]) -> list[InputFile]:
    """The files that ``paths`` (files, folders, globs; local or cloud) stand for.

    Folders are searched to the bottom; in globs ``**`` stands for any number of folders.
    Sorted by path; a file named twice is listed once.

    Raises:
        UserError: a path that is not there, a glob without a match, a folder without files.
    """
    files = {file.uri: file for path in paths for file in _expand(path)}
    if not files:
        raise UserError("no input was given; name files, folders or globs")
    return [files[uri] for uri in sorted(files)]


def _expand(path: str) -> list[InputFile]:
    place = Folder.from_path(path)
    if place.is_file():
        folder, name = place.split()
        return [InputFile(folder, name, folder.size(name))]
    if place.exists():
        found = _visible(place, place.walk())
        if not found:
            raise UserError(f"input folder {place} holds no files")
        return found
    if not _MAGIC.search(place.path):
        raise UserError(f"input {place} does not exist")
    parts = place.path.split("/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    base = Folder(place.root, "/".join(parts[:fixed]) or ("" if place.root else "/"))
    try:
        pattern = re.compile(glob_translate("/".join(parts[fixed:])))
    except ValueError as error:
        raise UserError(f"input {path}: {error}") from error
    below = base.walk(recursive=len(parts) > fixed + 1 or parts[fixed] == "**")
    found = _visible(base, [entry for entry in below if pattern.match(entry[0])])
    if not found:
        raise UserError(f"input {place} matches no file")
    return found


def _visible(folder: Folder, entries: list[tuple[str, int]]) -> list[InputFile]:
    return [
        InputFile(folder, name, size)
        for name, size in entries
        if not any(part.startswith(".") for part in name.split("/"))
    ]


def plan_fragments(files: list[InputFile], text_column: str, at_least: int) -> list[Fragment]:
    """All of ``files`` in order, in fragments of ``at_least`` bytes (the last may be smaller).

    Looks at the beginning of each file (Parquet: the footer), so that most of what can be wrong
    is known before work starts.  Only Parquet files are cut, between row groups.

    Raises:
        UserError: a file cannot be read, is not what its name says, or lacks the text column.
    """
    with ThreadPoolExecutor(16) as pool:  # nearly all of it is waiting for the storage
        inspected = list(pool.map(lambda file: _inspect(file, text_column, at_least), files))
    fragments: list[Fragment] = []
    group: list[Part] = []
    size = 0
    for part in (part for parts in inspected for part in parts):
        group.append(part)
        size += part.size
        if size >= at_least:
            fragments.append(Fragment(len(fragments), tuple(group)))
            group, size = [], 0
    return [*fragments, Fragment(len(fragments), tuple(group))] if group else fragments


def _inspect(file: InputFile, text_column: str, part_bytes: int) -> list[Part]:
    """Check a file, and cut it into parts of at least ``part_bytes`` if it is larger Parquet."""
    whole = [Part(file, None, file.size)]
    with _readable(file):
        if file.kind == "parquet":
            with _open_parquet(file, text_column) as parquet:
                return _cut(file, parquet.metadata, part_bytes) or whole
        if file.kind == "jsonl":
            next(_json_documents(file, text_column, Tally()), None)
        else:
            with file.folder.open_stream(file.name, file.codec) as stream:
                if b"\0" in stream.read(_PEEK):
                    raise UserError(
                        f"{file.uri} is not UTF-8 text (it holds zero bytes); "
                        "give text, JSON lines or Parquet, plain or as .gz or .zst"
                    )
    return whole


def _cut(file: InputFile, metadata: pq.FileMetaData, part_bytes: int) -> list[Part]:
    if file.size <= part_bytes:
        return []
    parts: list[Part] = []
    groups: list[int] = []
    size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        groups.append(index)
        size += sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if size >= part_bytes or index == metadata.num_row_groups - 1:
            parts.append(Part(file, tuple(groups), size))
            groups, size = [], 0
    return parts


def read_documents(part: Part, text_column: str, tally: Tally) -> Iterator[str]:
    """The documents of ``part`` in order, none of them empty; counts into ``tally``.

    Raises:
        UserError: the file cannot be read, is damaged, or a document is not text; JSON lines are
            named with their line number.
    """
    file = part.file
    with _readable(file):
        if file.kind == "parquet":
            documents = _parquet_documents(part, text_column, tally)
        elif file.kind == "jsonl":
            documents = _json_documents(file, text_column, tally)
        else:
            documents = _text_document(file, tally)
        for text in documents:
            if text:
                yield text
            else:
                tally.empty += 1


def _text_document(file: InputFile, tally: Tally) -> Iterator[str]:
    with file.folder.open_stream(file.name, file.codec) as stream:
        yield _decode(stream.read(), tally).removeprefix(_BOM)


def _json_documents(file: InputFile, text_column: str, tally: Tally) -> Iterator[str | None]:
    with file.folder.open_stream(file.name, file.codec) as stream:
        for number, line in enumerate(io.BufferedReader(stream, 2**20), start=1):
            where = f"{file.uri}, line {number}"
            text = _decode(line, tally)
            if number == 1:
                text = text.removeprefix(_BOM)
            text = text.strip()
            if not text:
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                problem = f"{error.msg}, column {error.colno}"
                raise UserError(f"{where}: not valid JSON ({problem})") from error
            except (ValueError, RecursionError) as error:  # a huge number, deep nesting
                raise UserError(f"{where}: JSON that cannot be read ({error})") from error
            yield _json_text(record, where, text_column, tally)


def _json_text(record: Any, where: str, text_column: str, tally: Tally) -> str | None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    if text_column not in record:
        raise _missing_column(where, text_column, record)
    value = record[text_column]
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: column {text_column!r} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # an escape such as \ud800 that is half a character
        whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        tally.replaced += whole.count(_REPLACEMENT) - value.count(_REPLACEMENT)
        return whole
    return value


def _parquet_documents(part: Part, text_column: str, tally: Tally) -> Iterator[str | None]:
    with _open_parquet(part.file, text_column) as parquet:
        batches = parquet.iter_batches(
            _PARQUET_ROWS, row_groups=part.row_groups, columns=[text_column], use_threads=False
        )
        for batch in batches:
            # As bytes, since Parquet does not promise that its strings are valid UTF-8.
            for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield None if data is None else _decode(data, tally)


@contextlib.contextmanager
def _open_parquet(file: InputFile, text_column: str) -> Iterator[pq.ParquetFile]:
    with (
        file.folder.open_input(file.name) as source,
        pq.ParquetFile(source, page_checksum_verification=True) as parquet,
    ):
        schema = parquet.schema_arrow
        if text_column not in schema.names:
            raise _missing_column(file.uri, text_column, schema.names)
        kind = schema.field(text_column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or
                pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) or
                pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)):  # fmt: skip
            raise UserError(f"{file.uri}: column {text_column!r} holds {kind}, not text")
        yield parquet


def _missing_column(where: str, text_column: str, names: Iterable[str]) -> UserError:
    known = ", ".join(names) or "none"
    return UserError(f"{where}: no column {text_column!r}; there are: {known} (--text-column)")


def _decode(data: bytes, tally: Tally) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        tally.replaced += text.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())
        return text


@contextlib.contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file.uri}: {reason_of(error)}") from error
