"""Every kind of input file, and everything that can be wrong with one."""

import gzip
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raygpt.data.sources import Tally, list_inputs, plan_fragments, read_documents
from raygpt.errors import UserError
from raygpt.storage import Folder

ALL = 2**40


def plain(data: bytes) -> bytes:
    return data


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def read(path: Path | str, column: str = "text", at_least: int = ALL) -> tuple[list[str], Tally]:
    tally = Tally()
    fragments = plan_fragments(list_inputs([str(path)]), column, at_least)
    parts = [part for fragment in fragments for part in fragment.parts]
    return [text for part in parts for text in read_documents(part, column, tally)], tally


def fails(path: Path | str, column: str = "text") -> str:
    with pytest.raises(UserError) as error:
        read(path, column)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("end", "pack"), [("", plain), (".gz", gzip.compress), (".zst", zstd)])
def test_text(tmp_path: Path, end: str, pack: Callable[[bytes], bytes]) -> None:
    for name in ("a.txt", "b.md", "c"):
        (tmp_path / (name + end)).write_bytes(pack(f"{name}\r\n\nsecond line, é\n".encode()))
    assert read(tmp_path) == (
        [f"{name}\r\n\nsecond line, é\n" for name in ("a.txt", "b.md", "c")],
        Tally(),
    )


@pytest.mark.parametrize(("end", "pack"), [("", plain), (".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json"])
def test_json_lines(tmp_path: Path, kind: str, end: str, pack: Callable[[bytes], bytes]) -> None:
    lines = [
        '{"text": "one\\nline", "id": 1}',
        "",
        '{"id": 2, "text": null}',
        '{"text": ""}',
        '{"text": "\\ud83d\\ude00 \\ud800!"}',
    ]
    (tmp_path / f"a.{kind}{end}").write_bytes(pack("\n".join(lines).encode()))
    assert read(tmp_path) == (["one\nline", "😀 \ufffd!"], Tally(empty=2, replaced=1))
    assert fails(tmp_path, "body").endswith(
        f"a.{kind}{end}, line 1: no column 'body'; there are: text, id (--text-column)"
    )


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", None, "", "zwei", "drei"]
    column = pa.array([t and t.encode() for t in texts], pa.binary()).cast(pa.string()).cast(kind)
    table = pa.table({"body": column, "n": range(5)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path, "body") == (["one", "zwei", "drei"], Tally(empty=2))
    assert fails(tmp_path).endswith(
        "a.parquet: no column 'text'; there are: body, n (--text-column)"
    )
    assert fails(tmp_path, "n").endswith("a.parquet: column 'n' holds int64, not text")


def test_large_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    texts = [f"{i} " * 100 for i in range(50)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="none")
    (tmp_path / "b.txt").write_text("tail")
    files = list_inputs([str(tmp_path)])
    fragments = plan_fragments(files, "text", 4000)
    assert [[part.row_groups for part in f.parts] for f in fragments] == [
        [(0, 1)],
        [(2, 3)],
        [(4,), None],
    ]
    assert [fragment.index for fragment in fragments] == [0, 1, 2]
    assert read(tmp_path, at_least=1)[0] == read(tmp_path)[0] == [*texts, "tail"]


def test_fragments_are_filled_in_order(tmp_path: Path) -> None:
    for name, size in [("a", 5), ("b", 6), ("c", 30), ("d", 1), ("e", 2)]:
        (tmp_path / name).write_text("x" * size)
    fragments = plan_fragments(list_inputs([str(tmp_path)]), "text", 10)
    assert [[part.file.name for part in f.parts] for f in fragments] == [
        ["a", "b"],
        ["c"],
        ["d", "e"],
    ]


def test_invalid_unicode_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb\xe2\x82 \xef\xbf\xbd")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "c\xfe"}\n')
    binary = pa.array([b"d\xfd"]).view(pa.string())
    pq.write_table(pa.table({"text": binary}), tmp_path / "c.parquet")
    texts, tally = read(tmp_path)
    assert texts == ["a\ufffdb\ufffd \ufffd", "c\ufffd", "d\ufffd"]
    assert tally == Tally(replaced=4)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffword \ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "\ufeffx"}'.encode())
    assert read(tmp_path)[0] == ["word \ufeff", "\ufeffx"]


def test_inputs_are_sorted_and_listed_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b/c/d.jsonl", ".git/x.txt", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*patterns: str) -> list[str]:
        files = list_inputs([str(tmp_path / pattern) for pattern in patterns])
        return [str(Path(file.uri).relative_to(tmp_path)) for file in files]

    everything = ["a.txt", "b/10.txt", "b/2.txt", "b/c/d.jsonl"]
    assert names("") == names("b", "a.txt", "b/2.txt", "**/*.txt") == everything
    assert names("*.txt") == ["a.txt"]
    assert names("**/*.txt") == ["a.txt", "b/10.txt", "b/2.txt"]
    assert names("b/[0-9].txt") == names("b/?.txt") == ["b/2.txt"]
    assert names("**") == everything
    assert list_inputs([str(tmp_path / "b/2.txt")])[0].size == 7


def test_a_name_with_glob_characters_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("x")
    (tmp_path / "a.txt").write_text("y")
    assert read(tmp_path / "[a].txt")[0] == ["x"]


def test_inputs_in_a_store() -> None:
    uri = f"mock:///bucket/{uuid.uuid4().hex}"
    folder = Folder.from_path(uri)
    folder.write_bytes("in/a.txt.gz", gzip.compress(b"one"))
    folder.write_bytes("in/deep/b.jsonl", b'{"text": "two"}')
    assert read(uri)[0] == ["one", "two"]
    assert read(f"{uri}/in/**/*.jsonl")[0] == ["two"]
    assert read(f"{uri}/in/a.txt.gz")[0] == ["one"]
    assert fails(f"{uri}/in/*.parquet") == f"input {uri}/in/*.parquet matches no file"


def test_nothing_to_read(tmp_path: Path) -> None:
    assert fails(tmp_path / "no.txt") == f"input {tmp_path}/no.txt does not exist"
    assert fails(tmp_path / "*.txt") == f"input {tmp_path}/*.txt matches no file"
    assert fails(tmp_path) == f"input folder {tmp_path} holds no files"
    assert fails(tmp_path / "a**b").startswith(f"input {tmp_path}/a**b: Invalid pattern")
    with pytest.raises(UserError, match=r"^no input was given"):
        list_inputs([])


@pytest.mark.parametrize(("end", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_compression(
    tmp_path: Path, kind: str, end: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.{kind}{end}"
    line = json.dumps({"text": "some words " * 50}) + "\n"
    path.write_bytes(pack(line.encode() * 50)[:-6])
    assert fails(path) == f"cannot read {path}: Truncated compressed stream"
    path.write_bytes(line.encode())
    assert fails(path).startswith(f"cannot read {path}: ")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i} " * 100 for i in range(100)]})
    pq.write_table(table, path, use_dictionary=False, write_page_checksum=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert fails(path).startswith(f"cannot read {path}: Parquet magic bytes not found")
    path.write_bytes(b"")
    assert fails(path).startswith(f"cannot read {path}: Parquet file size is 0 bytes")
    path.write_bytes(whole[:1500] + bytes(100) + whole[1600:])
    assert fails(path).startswith(f"cannot read {path}: could not verify page integrity")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "not valid JSON (Expecting ',' delimiter, column 13)"),
        ('["x"]', "a JSON object is needed, not list"),
        ('{"text": 5}', "column 'text' holds int, not text"),
        ('{"body": "x"}', "no column 'text'; there are: body (--text-column)"),
        ("[" * 100_000, "JSON that cannot be read ("),
    ],
)
def test_bad_json_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    assert fails(path).startswith(f"{path}, line 3: {message}")


def test_binary_files_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.bin").write_bytes(b"PK\0\1")
    with pytest.raises(UserError, match=r"b\.bin is not UTF-8 text \(it holds zero bytes\)"):
        plan_fragments(list_inputs([str(tmp_path)]), "text", ALL)


@given(st.lists(st.text(min_size=1)))
def test_json_lines_and_parquet_keep_every_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode())
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "b.parquet")
    assert read(folder) == (texts * 2, Tally())
