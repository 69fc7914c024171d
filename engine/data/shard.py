"""The tokenised records of one data file as one Arrow file: a header, then batches of rows, one row a record.

A file appears under its name only when it is complete and on the disk; each batch carries a checksum. Reading maps the
file into memory: arrays are read-only views of it, and a sample is never copied.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import pyarrow as pa
from pyarrow import compute

from reflectron.engine.data.conversation import BadRecord, Kind
from reflectron.engine.data.sources import SourceIdentity
from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.files import write_whole

_KINDS: tuple[Kind, ...] = get_args(Kind)
_SCHEMA = pa.schema(
    [
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("kind", pa.int8()),
        ("prefix_end", pa.int32()),
        ("final_start", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.uint8())),
        ("blocks", pa.list_(pa.int32())),
        ("special_tokens", pa.list_(pa.string())),
    ]
)
_HEADER, _CHECKSUM = b"reflectron", b"crc32"


@dataclass(frozen=True)
class ShardHeader:
    """What determines the content of a shard."""

    settings: dict[str, Any]
    """Format version, tokenizer, tags, template, length."""
    source: SourceIdentity
    """The data file's content."""


def to_batch(lines: Sequence[int], results: Sequence[TokenizedSample | BadRecord]) -> pa.RecordBatch:
    """Return the rows of a shard; a rejected record keeps its reason and has no tokens."""
    samples = [None if isinstance(result, BadRecord) else result for result in results]
    reasons = [str(result) if isinstance(result, BadRecord) else None for result in results]
    columns = [
        pa.array(lines, pa.int64()),
        pa.array(reasons, pa.string()),
        pa.array([_KINDS.index(s.kind) if s else 0 for s in samples], pa.int8()),
        pa.array([s.prefix_end if s else 0 for s in samples], pa.int32()),
        pa.array([s.final_start if s else -1 for s in samples], pa.int32()),
        _lists([s.input_ids if s else None for s in samples], np.int32),
        _lists([s.supervised if s else None for s in samples], np.uint8),
        _lists([s.blocks.ravel() if s else None for s in samples], np.int32),
        pa.array([s.special_tokens if s else () for s in samples], pa.list_(pa.string())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def write_shard(path: Path, header: ShardHeader, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a shard, whole or not at all.

    Raises:
        OSError: one line naming the file.
    """
    schema = _SCHEMA.with_metadata({_HEADER: json.dumps(asdict(header), sort_keys=True)})

    def write(stream: IO[bytes]) -> None:
        with pa.ipc.new_file(stream, schema) as writer:
            for batch in batches:
                writer.write_batch(batch, custom_metadata={_CHECKSUM: _checksum(batch)})

    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file of a token store whole, after making its folder.

    Raises:
        OSError: one line naming the file; nothing unfinished is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        reason = f"{path} cannot be written: {error.strerror or error}; make room or set data.store_dir"
        raise OSError(error.errno, reason) from error


class ShardBatch:
    """A batch of rows as views of the memory map."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        # Not by ``to_numpy``, which imports pandas first.
        def scalars(name: str) -> np.ndarray:
            return np.from_dlpack(batch.column(name))

        def lists(name: str) -> tuple[np.ndarray, np.ndarray]:
            column = batch.column(name)
            return np.from_dlpack(column.offsets), np.from_dlpack(column.values)

        self.lines = scalars("line")
        self.reasons = batch.column("reason")
        self._special_tokens = batch.column("special_tokens")
        self.good_rows = np.from_dlpack(compute.indices_nonzero(self.reasons.is_null())).astype(np.int32)
        """int32 [samples]: rows that are not rejected."""
        self._kind, self._prefix_end, self._final_start = map(scalars, ("kind", "prefix_end", "final_start"))
        self._token_offsets, self._input_ids = lists("input_ids")
        self._supervised = lists("supervised")[1].view(bool)
        self._block_offsets, self._blocks = lists("blocks")

    def __len__(self) -> int:
        return len(self.lines)

    def lengths(self) -> np.ndarray:
        """Return int32 [samples], the tokens of each good row."""
        return np.diff(self._token_offsets)[self.good_rows]

    def sample(self, row: int) -> TokenizedSample:
        """Return the sample of a good row."""
        start, end = self._token_offsets[row : row + 2]
        blocks = self._blocks[slice(*self._block_offsets[row : row + 2])].reshape(-1, 3)
        return TokenizedSample(
            _KINDS[self._kind[row]],
            self._input_ids[start:end],
            self._supervised[start:end],
            blocks,
            int(self._prefix_end[row]),
            int(self._final_start[row]),
            tuple(self._special_tokens[row].as_py()),
        )

    def rows_with_special_tokens(self) -> Iterator[tuple[int, list[str]]]:
        """Yield row and special tokens of each sample whose contents spell one."""
        for row in np.flatnonzero(np.diff(np.from_dlpack(self._special_tokens.offsets))).tolist():
            yield row, self._special_tokens[row].as_py()


class MappedFile:
    """The file under a memory map, which others can still change or cut short.

    A read beyond a cut end kills the process (SIGBUS), and a changed byte shows nowhere, so ``check`` comes before and
    after reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not the path: one that is replaced or deleted leaves the map as it is.
        self._file = path.open("rb")
        self._known = self._state()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Compare size and time of change with those of opening; where the time alone differs, the checksums decide.

        Raises:
            ValueError: when the content is another.
        """
        found = self._state()
        if found == self._known:
            return
        size, _ = self._known
        if found[0] != size:
            raise ValueError(self._changed(f"it has {found[0]} bytes, expected {size}"))
        try:
            open_shard(Path(f"/proc/self/fd/{self._file.fileno()}"), verify=True)
        except ValueError:
            raise ValueError(self._changed("its content is another")) from None
        self._known = found

    def _changed(self, how: str) -> str:
        return (
            f"token store file {self.path} was changed under the run: {how}; the same command builds it again and goes "
            "on from the last checkpoint"
        )


@dataclass(frozen=True)
class Shard:
    """One data file, tokenised."""

    header: ShardHeader
    batches: list[ShardBatch]
    file: MappedFile
    """Where the batches lie."""

    @property
    def records(self) -> int:
        """Records of the data file, rejected ones included."""
        return sum(len(batch) for batch in self.batches)

    def good_records(self) -> np.ndarray:
        """Return int32 [samples], the record number of each sample."""
        firsts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        parts = [first + batch.good_rows for first, batch in zip(firsts, self.batches, strict=False)]
        return np.concatenate([np.empty(0), *parts]).astype(np.int32)

    def rejects(self) -> Iterator[tuple[int, int, str]]:
        """Yield record number, line and reason of every rejected record."""
        first = 0
        for batch in self.batches:
            for row in np.setdiff1d(np.arange(len(batch)), batch.good_rows).tolist():
                yield first + row, int(batch.lines[row]), batch.reasons[row].as_py()
            first += len(batch)

    def special_tokens(self) -> Iterator[tuple[int, int, list[str]]]:
        """Yield record number, line and special tokens of every sample whose contents spell one."""
        first = 0
        for batch in self.batches:
            for row, tokens in batch.rows_with_special_tokens():
                yield first + row, int(batch.lines[row]), tokens
            first += len(batch)


def open_shard(path: Path, verify: bool) -> Shard:
    """Map a shard into memory.

    Args:
        verify: read it all and compare the checksums.

    Raises:
        ValueError: when the file is no shard, or damaged.
        FileNotFoundError: when there is none.
    """
    try:
        file = MappedFile(path)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = json.loads(reader.schema.metadata[_HEADER])
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
        if verify and not all(metadata[_CHECKSUM] == _checksum(batch) for batch, metadata in batches):
            raise pa.ArrowInvalid("checksum differs")
        return Shard(
            ShardHeader(header["settings"], SourceIdentity(**header["source"])),
            [ShardBatch(batch) for batch, _ in batches],
            file,
        )
    except FileNotFoundError:
        raise
    # Damage shows as whatever the parser meets first.
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"token store file {path} is damaged ({error}); delete it, and it is built again") from error


def _lists(parts: list[np.ndarray | None], dtype: type) -> pa.ListArray:
    arrays: list[np.ndarray] = [
        np.empty(0, dtype) if part is None else part.astype(dtype, copy=False) for part in parts
    ]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, dtype), *arrays]))


def _checksum(batch: pa.RecordBatch) -> bytes:
    return f"{zlib.crc32(batch.serialize()):08x}".encode()
