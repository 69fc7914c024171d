"""Runs inside a sandbox: it runs a problem's test, sends the calls of its candidate away, and reports.

The candidate lives in another sandbox. Here stands a function that sends its arguments there (stdout) and takes the
answer (stdin), both as plain data, so that nothing of the code under test is ever loaded where it is judged. The report
leaves through stderr, which the other sandbox does not have.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import linecache
import os
import re
import reprlib
import select
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from reflectron.tools.benchmarks.candidate_process import (
    JOB_FILE,
    JOB_LIMITS,
    LIMITS,
    REPORT_MARK,
    Ended,
    TestJob,
    TestReport,
    TestsJob,
    first_not_data,
)
from reflectron.tools.sandbox.plain_data import PlainDataError, decode, encode, read_message, write_message

_SHOWN_CHARACTERS = 300
_TEST_FILE = "<test>"
_PROBE_SECONDS = 60
_BUFFER_BYTES = 1 << 16


def main() -> None:
    """Run the test to its end and report."""
    stderr = os.dup(2)
    try:
        _run(os.dup(0), os.dup(1), os.fdopen(os.dup(2), "wb"))
    finally:
        # Only an error of ours comes here.
        os.dup2(stderr, 2)


def _run(answers: int, calls: int, report: BinaryIO) -> None:
    os.set_blocking(calls, False)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    with open(JOB_FILE, "rb") as file:
        job: TestsJob = read_message(file, JOB_LIMITS)
    pipes = _PatientPipes(answers, calls, job["patience"])
    streams = io.BufferedReader(pipes, _BUFFER_BYTES), io.BufferedWriter(pipes, _BUFFER_BYTES)
    for number, test in enumerate(job["tests"]):
        check = _Check(number, test, *streams, report)
        if job["probe"]:
            check.probe()
        else:
            check.run()


class _Check:
    """One run of a test."""

    def __init__(self, number: int, test: TestJob, answers: BinaryIO, calls: BinaryIO, report: BinaryIO) -> None:
        self._number, self._test, self._report, self._probing = number, test, report, False
        self._answers, self._calls = answers, calls
        self._asked = self._told = ""
        self._lock = threading.Lock()
        self._raised: BaseException | None = None
        self._names: dict[str, Any] = {"__name__": "test"}
        self._prompt: dict[str, Any] = {}

    def probe(self) -> None:
        """Run in a process of its own and report, also where that is killed."""
        self._probing = True
        child = os.fork()
        if child == 0:
            signal.alarm(_PROBE_SECONDS)
            self.run()
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == -signal.SIGALRM:
            self._say("fail", f"it takes longer than {_PROBE_SECONDS} s")
        else:
            # Read only where the test left without a report.
            self._say("fail", f"its process ends with exit code {os.waitstatus_to_exitcode(status)}")

    def run(self) -> NoReturn:
        """Run prompt, test and check, and end this process with a report of the result."""
        name = self._test["entry_point"]
        candidate = self._candidate(name)
        # What the candidate raises in a thread of the test would end that thread, and no more.
        threading.excepthook = self._fail_in_thread
        try:
            exec(compile(_without(name, self._test["prompt"]), "<prompt>", "exec", dont_inherit=True), self._names)
            self._prompt = dict(self._names)
            self._names[name] = candidate
            # For the lines of a traceback.
            linecache.cache[_TEST_FILE] = (0, None, self._test["test"].splitlines(True), _TEST_FILE)
            exec(compile(self._test["test"], _TEST_FILE, "exec", dont_inherit=True), self._names)
            check = self._names["check"]
            if not self._probing:
                self._wait_until_loaded()
            self._names[name] = candidate
            check(candidate)
        except BaseException as error:
            self._fail(error)
        self._end("pass")

    def _wait_until_loaded(self) -> None:
        if (answer := self._receive()).get("kind") != "loaded":
            self._end("fail", f"the program cannot be loaded: {_described(self._exception(answer))}")

    def _candidate(self, name: str) -> Any:
        def candidate(*arguments: Any, **named: Any) -> Any:
            # Tests that limit time call from threads of their own.
            with self._lock:
                return self._call(arguments, named)

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def _call(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._send(arguments, named)
        if self._probing:
            self._end("called")
        answer = self._receive()
        if isinstance(answer.get("printed"), str):
            print(answer["printed"], end="")
        if "arguments" in answer:
            _update((arguments, named), answer["arguments"])
        kind = answer.get("kind")
        if kind == "value":
            return self._tell(answer.get("value"))
        if kind == "argument":
            return self._tell([*arguments, *named.values()][answer["number"]])
        if kind == "items":
            return self._items(answer)
        if kind == "raised":
            self._raise(answer)
        return self._end("fail", f"the answer is no plain data: {answer.get('reason', kind)}")

    def _tell(self, answer: Any) -> Any:
        self._told = _short(answer)
        return answer

    def _send(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._asked, self._told = _short_call(arguments, named), ""
        name = self._test["entry_point"]
        try:
            lost = first_not_data(decode(encode((arguments, named), LIMITS), LIMITS), classes=True)
        except PlainDataError as error:
            lost = str(error)
        if lost is not None:
            self._end("impossible", f"the test calls {name} with what is no plain data: {lost}")
        try:
            write_message(self._calls, (arguments, named), LIMITS)
        except BrokenPipeError:
            self._end("silent")
        except TimeoutError:
            self._end("timeout", "the program takes no call")

    def _receive(self) -> dict[str, Any]:
        """Return the next message of the candidate's process, none of whose content is to be trusted."""
        try:
            answer = read_message(self._answers, LIMITS)
        except TimeoutError:
            self._end("timeout", "no answers within the time that they may take by the clock")
        except EOFError:
            self._end("silent")
        except PlainDataError as error:
            self._end("fail", f"the answer is no plain data: {error}")
        if type(answer) is not dict or any(type(key) is not str for key in answer):
            self._end("fail", "the answer is none that this process asked for")
        if (lost := first_not_data(answer)) is not None:
            self._end("fail", f"the answer is no plain data: {lost}")
        return answer

    def _items(self, answer: dict[str, Any]) -> Iterator[Any]:
        self._told = f"an iterator of {_short(answer['items'])}"

        def items() -> Iterator[Any]:
            yield from answer["items"]
            if answer["then"] is not None:
                self._raise(answer["then"])
            if answer["more"]:
                self._end("fail", f"more than {len(answer['items'])} items were taken from the answer")

        return items()

    def _raise(self, answer: dict[str, Any]) -> NoReturn:
        error = self._exception(answer)
        if isinstance(error, (StopIteration, StopAsyncIteration)):
            # In the test's own `all(map(...))` it would end the loop, and what was not tested would count as passed.
            error = RuntimeError(f"{self._test['entry_point']} raised {_described(error)}")
        self._raised, self._told = error, f"raised {_described(error)}"
        raise error

    def _exception(self, answer: dict[str, Any]) -> BaseException:
        """Return the candidate's exception, of the nearest class that Python or the problem's prompt has."""
        for name in answer.get("classes", ()):
            kind = self._prompt.get(name, vars(builtins).get(name))
            if isinstance(kind, type) and issubclass(kind, BaseException):
                return _made(kind, answer.get("arguments", ()))
        return _made(Exception, answer.get("arguments", ()))

    def _fail_in_thread(self, end: threading.ExceptHookArgs) -> NoReturn:
        # Not by `_fail`: what the candidate told last may be another thread's.
        self._end("fail", f"raised {_described(end.exc_value or end.exc_type())}")

    def _fail(self, error: BaseException) -> NoReturn:
        """Report the test's own failure: the line that failed, and what the candidate had answered before it."""
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TEST_FILE]
        line = (lines[-1] or "") if lines else ""
        said = _described(error)
        if error is self._raised or (isinstance(error, AssertionError) and not error.args and self._told):
            said = self._told
        elif self._told:
            said = f"{self._told}; {said}"
        self._end("fail", said, line)

    def _end(self, ended: Ended, got: str = "", expected: str = "") -> NoReturn:
        """Report and leave at once, past all that the test could catch."""
        self._say(ended, got, expected)
        os._exit(0)

    def _say(self, ended: Ended, got: str = "", expected: str = "") -> None:
        report = TestReport(
            ended=ended, input=self._asked, expected=expected, got=got[:_SHOWN_CHARACTERS], number=self._number
        )
        self._report.write((REPORT_MARK + json.dumps(report)).encode())
        self._report.flush()


class _PatientPipes(io.RawIOBase):
    """The pipes from and to the candidate, which together wait no longer than their patience."""

    def __init__(self, answers: int, calls: int, patience: float) -> None:
        self._answers, self._calls, self._patience = answers, calls, patience

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._wait([self._answers], [])
        data = os.read(self._answers, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        self._wait([], [self._calls])
        return os.write(self._calls, data)

    def _wait(self, readable: list[int], writable: list[int]) -> None:
        before = time.monotonic()
        if not any(select.select(readable, writable, [], max(self._patience, 0.0))):
            raise TimeoutError
        # One patience for all answers together: what sleeps before each has the same time as what computes.
        self._patience -= time.monotonic() - before


def _without(name: str, prompt: str) -> ast.Module:
    """Return a prompt as a module without the function that is asked for, which need not be whole there.

    Raises:
        SyntaxError: when what stands before it is no Python.
    """
    try:
        module = ast.parse(prompt)
    except SyntaxError:
        module = ast.parse(re.split(rf"^(?:@.*\n)*(?:async )?def {name}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0])
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    module.body = [node for node in module.body if not (isinstance(node, kinds) and node.name == name)]
    return module


def _made(kind: type[BaseException], arguments: Any) -> BaseException:
    arguments = tuple(arguments) if isinstance(arguments, (list, tuple)) else ()
    try:
        return kind(*arguments)
    except BaseException:
        # One with a constructor of its own.
        error = kind.__new__(kind)
        error.args = arguments
        return error


def _update(ours: Any, theirs: Any) -> Any:
    """Make ``ours`` what ``theirs`` is, in place where it can be; return what then stands for both."""
    if type(ours) is not type(theirs):
        return theirs
    if isinstance(ours, tuple) and len(ours) == len(theirs):
        return tuple(_update(*pair) for pair in zip(ours, theirs, strict=True))
    if isinstance(ours, list):
        common = min(len(ours), len(theirs))
        ours[:] = [_update(*pair) for pair in zip(ours, theirs, strict=False)] + theirs[common:]
        return ours
    if isinstance(ours, dict):
        updated = {key: _update(ours[key], value) if key in ours else value for key, value in theirs.items()}
        ours.clear()
        ours.update(updated)
        return ours
    if isinstance(ours, set):
        ours.clear()
        ours.update(theirs)
        return ours
    if isinstance(ours, bytearray):
        ours[:] = theirs
        return ours
    if type(ours).__module__ == "numpy" and getattr(ours, "shape", None) and ours.shape == theirs.shape:
        ours[...] = theirs
        return ours
    return theirs


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except BaseException:
        return type(error).__name__


def _short_call(arguments: tuple[Any, ...], named: dict[str, Any]) -> str:
    parts = [*map(_short, arguments), *(f"{key}={_short(value)}" for key, value in named.items())]
    return ", ".join(parts)[:_SHOWN_CHARACTERS]


def _short(value: object) -> str:
    brief = reprlib.Repr()
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxdict = 20
    brief.maxstring = brief.maxother = brief.maxlong = _SHOWN_CHARACTERS
    try:
        return brief.repr(value)[:_SHOWN_CHARACTERS]
    except ValueError:
        # Python writes no integer of more than 4300 digits.
        return f"a {type(value).__name__}"
