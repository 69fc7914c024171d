"""A process that compares answers with the expected ones, in a sandbox of its own, and the verdicts that it sends.

Descriptors of answers and of expected ones come in, a `Verdict` goes out, of a line of JSON whose form is checked. The
process has handled what samples wrote: it has no rights, no network, a limit of CPU time, and what it sends is
never more than bounded text.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.eval.answers import Cut, copy_script
from reflectron.tools.eval.verdict import Verdict
from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.limits import Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Sandboxed

# Of the clock: the imports on a loaded machine.
_START_SECONDS = 120
# Of the clock, for each second of CPU time.
_PATIENCE = 10
_FILE_BYTES = 1 << 20
_LINE_BYTES = 1 << 14
_FIELDS = ("status", "input", "expected", "got")
# Its own words beside evalplus's: the program ended without an answer; a limit that is not the input's own.
_STATUSES = ("pass", "fail", "timeout", "silent", "clock")
_UNCOMPARED = Verdict("fail", got="what compared its answers ended without a verdict")


@dataclass(frozen=True)
class Comparison:
    """The outcome of one suite."""

    verdict: Verdict
    at_limit: bool
    """Whether the limit of CPU time on one input decided."""
    finished: bool = True
    """Whether the comparison came to its end."""


class Comparer:
    """A started process, for one sample at a time.

    Args:
        seconds: CPU time that comparing a suite may take, at most 255.

    Raises:
        OSError: when it does not start.
    """

    def __init__(self, kind: SandboxKind, seconds: int, memory_bytes: int) -> None:
        self._seconds = seconds
        self._open: set[int] = set()
        self._healthy = True
        limits = Limits(
            cpu_seconds=4 * seconds + _START_SECONDS,
            memory_bytes=memory_bytes,
            file_bytes=_FILE_BYTES,
            folder_bytes=_FILE_BYTES,
        )
        with contextlib.ExitStack() as on_error:
            folder = on_error.enter_context(sandbox_folder())
            copy_script("comparing.py", folder)
            self._socket, theirs = socket.socketpair()
            on_error.callback(self._socket.close)
            with theirs:
                self._sandbox = on_error.enter_context(
                    Sandboxed(
                        kind,
                        [sys.executable, "-I", "comparing.py"],
                        writable={wall.FOLDER: folder},
                        limits=limits,
                        environment={},
                        stdin=theirs.fileno(),
                    )
                )
            self._socket.settimeout(_START_SECONDS)
            if self._socket.recv(1) != b".":
                _, stderr = self._sandbox.communicate(time.monotonic() + 1)
                raise OSError(f"the judge's own sandbox did not start: {stderr.strip()[-300:]}")
            self._resources = on_error.pop_all()

    def fit(self) -> bool:
        """Whether nothing about it has been odd so far."""
        return self._healthy and not self._sandbox.process.ended()

    def close(self) -> None:
        """Kill it."""
        self._resources.close()
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def compare(self, answers: int, ended: int, expected: Path) -> Pending:
        """Begin to compare answers as they come; the descriptors may be closed afterwards.

        Args:
            ended: of a pipe that ends when no further answer can come.

        Raises:
            OSError: when the process has ended, before it has read any answer.
        """
        read, write = os.pipe()
        self._open.add(read)
        file = os.open(expected, os.O_RDONLY | os.O_CLOEXEC)
        self._sandbox.process.renew_cpu_time()
        try:
            socket.send_fds(self._socket, [bytes([self._seconds])], [answers, ended, file, write])
            if not self._socket.recv(1):
                raise OSError(
                    f"the judge's own sandbox has ended: {self._sandbox.process.breach or 'nobody knows why'}"
                )
        finally:
            os.close(file)
            os.close(write)
        return Pending(self, read)

    def read(self, descriptor: int, cut: Cut) -> Comparison:
        """See `Pending.read`."""
        line = _read_line(descriptor, time.monotonic() + _PATIENCE * self._seconds)
        self._open.remove(descriptor)
        os.close(descriptor)
        said = _checked(line)
        if said is None:
            self._healthy = False
            return Comparison(_UNCOMPARED, at_limit=False, finished=False)
        status = said.pop("status")
        if status == "silent":
            # Nobody was left to say why there was no further answer.
            status, said["got"] = "clock" if cut.by_time else "fail", cut.words or said["got"]
        return Comparison(Verdict("timeout" if status == "clock" else status, **said), at_limit=status == "timeout")


@dataclass(frozen=True)
class Pending:
    """A comparison that has begun."""

    comparer: Comparer
    descriptor: int

    def read(self, cut: Cut) -> Comparison:
        """Wait for the outcome, once the program has ended.

        Args:
            cut: why the program ended before it should have, if it did.
        """
        return self.comparer.read(self.descriptor, cut)


def _read_line(descriptor: int, deadline: float) -> bytes:
    """A line, or less of it when the writer ends, says too much or takes too long."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        data = os.read(descriptor, _LINE_BYTES)
        if not data:
            break
        line += data
    return line


def _checked(line: bytes) -> dict[str, str] | None:
    """The fields of a verdict, None if the line is none."""
    if len(line) > _LINE_BYTES or not line.endswith(b"\n"):
        return None
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or sorted(said) != sorted(_FIELDS):
        return None
    return said if all(isinstance(text, str) for text in said.values()) and said["status"] in _STATUSES else None
