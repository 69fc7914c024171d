"""Records of a JSON file as bytes, each with the line on which it begins, out of blocks of bytes.

A file is plain or compressed, which its first bytes tell, and holds one record a line or one array whose elements are
the records, over as many lines as it likes. None of it is held in memory: compressed files are streamed, and an array
is cut at its own commas without being parsed, so that a bad element costs that record alone.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from reflectron.engine.data.conversation import BadRecord


def _zstd(raw: IO[bytes]) -> Any:
    # The standard library has no zstd before Python 3.14.
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


class _Members:
    """Compressed streams one after another, with zeros between or behind them.

    Python's own readers of bzip2 and xz end without a word where a stream behind the first is damaged.
    """

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new, self._decoder = raw, new, new()

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes; none at the end."""
        while True:
            data = b""
            if self._decoder.eof:
                if not (data := self._behind()):
                    return b""
                self._decoder = self._new()
            elif self._decoder.needs_input and not (data := self._raw.read(_BLOCK_BYTES)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if block := self._decoder.decompress(data, size):
                return block

    def _behind(self) -> bytes:
        """Return what follows the stream that has ended, from the first byte that is not zero."""
        data = self._decoder.unused_data.lstrip(b"\0")
        while not data and (more := self._raw.read(_BLOCK_BYTES)):
            data = more.lstrip(b"\0")
        return data


_DECOMPRESSORS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": lambda raw: _Members(raw, bz2.BZ2Decompressor),
    b"\xfd7zXZ\x00": lambda raw: _Members(raw, lzma.LZMADecompressor),
    b"\x28\xb5\x2f\xfd": _zstd,
    # A frame that is skipped, with which pzstd begins.
    b"\x50\x2a\x4d\x18": _zstd,
}
"""By the bytes with which a compressed file begins."""
PARQUET_MAGIC = b"PAR1"
# What a file of text cannot start with, and what to do about it.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (PARQUET_MAGIC, "Parquet inside another compression; unpack it"),
    (b"ARROW1", "an Arrow file; write it as Parquet or JSON lines"),
    (b"\xff\xff\xff\xff", "an Arrow stream; write it as Parquet or JSON lines"),
    (codecs.BOM_UTF16_LE, "UTF-16 (or UTF-32); write it as UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16; write it as UTF-8"),
    *((magic, "compressed twice; unpack it once") for magic in _DECOMPRESSORS),
)
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_BLOCK_BYTES, _HEAD_BYTES = 1 << 20, 512
# A file of records shrinks to a tenth, at the very most to a hundredth; bombs of gzip reach a thousandth, others more.
_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 200


class ByteBlocks:
    """The content of a file from its start, once; without the byte order mark of UTF-8.

    Iterating raises ``OSError``, ``EOFError`` or an error of the decompressor where the file is cut or damaged, and
    ``ValueError`` where it holds something else than text.
    """

    share_read: float = 0.0
    """Share of the file, 0 to 1, that has been read so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        total, expanded = max(self._path.stat().st_size, 1), 0
        with self._path.open("rb") as raw:
            stream = _decompressed(raw)
            head = _read_head(stream)
            _check_is_text(head)
            block = head.removeprefix(codecs.BOM_UTF8)
            while block:
                expanded += len(block)
                self.share_read = min(raw.tell() / total, 1.0)
                if expanded > max(_BOMB_BYTES, _BOMB_RATIO * total):
                    raise ValueError(
                        f"its {total} bytes expand to more than {_BOMB_BYTES >> 20} MiB, and to more than "
                        f"{_BOMB_RATIO} times themselves; unpack it first if that is meant"
                    )
                yield block
                block = stream.read(_BLOCK_BYTES)


def starts_with(path: Path, magic: bytes) -> bool:
    """Return whether the file begins with ``magic``."""
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _decompressed(raw: IO[bytes]) -> Any:
    """Return a stream with ``read``; a file's name says nothing about its compression."""
    head = raw.read(max(map(len, _DECOMPRESSORS)))
    raw.seek(0)
    return next((opened(raw) for magic, opened in _DECOMPRESSORS.items() if head.startswith(magic)), raw)


def _read_head(stream: Any) -> bytes:
    """Read enough to tell what it is; a decompressor may give less than is asked for."""
    head = b""
    while len(head) < _HEAD_BYTES and (more := stream.read(_BLOCK_BYTES)):
        head += more
    return head


def _check_is_text(block: bytes) -> None:
    for magic, what in _FOREIGN:
        if block.startswith(magic):
            raise ValueError(f"it is {what}")
    if block[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        raise ValueError("it is a tar archive; unpack it")
    # Half of the bytes of a brace in UTF-16.
    if block[:2] in (b"{\x00", b"\x00{", b"[\x00", b"\x00["):
        raise ValueError("it is UTF-16; write it as UTF-8")


_MOST_BYTES = 1 << 29
_STRUCTURE = re.compile(rb'["\[\]{},]')
_OPENING, _CLOSING, _BLOCK_END = (b"[", b"{"), (b"]", b"}"), (b"", b'"')
# Lists of objects that are part of one record.
_PARTS_OF_A_RECORD = ("messages", "conversations", "conversation", "tools", "functions")

RawRecord = tuple[int, bytes]
Undecodable = Literal["strict", "surrogateescape"]


def split_records(blocks: Iterable[bytes]) -> Iterator[RawRecord]:
    """Yield line number and bytes of each record, blank lines skipped.

    Raises:
        ValueError: when the file is neither one record a line nor a whole array.
    """
    stream = iter(blocks)
    start: list[bytes] = []
    for block in stream:
        start.append(block)
        if block.strip():
            break
    stream = chain(start, stream)
    if start and start[-1].lstrip().startswith(b"["):
        yield from _elements(stream)
    else:
        lines = ((number, value) for number, line in _lines(stream) if (value := line.strip()))
        first = list(islice(lines, 2))
        _check_one_a_line(first)
        yield from chain(first, lines)


def decode(value: bytes, errors: Undecodable = "strict") -> object:
    """Parse a record.

    Args:
        errors: what becomes of bytes that are no UTF-8.

    Raises:
        BadRecord: when it is not JSON, or names a key twice.
    """
    try:
        return _DECODER.decode(value.decode(errors=errors))
    except BadRecord:
        raise
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8: byte {error.start} of the line is {value[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"bad JSON: {error.msg} at column {error.colno}") from None
    # Python refuses integers of more than 4300 digits and nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"bad JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: the last of two values would win silently."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRecord(f"bad JSON: the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return columns


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _lines(blocks: Iterable[bytes]) -> Iterator[RawRecord]:
    number, parts, size = 1, list[bytes](), 0
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield number, b"".join([*parts, line]) if parts else line
            number += 1
            parts, size = [], 0
        parts.append(rest)
        size = _grown(size, rest)
    yield number, b"".join(parts)


def _elements(blocks: Iterable[bytes]) -> Iterator[RawRecord]:
    """Yield the elements of an array; its first byte that is not blank is its bracket."""
    line, elements, last = 1, 0, b""
    for text, mark in _joined(_cuts(blocks)):
        value = text.strip()
        begins = line + text[: len(text) - len(text.lstrip())].count(b"\n")
        line += text.count(b"\n")
        if last == b"]" and (value or mark):
            raise ValueError(f"line {begins} continues behind the end of its JSON array, expected one array")
        if last != b"]" and mark == b"":
            raise ValueError(f"its JSON array has no end: it is cut on line {line}, behind {elements} whole elements")
        if mark == b"}":
            raise ValueError(f"its JSON array ends in a brace on line {line}, expected a bracket")
        # Nothing between the brackets is an empty array; nothing beside a comma is a fault.
        if mark in (b",", b"]") and (value or mark == b"," or elements):
            yield begins, value
            elements += 1
        last = mark


def _joined(cuts: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield whole the texts that blocks parted; the last comes without a mark."""
    parts, size = list[bytes](), 0
    for text, mark in cuts:
        parts.append(text)
        size = _grown(size, text)
        if mark:
            yield b"".join(parts), mark
            parts, size = [], 0
    yield b"".join(parts), b""


def _cuts(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the text, and the mark behind it that cuts the outermost array: ``[``, ``,`` or ``]``; no mark at a block's
    end."""
    depth, start = 0, 0
    for block, position, mark in _marks(blocks):
        depth += (mark in _OPENING) - (mark in _CLOSING)
        if mark in _BLOCK_END:
            yield block[start:], b""
            start = 0
        elif depth == (0 if mark in _CLOSING else 1):
            yield block[start:position], mark
            start = position + 1


def _marks(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield each bracket, brace and comma outside of strings: its block, its place there, and itself.

    A block's end comes as a mark of ``_BLOCK_END``: a quote when it lies inside a string.
    """
    in_string, position = False, 0
    for block in blocks:
        while True:
            if in_string:
                quote = block.find(b'"', position)
                end = len(block) if quote < 0 else quote
                # Behind an odd number of backslashes a quote is part of the string, as is the next block's first byte.
                text = block[position:end]
                is_escaped = (len(text) - len(text.rstrip(b"\\"))) % 2 == 1
                if quote < 0:
                    break
                in_string, position = is_escaped, quote + 1
            elif found := _STRUCTURE.search(block, position):
                in_string, position = found.group() == b'"', found.end()
                if not in_string:
                    yield block, found.start(), found.group()
            else:
                is_escaped = False
                break
        position = int(is_escaped)
        yield block, len(block), b'"' if in_string else b""


def _grown(size: int, text: bytes) -> int:
    if size + len(text) > _MOST_BYTES:
        raise ValueError(f"a record has more than {_MOST_BYTES >> 20} MiB")
    return size + len(text)


def _check_one_a_line(first: list[RawRecord]) -> None:
    """Refuse an object that is a whole dataset, on one line or over several.

    Args:
        first: the first two records, if there are as many.
    """
    rows = []
    for _, value in first:
        try:
            rows.append(decode(value))
        except BadRecord:
            rows.append(None)
    if len(rows) == 1 and isinstance(rows[0], dict) and (reason := _whole_dataset(rows[0])):
        raise ValueError(f"it is one JSON object, {reason}")
    if len(first) == 2 and not isinstance(rows[1], dict) and _spans_lines(first[0][1], first[1][1]):
        raise ValueError(
            f"line {first[0][0]} begins a JSON object that spans several lines, expected one record a line or "
            "one array: `jq -c . FILE` writes each object on a line, `jq -c '.data[]' FILE` the objects of its list "
            "'data'"
        )


def _whole_dataset(row: dict[str, Any]) -> str | None:
    """Return how an object holds many records, if it does, and what to do about it."""
    for name, value in row.items():
        inner = value if isinstance(value, list) else []
        is_part = name in _PARTS_OF_A_RECORD or any(isinstance(item, dict) and "role" in item for item in inner)
        if inner and not is_part and all(isinstance(item, dict) for item in inner):
            return (
                f"whose list {name!r} holds {len(inner)} objects, expected one record a line or one array: "
                f"`jq -c '.[\"{name}\"][]' FILE` writes them so"
            )
    columns = [list(v.values()) if isinstance(v, dict) else v for v in row.values() if isinstance(v, (list, dict))]
    cells = [cell for column in columns for cell in column]
    is_flat = any(isinstance(cell, str) for cell in cells) and not any(isinstance(cell, (list, dict)) for cell in cells)
    if len(columns) == len(row) > 1 and len({len(column) for column in columns}) == 1 and is_flat:
        return (
            "of columns, expected one record a line: pandas writes them so with "
            "to_json(FILE, orient='records', lines=True)"
        )
    return None


def _spans_lines(line: bytes, following: bytes) -> bool:
    """Return whether an object that a line begins continues behind it; one that was cut ends in a string or before
    another."""
    marks = [mark for *_, mark in _marks([line])]
    unclosed = sum(mark in _OPENING for mark in marks) > sum(mark in _CLOSING for mark in marks) and marks[-1] != b'"'
    return line.startswith(b"{") and unclosed and (line.endswith(_OPENING) or not following.startswith(b"{"))
