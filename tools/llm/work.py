"""Work on many problems at a time until they are done or the run is told to stop, and a journal of what was done.

To stop is to begin nothing new: requests under way finish and are recorded, then the run ends. A journal is JSON lines
that one process appends, each on the disk before ``append`` returns; a last line that a killed process left unfinished
is cut off when the journal is opened.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from reflectron.engine.files import append_whole, end_of_rows
from reflectron.engine.job_lock import take_lock

ATTEMPTS = "attempts.jsonl"
"""The journal of every attempt, in a run's folder."""
Item = TypeVar("Item")
JournalRow = dict[str, Any]


class RunStopped(Exception):
    """Raised where something new would begin although the run is to end; the reason is in ``Stop.reason``."""


class Stop:
    """Tells whether and why a run ends early."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._event = asyncio.Event()

    def request(self, reason: str) -> None:
        """End the run; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise ``RunStopped`` once the run is to end."""
        if self.reason is not None:
            raise RunStopped

    async def sleep(self, seconds: float) -> None:
        """Wait, or raise ``RunStopped`` as soon as the run is to end."""
        self.check()
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise RunStopped

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM stop the run; a second SIGINT interrupts it at once."""
        loop = asyncio.get_running_loop()

        def stop(signum: signal.Signals) -> None:
            self.request(f"{signum.name} received")
            loop.remove_signal_handler(signum)

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop, signum)
        try:
            yield
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)


@dataclass(frozen=True)
class Ending:
    """The exit code of a run, and one line that says why it is not 0."""

    code: Literal[0, 1]
    line: str | None


def ending(stop: Stop, *, made: int, left: int, unit: str) -> Ending:
    """Return exit code 0 where everything is done and something was made, else 1.

    Args:
        made: samples that the folder holds now.
        left: problems or the like that the same command would resume.
        unit: what ``left`` counts, in the plural.
    """
    if left:
        why = stop.reason or f"the server failed requests, see {ATTEMPTS}"
        return Ending(1, f"stopped: {why}; {left} {unit} left. All that was begun is saved; the same command resumes.")
    if not made:
        return Ending(1, f"nothing was made: all {unit} were tried and none gave a sample")
    return Ending(0, None)


async def for_each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, at_a_time: int, stop: Stop
) -> None:
    """Call ``work`` on every item, in order of their start, until ``stop``.

    Raises:
        Exception: the first that ``work`` raised, after what was under way has finished.
    """
    queue = iter(items)

    async def worker() -> None:
        # The workers take turns at one iterator: there is no await between two of its items.
        for item in queue:
            try:
                stop.check()
                await work(item)
            except RunStopped:
                return
            except Exception as error:
                stop.request(f"failed: {error}")
                raise

    results = await asyncio.gather(*(worker() for _ in range(at_a_time)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


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

    def records(self) -> Iterator[tuple[int, JournalRow]]:
        """Yield offset and content of every record.

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

    def read(self, offset: int) -> JournalRow:
        """Return the record that starts at ``offset``."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    async def append(self, record: JournalRow) -> int:
        """Write a record and wait until the disk holds it; also when the caller is cancelled meanwhile.

        Returns:
            The record's offset.
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
            # Also after a failed sync: a record that was reported as not written must not be found later.
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
