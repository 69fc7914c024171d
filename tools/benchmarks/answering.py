"""Runs inside the sandbox: it calls a program with all inputs and writes each answer as plain data when it is made.

Started as a script of its own, beside ``job``, a file of messages. Each suite of inputs runs in a fresh process and
writes to its own pipe ``answers.<suite>``. The program is held as evalplus 0.3.1 holds it (``reliability_guard``,
``swallow_io``), but never meets an expected answer. The program can write to these pipes what it likes, so a reader
takes what comes for claims of the program.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evalplus.eval.utils import reliability_guard, swallow_io

if TYPE_CHECKING:
    from reflectron.tools.sandbox import plain_data
else:
    # It lies beside this file, in a folder that Python's -I keeps from the path.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import plain_data

    del sys.path[0]

# Inputs come from a benchmark's file.
_INPUT_LIMITS = plain_data.DataLimits(message_bytes=1 << 30, nodes=1 << 27)
# What a set may be made of without a look at it.
_KEPT = (tuple, list, dict, set, frozenset, str, bytes, int, float, complex)
_ERROR_CHARACTERS = 300
# The program may put something else in its place.
_LEAVE = os._exit
# Seconds of the clock for each second of CPU time, and at least: a loaded machine must not decide.
_PATIENCE = 6
_LEAST_CLOCK_SECONDS = 30.0


def main() -> None:
    """Read the job and run its suites, one after the other."""
    with open("job", "rb") as file:
        job = plain_data.read_message(file, _INPUT_LIMITS)
        suites = [plain_data.read_message(file, _INPUT_LIMITS) for _ in job["seconds"]]
    # Whoever made the file sees by this that from here on the program is to blame.
    os.remove("job")
    for number, inputs in enumerate(suites):
        try:
            # Not waiting: a reader that wants no answer, as where a suite has no inputs, has already left.
            descriptor = os.open(f"answers.{number}", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            continue
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as pipe:
            child = os.fork()
            if child == 0:
                _answer_all(job, inputs, job["seconds"][number], pipe)
                _LEAVE(0)
            _, status = os.waitpid(child, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                _write(pipe, "clock", 0.0, "the program stopped itself")
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
            elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
                _write(pipe, "clock", 0.0, f"all inputs together took more than {job['suite_seconds']} s of CPU time")


def _write(pipe: Any, outcome: str, seconds: float, content: object) -> None:
    try:
        try:
            data = plain_data.encode((outcome, seconds, content))
        except BaseException as error:
            # Too large, or no memory is left.
            reason = f"the answer cannot be handed on: {_describe(error)}"
            data = plain_data.encode(("unsaid", seconds, reason))
        pipe.write(len(data).to_bytes(8, "little"))
        pipe.write(data)
        pipe.flush()
    except BaseException:
        # The reader has seen enough and left, or half an answer is written.
        _LEAVE(0)


def _answer_all(job: dict[str, Any], inputs: list[Any], seconds: list[float], pipe: Any) -> None:
    """Write ``(outcome, CPU seconds, answer or reason)`` of each input, or of the program if it cannot be loaded.

    Outcomes are ``answer``, ``error``, ``timeout`` (an input's CPU time), ``clock`` (another limit on time) and
    ``unsaid`` (an answer that is too large).
    """

    def at_end(outcome: str, reason: str) -> None:
        _write(pipe, outcome, 0.0, reason)
        _LEAVE(0)

    limit = job["suite_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    reliability_guard(maximum_memory_bytes=job["memory_bytes"])
    names: dict[str, Any] = {}
    timed = _Timed(at_end)
    outcome, content = "answer", None
    with timed.limit(limit):
        try:
            with swallow_io():
                exec(job["code"], names)
                function = names[job["entry_point"]]
        except BaseException as error:
            outcome, content = "error", _describe(error)
    if outcome == "error":
        _write(pipe, outcome, 0.0, content)
        return
    for arguments, allowed in zip(inputs, seconds, strict=True):
        started = time.process_time()
        with timed.limit(allowed):
            try:
                with swallow_io():
                    outcome, content = "answer", _in_form(function(*arguments), job["form"])
            except BaseException as error:
                outcome, content = "error", _describe(error)
        _write(pipe, outcome, time.process_time() - started, content)


def _in_form(answer: Any, form: str) -> Any:
    """Return what evalplus compares of an answer; an iterator could not leave this process."""
    if form == "presence":
        return answer is not None
    return set(answer) if form == "set" and type(answer) not in _KEPT else answer


class _Timed:
    """Ends the process, whatever it catches, when it has used its CPU time, or many times as much of the clock's."""

    def __init__(self, at_end: Callable[[str, str], object]) -> None:
        signal.signal(signal.SIGPROF, lambda *_: at_end("timeout", f"took more than {self.seconds:g} s of CPU time"))
        signal.signal(signal.SIGALRM, lambda *_: at_end("clock", f"took more than {self._clock_seconds():g} s"))
        self.seconds = 0.0

    def _clock_seconds(self) -> float:
        return max(_PATIENCE * self.seconds, _LEAST_CLOCK_SECONDS)

    def limit(self, seconds: float) -> _Timed:
        self.seconds = seconds
        return self

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        signal.setitimer(signal.ITIMER_REAL, self._clock_seconds())

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _describe(error: BaseException) -> str:
    """Return type and text of an error, whose text may be none."""
    try:
        return f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    except BaseException:
        return "an error that cannot be put into words"


if __name__ == "__main__":
    main()
