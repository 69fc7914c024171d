"""Append-only JSON lines: records come in one at a time and are on the disk before ``append`` returns.

One process writes a journal. A last line that a killed process left unfinished is cut off when the journal is opened;
every whole line is kept for good.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reflectron.engine.files import append_whole, end_of_rows
from reflectron.engine.job_lock import take_lock

Record = dict[str, Any]


class Journal:
    """A file of records.

    Args:
        path: of the file; it and its folder are made.

    Raises:
        ValueError: when another process writes it.
        OSError: when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(path.with_name(f"{path.name}.lock"), f"journal {path}")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.size = end_of_rows(self._descriptor)
        self.cut_bytes = os.fstat(self._descriptor).st_size - self.size
        """Bytes of an unfinished last line that were cut off."""
        os.ftruncate(self._descriptor, self.size)
        # One thread keeps the lines in order and the waiting for the disk out of the event loop.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")

    def records(self) -> Iterator[tuple[int, Record]]:
        """Offset and content of every record.

        Raises:
            ValueError: naming the line that is no record.
        """
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    raise ValueError(f"{self.path}, line {number} is not a JSON object; restore or remove the line")
                yield offset, record
                offset += len(line)

    def read(self, offset: int) -> Record:
        """The record that starts at ``offset``."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    async def append(self, record: Record) -> int:
        """Write a record and wait until the disk holds it; also when the caller is cancelled meanwhile.

        Returns:
            Its offset.
        """
        # ASCII: an answer may hold lone surrogates, which have no UTF-8.
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        written = asyncio.get_running_loop().run_in_executor(self._writer, self._write, line)
        return await asyncio.shield(written)

    def _write(self, line: bytes) -> int:
        offset = self.size
        try:
            append_whole(self._descriptor, line)
            os.fdatasync(self._descriptor)
        except OSError as error:
            # Also where the disk could not be brought to hold it: a record that was refused must not be found later.
            os.ftruncate(self._descriptor, offset)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.size += len(line)
        return offset

    def close(self) -> None:
        """Finish what is being written."""
        self._writer.shutdown()
        os.close(self._descriptor)
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
