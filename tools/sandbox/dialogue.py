"""Two programs in two sandboxes that talk to each other: the first asks, the second answers, neither sees the other.

Comes in: both programs; the stdout of each is the stdin of the other. Goes out: what the first one reports on stderr.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.limits import Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Outcome, Sandboxed

_READ_BYTES = 1 << 16
_POLL_SECONDS = 0.05
# For the watch to notice why a program ended whose pipes are closed.
_NOTICE_SECONDS = 1.0


@dataclass(frozen=True)
class Speaker:
    """One of the two programs."""

    argv: Sequence[str]
    folder: Path
    limits: Limits
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Dialogue:
    """How a dialogue ended, with what was written to stderr."""

    asking: Outcome
    answering: Outcome


def hold_dialogue(kind: SandboxKind, asking: Speaker, answering: Speaker) -> Dialogue:
    """Run both programs until the asking one has ended; then the other is killed.

    The asking program's limit on the clock is that of the dialogue; how long it waits for an answer is its own affair.

    Raises:
        OSError: a sandbox could not be made.
    """
    before = time.monotonic()
    deadline = before + asking.limits.wall_seconds
    with contextlib.ExitStack() as running:
        with contextlib.ExitStack() as ends:
            questions, answers = _pipe(ends), _pipe(ends)
            asker = running.enter_context(_started(kind, asking, answers[0], questions[1]))
            answerer = running.enter_context(_started(kind, answering, questions[0], answers[1]))
        report = _Kept(asker, asking.limits.output_bytes)
        complaints = _Kept(answerer, answering.limits.output_bytes)
        _read(asker, answerer, (report, complaints), deadline)
        if not asker.process.wait(deadline):
            asker.process.stop("wall_time")
        seconds = time.monotonic() - before
        asked = asker.outcome("", report.text(), seconds)
        if complaints.ended:
            answerer.process.wait(time.monotonic() + _NOTICE_SECONDS)
        return Dialogue(asked, answerer.outcome("", complaints.text(), seconds))


def _pipe(ends: contextlib.ExitStack) -> tuple[int, int]:
    pipe = os.pipe()
    for end in pipe:
        ends.callback(os.close, end)
    return pipe


def _started(kind: SandboxKind, speaker: Speaker, stdin: int, stdout: int) -> Sandboxed:
    return Sandboxed(
        kind,
        speaker.argv,
        writable={wall.FOLDER: speaker.folder},
        limits=speaker.limits,
        environment=speaker.environment,
        stdin=stdin,
        stdout=stdout,
    )


def _read(asker: Sandboxed, answerer: Sandboxed, kept: Sequence[_Kept], deadline: float) -> None:
    """Read what both write to stderr until the asking program has ended."""
    report = kept[0]
    with selectors.DefaultSelector() as selector:
        for one in kept:
            selector.register(one.descriptor, selectors.EVENT_READ, one)
        while not report.ended and time.monotonic() < deadline:
            ended = asker.process.ended()
            ready = selector.select(_POLL_SECONDS)
            for key, _ in ready:
                if not key.data.take():
                    selector.unregister(key.fd)
            # The end of the one who answers lets the other end as well.
            if answerer.process.stopped() or (answerer.process.stands_still() and asker.process.stands_still()):
                answerer.process.stop("idle")
            # Where there is no wall, a process left behind may hold the pipe open.
            if ended and not ready:
                return


class _Kept:
    """The beginning of what a program writes to stderr; one that writes more is ended."""

    def __init__(self, program: Sandboxed, most: int) -> None:
        self.ended = False
        self.descriptor = program.stderr_fd
        self._program, self._most, self._data = program, most, b""

    def take(self) -> bool:
        """Read what is there; whether there can be more."""
        data = os.read(self.descriptor, _READ_BYTES)
        self.ended = not data
        if len(self._data) + len(data) > self._most:
            self._program.process.stop("output")
        self._data += data[: self._most - len(self._data)]
        return not self.ended

    def text(self) -> str:
        """What came, as text."""
        return self._data.decode(errors="replace")
