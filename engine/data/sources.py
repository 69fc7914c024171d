"""A data file (JSONL, Parquet, or a data set of the hub) comes in, its records go out in order, in chunks.

Files are streamed, never held in memory. A chunk keeps records as they were read (lines of bytes, or an Arrow batch),
so that decoding happens where the chunk is used, which may be another process.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord, Conversation, parse_record

_LINE_SUFFIXES = (".jsonl", ".json")
_SUFFIXES = (*_LINE_SUFFIXES, ".parquet")


@dataclass(frozen=True)
class Record:
    """One record of a file, not yet parsed."""

    index: int
    """0-based number of the record in its file."""
    line: int
    """1-based line, or row where a file has no lines."""
    value: bytes | dict[str, Any]
    """A line of JSON, or the columns of a row."""

    def conversation(self) -> Conversation:
        """Parse the record.

        Raises:
            BadRecord: with the reason.
        """
        return parse_record(self.decoded())

    def decoded(self) -> object:
        """The record's value: named columns, unless a line of JSON holds something else.

        Raises:
            BadRecord: when a line is not JSON.
        """
        return _decode(self.value) if isinstance(self.value, bytes) else self.value


@dataclass(frozen=True)
class Chunk:
    """Consecutive records."""

    first_index: int
    lines: tuple[int, ...]
    values: tuple[bytes, ...] | pa.RecordBatch
    share_read: float
    """Share of the file, 0 to 1, that has been read up to the end of this chunk."""

    def records(self) -> Iterator[Record]:
        """The records in file order."""
        values = self.values.to_pylist() if isinstance(self.values, pa.RecordBatch) else self.values
        for offset, (line, value) in enumerate(zip(self.lines, values, strict=True)):
            yield Record(self.first_index + offset, line, value)


@dataclass(frozen=True)
class SourceIdentity:
    """What a file held when it was read."""

    size: int
    mtime_ns: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """For a JSON header; ``SourceIdentity(**d)`` reads it back."""
        return asdict(self)


def read_records(file: DataFile) -> Iterator[Record]:
    """Every record of ``file`` in order; blank lines are no records.

    Raises:
        ValueError: when the file is missing or cannot be read.
    """
    for chunk in read_chunks(file, 64):
        yield from chunk.records()


def read_chunks(file: DataFile, size: int) -> Iterator[Chunk]:
    """The records of ``file`` in order, ``size`` (the last chunk: at most ``size``) at a time.

    Raises:
        ValueError: when the file is missing or cannot be read.
    """
    try:
        if not _is_local(file):
            data = _hub_dataset(file.path, file.split, file.revision)
            batches = (b for t in data.with_format("arrow").iter(size) for b in t.combine_chunks().to_batches())
            yield from _arrow_chunks(batches, len(data))
        elif Path(file.path).suffix in _LINE_SUFFIXES:
            yield from _line_chunks(Path(file.path), size)
        else:
            with pq.ParquetFile(file.path) as parquet:
                yield from _arrow_chunks(parquet.iter_batches(size), parquet.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def source_identity(file: DataFile, known: SourceIdentity | None = None) -> SourceIdentity:
    """Size, time of change and SHA-256 of what ``file`` holds; for a hub data set, of its local copy.

    The hash is taken from ``known`` where size and time are unchanged.

    Raises:
        ValueError: when the file is missing or cannot be read.
    """
    try:
        paths, part = [Path(file.path)], ""
        if not _is_local(file):
            data = _hub_dataset(file.path, file.split, file.revision)
            paths = [Path(entry["filename"]) for entry in data.cache_files]
            # A slice lies in the same files as the whole.
            part = f"{file.split}: {len(data)} rows"
        stats = [path.stat() for path in paths]
        size, mtime_ns = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
        if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns):
            return known
        return SourceIdentity(size, mtime_ns, _sha256(paths, part))
    except OSError as error:
        raise _unreadable(file, error) from error


def _is_local(file: DataFile) -> bool:
    path = Path(file.path)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"data file {path} ends in {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}")
        return True
    if path.is_dir():
        raise ValueError(f"data file {path} is a folder, expected a file or the id of a hub data set")
    if path.suffix in _SUFFIXES or path.is_absolute():
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
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"data file {name} does not exist, and no data set {name!r} with split {split!r} "
            f"could be loaded from the hub ({reason})"
        ) from error


def _line_chunks(path: Path, size: int) -> Iterator[Chunk]:
    total = max(path.stat().st_size, 1)
    first = read = 0
    lines: list[int] = []
    values: list[bytes] = []
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, 1):
            read += len(raw)
            value = (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).strip()
            if not value:
                continue
            lines.append(line)
            values.append(value)
            if len(values) == size:
                yield Chunk(first, tuple(lines), tuple(values), read / total)
                first += size
                lines, values = [], []
    if values:
        yield Chunk(first, tuple(lines), tuple(values), 1.0)


def _arrow_chunks(batches: Iterator[pa.RecordBatch], total: int) -> Iterator[Chunk]:
    first = 0
    for batch in batches:
        last = first + batch.num_rows
        yield Chunk(first, tuple(range(first + 1, last + 1)), batch, last / total)
        first = last


def _decode(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8: byte {error.start} of the line is {line[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise BadRecord(f"bad JSON: {error.msg} at column {error.colno}") from None
    # Python refuses integers of more than 4300 digits and nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"bad JSON: {error}") from None


def _sha256(paths: list[Path], part: str = "") -> str:
    digest = hashlib.sha256(part.encode())
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _unreadable(file: DataFile, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return ValueError(f"data file {file.path} cannot be read: {reason}")
