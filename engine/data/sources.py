"""Records of a data file (JSON lines, a JSON array, Parquet, or a dataset of the hub), and what each of them says.

Everything that reads records reads them here. Files are streamed, never held in memory. A chunk keeps records as they
were read (bytes of JSON, or an Arrow batch), so that decoding happens where the chunk is used, which may be another
process (``workers``). ``parse_record`` recognises a record's schema by its columns; each family of schemas is a module
of ``schemas``, and a new one is a module there and a line in ``parse_record``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord, Conversation, checked, present
from reflectron.engine.data.json_records import (
    PARQUET_MAGIC,
    ByteBlocks,
    Undecodable,
    decode,
    split_records,
    starts_with,
)
from reflectron.engine.data.schemas import messages, pairs
from reflectron.engine.files import printable

_EXPECTED_COLUMNS = "; ".join(("messages", *(", ".join(columns) for columns in pairs.COLUMNS)))
_PARQUET = ".parquet"
_SUFFIXES = (".jsonl", ".json", ".ndjson", _PARQUET)
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_EXPECTED_SUFFIXES = f"{', '.join(_SUFFIXES)}, or the first three with {', '.join(_COMPRESSED_SUFFIXES)}"
# What reading a damaged file raises, beside ValueError.
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class Record:
    """One record of a file, not yet parsed."""

    index: int
    """0-based number of the record in its file."""
    line: int
    """1-based line on which it begins, or row where a file has no lines."""
    value: bytes | dict[str, Any] | BadRecord
    """Its JSON, the columns of a row, or why a row has no value that Python could hold."""

    def conversation(self) -> Conversation:
        """Parse the record.

        Raises:
            BadRecord: with the reason.
        """
        return parse_record(self.decoded())

    def decoded(self, errors: Undecodable = "strict") -> object:
        """Return the record's value: named columns, unless its JSON holds something else.

        Args:
            errors: what becomes of bytes that are no UTF-8.

        Raises:
            BadRecord: when it is not JSON, or names a key twice.
        """
        if isinstance(self.value, BadRecord):
            raise self.value
        return decode(self.value, errors) if isinstance(self.value, bytes) else self.value


@dataclass(frozen=True)
class RecordChunk:
    """Consecutive records."""

    first_index: int
    lines: tuple[int, ...]
    values: tuple[bytes, ...] | pa.RecordBatch
    share_read: float
    """Share of the file, 0 to 1, that has been read up to the end of this chunk."""

    def records(self) -> Iterator[Record]:
        """Yield the records in file order."""
        values = _rows(self.values) if isinstance(self.values, pa.RecordBatch) else self.values
        for offset, (line, value) in enumerate(zip(self.lines, values, strict=True)):
            yield Record(self.first_index + offset, line, value)


@dataclass(frozen=True)
class SourceIdentity:
    """What a file held when it was read."""

    size: int
    mtime_ns: int
    sha256: str


def parse_record(record: object) -> Conversation:
    """Turn one record into a conversation.

    Schemas, by columns: ReflectionSeq and OpenAI ``messages``; CodeFeedback ``query``/``answer``; Magicoder
    ``problem``/``solution`` and ``instruction``/``response``; evol ``instruction``/``output``; ``prompt``/
    ``privileged_context``/``completion``. Columns that are null count as absent; others beside these are ignored.

    Raises:
        BadRecord: with the reason.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not an object: found {type(record).__name__}, expected named columns")
    columns = present(record)
    if "messages" in columns:
        return checked(messages.read(columns))
    if (found := pairs.read(columns)) is not None:
        return checked(found)
    for schema in (("messages",), *pairs.COLUMNS):
        if missing := [name for name in schema if name in record and name not in columns]:
            raise BadRecord(f"missing value: {missing[0]} is {record[missing[0]]}, expected a text")
    names = ", ".join(sorted(map(str, columns))) or "none"
    raise BadRecord(f"unknown columns: found {names}; expected one of: {_EXPECTED_COLUMNS}")


def read_records(file: DataFile) -> Iterator[Record]:
    """Yield every record of ``file`` in order; blank lines are no records.

    Raises:
        ValueError: when the file is missing, cannot be read, or holds no record.
    """
    for chunk in read_chunks(file, 64):
        yield from chunk.records()


def read_rows(path: Path) -> Iterator[Record]:
    """Yield every record of a local file of JSON, whatever its name; none where it is empty.

    Raises:
        ValueError: when the file is missing or cannot be read.
    """
    with _readable(path):
        for chunk in _json_chunks(path, 64):
            yield from chunk.records()


def read_chunks(file: DataFile, size: int) -> Iterator[RecordChunk]:
    """Yield the records of ``file`` in order, ``size`` (the last chunk: at most ``size``) at a time.

    Raises:
        ValueError: when the file is missing, cannot be read, or holds no record.
    """
    chunks = _chunks(file, size)
    first = next(chunks, None)
    if first is None:
        raise ValueError(f"data file {file.path} holds no record, expected at least one")
    yield from chain([first], chunks)


def _chunks(file: DataFile, size: int) -> Iterator[RecordChunk]:
    path = Path(file.path)
    if not _is_local(file):
        data = _hub_dataset(file.path, file.split, file.revision)
        with _readable(file.path):
            batches = (b for t in data.with_format("arrow").iter(size) for b in t.combine_chunks().to_batches())
            yield from _arrow_chunks(batches, len(data))
        return
    with _readable(file.path):
        if path.suffix == _PARQUET or starts_with(path, PARQUET_MAGIC):
            yield from _parquet_chunks(path, size)
        else:
            yield from _json_chunks(path, size)


def source_identity(file: DataFile, known: SourceIdentity | None = None) -> SourceIdentity:
    """Return size, time of change and SHA-256 of what ``file`` holds; for a hub dataset, of its local copy.

    The hash is taken from ``known`` where size and time are unchanged.

    Raises:
        ValueError: when the file is missing or cannot be read.
    """
    paths, part = [Path(file.path)], ""
    if not _is_local(file):
        data = _hub_dataset(file.path, file.split, file.revision)
        paths = [Path(entry["filename"]) for entry in data.cache_files]
        # A slice lies in the same files as the whole.
        part = f"{file.split}: {len(data)} rows"
    with _readable(file.path):
        stats = [path.stat() for path in paths]
        size, mtime_ns = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
        if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns):
            return known
        return SourceIdentity(size, mtime_ns, _sha256(paths, part))


def _is_local(file: DataFile) -> bool:
    path = Path(file.path)
    name = path.name.removesuffix(path.suffix) if path.suffix in _COMPRESSED_SUFFIXES else path.name
    suffix = Path(name).suffix
    if path.is_file():
        # A compressed file may have no other suffix.
        if suffix not in (*_SUFFIXES, *([""] if name != path.name else [])):
            raise ValueError(f"data file {path} ends in {path.suffix!r}, expected one of {_EXPECTED_SUFFIXES}")
        return True
    if path.is_dir():
        raise ValueError(f"data file {path} is a folder, expected a file or the id of a hub dataset")
    if path.exists():
        raise ValueError(f"data file {path} is a pipe or a device, expected a file: it is read more than once")
    if suffix in _SUFFIXES or name != path.name or path.is_absolute():
        raise ValueError(f"data file {path} does not exist")
    return False


@functools.lru_cache(maxsize=8)
def _hub_dataset(name: str, split: str, revision: str | None = None) -> Any:
    # Imported here: the package is slow to import and only hub data needs it.
    import datasets

    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    # The package raises more than a dozen types here: connection, missing repository, missing split, bad script.
    except Exception as error:
        reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        raise ValueError(
            f"data file {name} does not exist, and no dataset {name!r} with split {split!r} "
            f"could be loaded from the hub ({reason})"
        ) from error


def _json_chunks(path: Path, size: int) -> Iterator[RecordChunk]:
    first = 0
    lines: list[int] = []
    values: list[bytes] = []
    blocks = ByteBlocks(path)
    for line, value in split_records(blocks):
        lines.append(line)
        values.append(value)
        if len(values) == size:
            yield RecordChunk(first, tuple(lines), tuple(values), blocks.share_read)
            first += size
            lines, values = [], []
    if values:
        yield RecordChunk(first, tuple(lines), tuple(values), 1.0)


def _parquet_chunks(path: Path, size: int) -> Iterator[RecordChunk]:
    with pq.ParquetFile(path) as parquet:
        names = parquet.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"its column {max(names, key=names.count)!r} comes twice")
        yield from _arrow_chunks(parquet.iter_batches(size), parquet.metadata.num_rows)


def _arrow_chunks(batches: Iterator[pa.RecordBatch], total: int) -> Iterator[RecordChunk]:
    first = 0
    for batch in batches:
        last = first + batch.num_rows
        yield RecordChunk(first, tuple(range(first + 1, last + 1)), batch, last / total)
        first = last


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        yield from batch.to_pylist()
    # Text that is not UTF-8, or a date that Python does not have, must cost its own row alone.
    except (ValueError, OverflowError, pa.ArrowException):
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield BadRecord(f"bad value: {error}")


def _sha256(paths: list[Path], part: str = "") -> str:
    digest = hashlib.sha256(part.encode())
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Name the file in what reading it raises."""
    try:
        yield
    except (ValueError, *_DAMAGE) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"data file {name} cannot be read: {printable(reason, 500)}") from error
