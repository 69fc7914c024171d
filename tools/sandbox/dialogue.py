"""Two programs in two sandboxes that talk to each other: the first asks, the second answers, neither sees the other.

Comes in: both programs; the stdout of each becomes the stdin of the other. Goes out: what the first one reports
on stderr. Bytes are passed on unread, a buffer's worth at a time, so that neither program can make us hold more.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.limits import Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Outcome, Sandboxed

_BUFFER_BYTES = 1 << 16
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
    """How a dialogue ended; stdout is passed on, stderr kept up to the limit on output."""

    asking: Outcome
    answering: Outcome
    stalled: bool
    """Whether the answering program did not even take in what it was asked."""


def hold_dialogue(kind: SandboxKind, asking: Speaker, answering: Speaker, patience: float) -> Dialogue:
    """Run both programs until the asking one has ended; then the other is killed.

    Args:
        patience: seconds of the clock that the answering program may leave a question lying.

    Raises:
        OSError: a sandbox could not be made.
    """
    before = time.monotonic()
    deadline = before + asking.limits.wall_seconds
    with _started(kind, asking) as (asker, to_asker), _started(kind, answering) as (answerer, to_answerer):
        questions = _Flow(asker.stdout_fd, to_answerer)
        answers = _Flow(answerer.stdout_fd, to_asker)
        report = _Kept(asker.stderr_fd, asking.limits.output_bytes)
        complaints = _Kept(answerer.stderr_fd, answering.limits.output_bytes)
        stalled = _pass_on(asker, answerer, (questions, answers, report, complaints), deadline, patience)
        if not stalled and not asker.process.wait(deadline):
            asker.process.stop("wall_time")
        if answers.ended:
            answerer.process.wait(time.monotonic() + _NOTICE_SECONDS)
        seconds = time.monotonic() - before
        told, said = report.text(), complaints.text()
        return Dialogue(asker.outcome("", told, seconds), answerer.outcome("", said, seconds), stalled)


@contextlib.contextmanager
def _started(kind: SandboxKind, speaker: Speaker) -> Iterator[tuple[Sandboxed, int]]:
    """The running program and the descriptor of its stdin, which belongs to the flow that writes there."""
    theirs, ours = os.pipe()
    try:
        running = Sandboxed(
            kind,
            speaker.argv,
            writable={wall.FOLDER: speaker.folder},
            limits=speaker.limits,
            environment=speaker.environment,
            stdin=theirs,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    with running:
        yield running, ours


def _pass_on(
    asker: Sandboxed,
    answerer: Sandboxed,
    pipes: tuple[_Flow, _Flow, _Kept, _Kept],
    deadline: float,
    patience: float,
) -> bool:
    """Move bytes until the asking program has ended; whether a question lay untaken for longer than ``patience``."""
    questions, answers, report, _ = pipes
    taken = time.monotonic()
    try:
        while not report.ended and (now := time.monotonic()) < deadline:
            with selectors.DefaultSelector() as selector:
                for pipe in pipes:
                    pipe.register(selector)
                ended = asker.process.ended()
                ready = selector.select(_POLL_SECONDS)
            for key, _ in ready:
                key.data.move()
            # The end of the one who answers lets the other end as well.
            if answerer.process.stopped() or (answerer.process.stands_still() and asker.process.stands_still()):
                answerer.process.stop("idle")
            # Where there is no wall, a process left behind may hold the pipes open.
            if ended and not ready:
                return False
            if not questions.pending or any(key.data is questions for key, _ in ready):
                taken = now
            elif now - taken > patience:
                return True
        return False
    finally:
        questions.close()
        answers.close()


class _Flow:
    """Bytes on their way from one pipe into another."""

    def __init__(self, source: int, target: int) -> None:
        self.ended = False
        self.pending = memoryview(b"")
        self._source, self._target = source, target
        os.set_blocking(target, False)

    def register(self, selector: selectors.BaseSelector) -> None:
        """Wait for room while there is something to write, else for something to read."""
        if self._target >= 0 and self.pending:
            selector.register(self._target, selectors.EVENT_WRITE, self)
        elif not self.ended:
            selector.register(self._source, selectors.EVENT_READ, self)

    def move(self) -> None:
        """Do what ``register`` waited for; the end of the source closes the target."""
        if self._target >= 0 and self.pending:
            try:
                self.pending = self.pending[os.write(self._target, self.pending) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.close()
            return
        data = os.read(self._source, _BUFFER_BYTES)
        if not data:
            self.ended = True
            self.close()
        elif self._target >= 0:
            self.pending = memoryview(data)

    def close(self) -> None:
        """Let the target's reader see the end; twice is once."""
        self.pending = memoryview(b"")
        if self._target >= 0:
            os.close(self._target)
            self._target = -1


class _Kept:
    """The beginning of what a pipe brings; the rest is dropped."""

    def __init__(self, source: int, most: int) -> None:
        self.ended = False
        self._data = b""
        self._source, self._most = source, most

    def register(self, selector: selectors.BaseSelector) -> None:
        """Wait for something to read."""
        if not self.ended:
            selector.register(self._source, selectors.EVENT_READ, self)

    def move(self) -> None:
        """Read what is there."""
        data = os.read(self._source, _BUFFER_BYTES)
        self.ended = not data
        self._data += data[: self._most - len(self._data)]

    def text(self) -> str:
        """What came, as text."""
        return self._data.decode(errors="replace")
