"""A file comes in, its content goes out in blocks of bytes, decompressed; what it holds is told by its first bytes.

A compressed file is read as a stream, so that neither its size nor what it expands to is ever held in memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa


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
        """At most ``size`` bytes; none at the end."""
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
        """What follows the stream that has ended, from the first byte that is not zero."""
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
    """Whether the file begins with ``magic``."""
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _decompressed(raw: IO[bytes]) -> Any:
    """A stream with ``read``; a file's name says nothing about its compression."""
    head = raw.read(max(map(len, _DECOMPRESSORS)))
    raw.seek(0)
    return next((opened(raw) for magic, opened in _DECOMPRESSORS.items() if head.startswith(magic)), raw)


def _read_head(stream: Any) -> bytes:
    """Enough to tell what it is; a decompressor may give less than is asked for."""
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
