"""Whatever holds the same records gives the same records; whatever does not is one line that says what it is."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reflectron.engine.config import DataFile
from reflectron.engine.data import json_records
from reflectron.engine.data import json_records as byte_blocks
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import read_chunks, read_records, read_rows

ROWS = [
    {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    {"instruction": 'brackets ]}[{ , \\ " \\" and é ☕', "output": "a\n\tb\r\n", "n": [[1], {"x": [2, {}]}]},
    {"instruction": "Say hi.", "input": None, "output": "hi"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ONE_LINE = json.dumps(ROWS, ensure_ascii=False).encode()
PRETTY = json.dumps(ROWS, indent=2).encode()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in content.splitlines()]), sink)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, bytes] = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "lines.ndjson": LINES,
    "no-end.jsonl": LINES.rstrip(b"\n"),
    "blank.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n \n"),
    "crlf.jsonl": LINES.replace(b"}\n", b"}\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "array.json": ONE_LINE,
    "array.jsonl": ONE_LINE,
    "pretty.json": PRETTY,
    "pretty-crlf.json": PRETTY.replace(b"\n", b"\r\n"),
    "late.json": b"\xef\xbb\xbf\n  \n" + PRETTY + b"\n\n",
    "lines-in-brackets.json": b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n",
    "lines.jsonl.gz": gzip.compress(LINES),
    "array.json.gz": gzip.compress(PRETTY),
    "bare.gz": gzip.compress(LINES),
    "two-members.jsonl.gz": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "lines.jsonl.bz2": bz2.compress(LINES),
    "two-members.jsonl.bz2": bz2.compress(LINES[:100]) + bz2.compress(LINES[100:]),
    "lines.jsonl.xz": lzma.compress(LINES),
    "two-members.jsonl.xz": lzma.compress(LINES[:100]) + bytes(8) + lzma.compress(LINES[100:]) + bytes(512),
    "skippable.jsonl.zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + zstd(LINES),
    "array.json.zst": zstd(ONE_LINE),
    "two-frames.jsonl.zst": zstd(LINES[:100]) + zstd(LINES[100:]),
    "named-plain.jsonl": gzip.compress(LINES),
    "named-compressed.jsonl.gz": LINES,
    "named-otherwise.json.zst": lzma.compress(PRETTY),
}


def decoded(path: Path) -> list[object]:
    return [record.decoded() for record in read_records(DataFile(path=str(path)))]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    """Also where blocks end inside a character, an escape or a number."""
    monkeypatch.setattr(byte_blocks, "_BLOCK_BYTES", block)
    (tmp_path / name).write_bytes(FORMS[name])
    assert decoded(tmp_path / name) == ROWS
    assert [record.decoded() for record in read_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["table.parquet", "table.jsonl"])
def test_parquet_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": None}]
    (tmp_path / name).write_bytes(parquet("\n".join(map(json.dumps, rows)).encode()))
    assert decoded(tmp_path / name) == rows


def test_records_are_named_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    for content, lines in ((PRETTY, [2, 7, 22]), (ONE_LINE, [1, 1, 1]), (b"\n" + LINES, [2, 3, 4])):
        (tmp_path / "x.json").write_bytes(content)
        records = list(read_records(DataFile(path=str(tmp_path / "x.json"))))
        assert [record.line for record in records] == lines
        assert [record.index for record in records] == [0, 1, 2]


def test_the_share_that_was_read_grows_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_blocks, "_BLOCK_BYTES", 1 << 14)
    for name, content in (("x.jsonl", LINES * 4000), ("x.json.gz", gzip.compress(json.dumps(ROWS * 4000).encode(), 0))):
        (tmp_path / name).write_bytes(content)
        shares = [chunk.share_read for chunk in read_chunks(DataFile(path=str(tmp_path / name)), 500)]
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.9
        assert shares[-1] == 1.0


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "holds no record, expected at least one"),
    "blank.jsonl": (b"\n \r\n", "holds no record"),
    "empty.json": (b" [ ]\n", "holds no record"),
    "empty.jsonl.gz": (gzip.compress(b""), "holds no record"),
    "nothing.jsonl.gz": (gzip.compress(LINES)[:9], "cannot be read: Compressed file ended before"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], "cannot be read: Compressed file ended before"),
    "damaged.jsonl.gz": (gzip.compress(LINES)[:20] + b"xxxx" + gzip.compress(LINES)[24:], "cannot be read: "),
    "wrong-sum.jsonl.gz": (gzip.compress(LINES)[:-6] + b"xx" + gzip.compress(LINES)[-4:], "cannot be read: CRC"),
    "garbage.jsonl.gz": (gzip.compress(LINES) + b"garbage", "cannot be read: Not a gzipped file"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-9], "cannot be read: Compressed file ended before"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-9], "cannot be read: Compressed file ended before"),
    "garbage.jsonl.bz2": (bz2.compress(LINES) + b"garbage", "cannot be read: Invalid data stream"),
    "garbage.jsonl.xz": (lzma.compress(LINES) + b"garbage", "cannot be read: Input format not supported"),
    "damaged-second.jsonl.bz2": (bz2.compress(LINES) + b"BZx9" + bz2.compress(LINES)[4:], "cannot be read: Invalid"),
    "cut-second.jsonl.xz": ((lzma.compress(LINES) * 2)[:-9], "cannot be read: Compressed file ended before"),
    "cut.jsonl.zst": (zstd(LINES)[:-9], "cannot be read: "),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "cannot be read: it is compressed twice"),
    "archive.json": (b"PK\x03\x04....", "cannot be read: it is a zip archive; unpack it"),
    "tar.json.gz": (gzip.compress(b"a" * 257 + b"ustar\x00"), "cannot be read: it is a tar archive"),
    "table.parquet.gz": (gzip.compress(parquet(LINES)), "cannot be read: it is Parquet inside another compression"),
    "table.jsonl.gz": (gzip.compress(parquet(LINES)), "cannot be read: it is Parquet inside another compression"),
    "cut.parquet": (parquet(LINES)[:-9], "cannot be read: "),
    "lines.parquet": (LINES, "cannot be read: Parquet magic bytes not found"),
    "bom16.jsonl": (LINES.decode().encode("utf-16"), "cannot be read: it is UTF-16"),
    "utf16.jsonl": (LINES.decode().encode("utf-16-le"), "cannot be read: it is UTF-16"),
    "utf16be.json": (ONE_LINE.decode().encode("utf-16-be"), "cannot be read: it is UTF-16"),
    "wrapped.json": (
        json.dumps({"data": ROWS}).encode(),
        "object, whose list 'data' holds 3 objects, expected one rec",
    ),
    "rows.json": (json.dumps({"n": 3, "rows": [{"row": r} for r in ROWS]}).encode(), "whose list 'rows' holds 3"),
    "wrapped-pretty.json": (json.dumps({"data": ROWS}, indent=1).encode(), "line 1 begins a JSON object that spans"),
    "wrapped-lines.json": (b'{"data": [\n{"a": "x"},\n{"a": "y"}\n]}', "line 1 begins a JSON object that spans"),
    "object-pretty.json": (json.dumps(ROWS[0], indent=1).encode(), "line 1 begins a JSON object that spans"),
    "columns.json": (b'{"instruction": {"0": "a", "1": "b"}, "output": {"0": "c", "1": "d"}}', "object, of columns"),
    "lists.json": (b'{"instruction": ["a", "b"], "output": ["c", "d"]}', "object, of columns"),
    "cut.json": (PRETTY[:-30], "its JSON array has no end: it is cut on line 24, behind 2 whole elements"),
    "cut-in-string.json": (ONE_LINE[:150], "its JSON array has no end: it is cut on line 1"),
    "two.json": (ONE_LINE + b"\n" + ONE_LINE, "line 2 continues behind the end of its JSON array, expected one array"),
    "more.json": (ONE_LINE + b" x", "line 1 continues behind the end of its JSON array"),
    "brace.json": (ONE_LINE[:-1] + b"}", "its JSON array ends in a brace on line 1"),
    "table.csv": (b"a,b\n", "ends in '.csv', expected one of .jsonl, .json, .ndjson, .parquet, or"),
    "table.csv.gz": (gzip.compress(b"a,b\n"), "ends in '.gz', expected one of"),
    "noname": (LINES, "ends in '', expected one of"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_file_of_records_is_one_line(tmp_path: Path, name: str) -> None:
    content, said = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^data file ") as caught:
        decoded(tmp_path / name)
    assert str(caught.value).startswith(f"data file {tmp_path / name} ")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_folders_and_pipes_are_no_files(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (
        ("pipe.jsonl", "is a pipe or a device"),
        ("folder.jsonl", "is a folder"),
        ("no.gz", "not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            decoded(tmp_path / name)


BAD: list[tuple[bytes, str]] = [
    (b'{"a": "x}', "bad JSON: Unterminated string"),
    (b'{"a": 1', "bad JSON: Expecting ',' delimiter at column 8"),
    (b'{"a": "\xff"}', "not UTF-8: byte 7 of the line is 0xff"),
    (b'{"a": "\x00"}', "bad JSON: Invalid control character"),
    (b"\x00\x00\x00\x00", "bad JSON: Expecting value"),
    (b'{"a": "x", "a": "y"}', "bad JSON: the key 'a' comes twice"),
    (b'{"b": {"\\u001b": 1, "\\u001b": 1}}', "bad JSON: the key '\\x1b' comes twice"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "bad JSON: Exceeds the limit"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad JSON: "),
    (b"{" * 50_000 + b"}" * 50_000, "bad JSON: "),
    (b"{'a': 'x'}", "bad JSON: Expecting property name"),
    (b'{"a": "x"} {"a": "y"}', "bad JSON: Extra data"),
]


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_record_costs_itself_alone(tmp_path: Path, bad: bytes, said: str, form: str) -> None:
    good = json.dumps(ROWS[0]).encode()
    whole = b"\n".join([good, bad, good]) if form == "lines" else b"[" + b",\n".join([good, bad, good]) + b"]"
    if form == "array" and bad.count(b'"') % 2 + abs(bad.count(b"{") - bad.count(b"}")):
        pytest.skip("what is not closed takes the rest of an array with it")
    (tmp_path / "x.json").write_bytes(whole)
    first, second, third = read_records(DataFile(path=str(tmp_path / "x.json")))
    assert first.decoded() == third.decoded() == ROWS[0]
    with pytest.raises(BadRecord) as caught:
        second.decoded()
    assert str(caught.value).startswith(said)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("array", ["[{},,{}]", "[{},]", "[,{}]"])
def test_nothing_beside_a_comma_is_a_bad_record(tmp_path: Path, array: str) -> None:
    (tmp_path / "x.json").write_text(array)
    values = [record.value for record in read_records(DataFile(path=str(tmp_path / "x.json")))]
    assert values.count(b"") == 1
    assert b"{}" in values


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tags": ["a", "b"]},
        {"instruction": "x", "output": "y", "tests": ["a", "b"]},
        {"turns": [{"role": "user", "content": "x"}]},
    ],
)
def test_a_single_record_is_no_whole_dataset(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert decoded(tmp_path / "x.jsonl") == [row]


def test_a_first_line_that_was_cut_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"instruction": "x",\n' + LINES)
    records = list(read_records(DataFile(path=str(tmp_path / "x.jsonl"))))
    assert [record.decoded() for record in records[1:]] == ROWS


def test_long_lines_are_read_and_bombs_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instruction": "x", "output": "y\n" * 1_000_000}
    (tmp_path / "long.json").write_text(json.dumps([row, row]))
    assert decoded(tmp_path / "long.json") == [row, row]
    monkeypatch.setattr(json_records, "_MOST_BYTES", 1 << 20)
    for name, content in (("line.jsonl", b"x" * (3 << 20)), ("array.json", b'["' + b"x" * (3 << 20) + b'"]')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read: a record has more than 1 MiB"):
            decoded(tmp_path / name)
    monkeypatch.setattr(byte_blocks, "_BOMB_BYTES", 1 << 22)
    compressors: list[tuple[str, Callable[[bytes], Any]]] = [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("zst", zstd),
    ]
    for suffix, compress in compressors:
        (tmp_path / f"bomb.jsonl.{suffix}").write_bytes(compress(b" \n" * (1 << 22)))
        with pytest.raises(ValueError, match=r"cannot be read: its .* bytes expand to more than 4 MiB"):
            decoded(tmp_path / f"bomb.jsonl.{suffix}")


def test_a_row_that_python_cannot_hold_costs_itself_alone(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"output": text}), tmp_path / "text.parquet")
    first, second, third = read_records(DataFile(path=str(tmp_path / "text.parquet")))
    assert [first.decoded(), third.decoded()] == [{"output": "good"}, {"output": "fine"}]
    with pytest.raises(BadRecord, match="bad value: "):
        second.decoded()
    dates = pa.array([datetime.date(2024, 1, 1), None]).cast(pa.int32())
    pq.write_table(pa.table({"day": pa.chunked_array([dates]).cast(pa.date32())}), tmp_path / "dates.parquet")
    assert len(decoded(tmp_path / "dates.parquet")) == 2


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["output", "output"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="cannot be read: its column 'output' comes twice"):
        decoded(tmp_path / "x.parquet")
