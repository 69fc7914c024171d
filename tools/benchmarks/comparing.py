"""Runs inside a sandbox of its own: it compares answers of a program with the expected ones and says the verdict.

Started as a script with a socket as stdin; a byte says that it is ready. A request is a byte, how many seconds of CPU
time comparing may take, with four descriptors: answers of one suite, a pipe that ends when their program has, expected
answers, and where the verdict is to be written; a byte says that it has them. Each is judged by a fork, by evalplus's
own ``unsafe_execute``. All that a program made is read as plain data, and what leaves is a line of JSON; who reads it
checks it, and takes no line for a failure.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import reprlib
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import evalplus.eval
import numpy as np

if TYPE_CHECKING:
    from reflectron.tools.sandbox import plain_data
else:
    # It lies beside this file, in a folder that Python's -I keeps from the path.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import plain_data

    del sys.path[0]

# evalplus's own limit, on the clock, which is not to decide here.
_NEVER_SECONDS = 10**6
_POLL_MS = 100
_SHOWN_CHARACTERS = 300
_SHOWN_BITS = 8 * _SHOWN_CHARACTERS
# Expected answers are a benchmark's own.
_EXPECTED_LIMITS = plain_data.DataLimits(message_bytes=1 << 30, nodes=1 << 27)
_UNCOUNTED = "evalplus 0.3.1 passes no answer to this task: its oracle skips the counting (eval/__init__.py)"
_OUTCOMES = ("answer", "error", "timeout", "clock", "unsaid")


def main() -> None:
    """Fork a judge for each request, until the other side closes the socket."""
    requests = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    requests.send(b".")
    while True:
        head, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not head:
            return
        if os.fork() == 0:
            requests.close()
            _supervise(head[0], *descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(b".")
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _supervise(seconds: int, answers: int, ended: int, expected: int, verdict: int) -> None:
    """Judge in a fork, and say for it why it did not come to a verdict."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        status = 1
        try:
            _judge(answers, ended, expected, verdict)
            status = 0
        finally:
            os._exit(status)
    for descriptor in (answers, ended, expected):
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        _say(verdict, evalplus.eval.FAIL, got=f"comparing its answers took more than {seconds} s of CPU time")
    elif status:
        _say(verdict, evalplus.eval.FAIL, got="its answers could not be compared within the limit on memory")


def _judge(answers: int, ended: int, expected: int, verdict: int) -> None:
    with gzip.open(os.fdopen(expected, "rb")) as file:
        stream: Any = file
        task = plain_data.read_message(stream, _EXPECTED_LIMITS)
        replay = _Replay(io.BufferedReader(_Fifo(answers, ended), 1 << 16), stream, task["count"])
        globals()["answer"] = replay.answer
        progress, status, details = _Value(), _Value(), [False] * task["count"]
        evalplus.eval.unsafe_execute(
            task["dataset"],
            task["entry_point"],
            # All that this process executes in the place of the sample.
            f"from __main__ import answer as {task['entry_point']}",
            replay.inputs(),
            replay,
            [_NEVER_SECONDS] * task["count"],
            task["atol"],
            True,
            status,
            details,
            progress,
        )
    # The last lines of evalplus's untrusted_check.
    succeeded = status.value == evalplus.eval._SUCCESS
    if succeeded and progress.value == task["count"] and all(details):
        _say(verdict, evalplus.eval.PASS)
    elif succeeded:
        _say(verdict, evalplus.eval.FAIL, got=_UNCOUNTED)
    else:
        _say(verdict, **replay.failure())


def _say(verdict: int, status: str, input: str = "", expected: str = "", got: str = "") -> None:
    said = {"status": status, "input": input, "expected": expected, "got": got}
    os.write(verdict, json.dumps(said).encode() + b"\n")


def answer(*arguments: object) -> object:
    """Stand for the sample; a judge's process puts the replay of its answers here."""
    raise NotImplementedError


class _Value:
    """Stands for the shared memory into which evalplus writes."""

    value: int = 0


class _Replay:
    """Stands for the function under test and for the list of expected answers, each asked once an input, in order."""

    def __init__(self, answers: Any, expected: Any, count: int) -> None:
        self._answers, self._file, self._count = answers, expected, count
        self._arguments: Any = []
        self._expected: Any = None
        self._outcome = "unsaid"
        self._got: Any = None

    def inputs(self) -> Iterator[Any]:
        """Yield arguments, one input after the other."""
        for _ in range(self._count):
            self._arguments, self._expected = plain_data.read_message(self._file, _EXPECTED_LIMITS)
            yield self._arguments

    def answer(self, *arguments: object) -> object:
        """Return what the sample answered to the next input.

        Raises:
            RuntimeError: when it raised, ended or ran out of time there.
            ValueError: when evalplus would pass it whatever the expected answer is.
        """
        self._outcome, self._got = self._next()
        if self._outcome != "answer":
            raise RuntimeError(self._outcome)
        if _compares_nothing(self._got, self._expected):
            raise ValueError("no number to compare")
        return self._got

    def _next(self) -> tuple[str, Any]:
        try:
            message = plain_data.read_message(self._answers)
        except EOFError:
            return "silent", "ended before it answered"
        except plain_data.PlainDataError as error:
            return "error", f"wrote no answer but something else: {error}"
        except MemoryError:
            return "error", "wrote an answer that does not fit into the limit on memory"
        if type(message) is not tuple or len(message) != 3 or type(message[0]) is not str:
            return "error", "wrote no answer but something else"
        outcome, _, content = message
        if outcome not in _OUTCOMES:
            return "error", "wrote no answer but something else"
        if outcome != "answer" and type(content) is not str:
            return "error", "gave no reason but something else"
        return outcome, content

    def __getitem__(self, index: int) -> object:
        return self._expected

    def failure(self) -> dict[str, str]:
        """Return the verdict on the newest input: ``silent`` where the program's end may tell more."""
        statuses = {"silent": "silent", "timeout": "timeout", "clock": "clock"}
        return {
            "status": statuses.get(self._outcome, "fail"),
            "input": _short(self._arguments),
            "expected": _short(self._expected),
            "got": _short(self._got) if self._outcome == "answer" else self._got[:_SHOWN_CHARACTERS],
        }


def _compares_nothing(got: Any, expected: Any) -> bool:
    """Return whether numbers are expected and none is there: numpy stretches ``[[]]`` to any shape, all of it close."""
    if not isinstance(got, (list, tuple, np.ndarray)) or not evalplus.eval.is_floats(expected):
        return False
    try:
        return np.size(got) == 0 and np.size(expected) != 0
    except ValueError:
        # It has no shape; numpy does not compare it either.
        return False


class _Fifo(io.RawIOBase):
    """A named pipe that also ends when no writer ever came."""

    def __init__(self, descriptor: int, ended: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._poll.register(ended, 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            events = dict(self._poll.poll(_POLL_MS))
            if events.get(self._descriptor, 0) & select.POLLIN:
                data = os.read(self._descriptor, len(buffer))
                buffer[: len(data)] = data
                return len(data)
            if events:
                return 0


class _Brief(reprlib.Repr):
    """Shortens values, integers too long for Python to write out included."""

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return f"<integer of {bits} bits>" if bits > _SHOWN_BITS else repr(value)


def _short(value: object) -> str:
    brief = _Brief()
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxfrozenset = brief.maxdict = brief.maxdeque = 20
    brief.maxstring = brief.maxother = _SHOWN_CHARACTERS
    try:
        return brief.repr(value)[:_SHOWN_CHARACTERS]
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


if __name__ == "__main__":
    main()
