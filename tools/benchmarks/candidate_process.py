"""Runs inside a sandbox: it loads a program, answers calls of one of its functions, and knows nothing of the test.

Messages are plain data in both directions, through stdin and stdout as they are at the start; the program's own are
others. What is written here can be forged by the program, so the reader takes it for no more than answers. The forms
and limits of all messages between program and test stand here, too, and ``check_process`` speaks them.
"""

from __future__ import annotations

import collections
import collections.abc
import contextlib
import io
import os
import sys
import types
from collections.abc import Collection
from itertools import islice
from typing import Any, BinaryIO, Literal, TypedDict

from reflectron.tools.sandbox.plain_data import (
    DataLimits,
    NotData,
    PlainDataError,
    decode,
    encode,
    read_message,
    write_message,
)

JOB_LIMITS = DataLimits(message_bytes=1 << 31)
LIMITS = DataLimits(message_bytes=64 << 20, nodes=1 << 22)
"""The limits of one call or answer."""
MOST_ITEMS = 100_000
"""Items taken from an iterator that is the answer, where it lives."""

JOB_FILE = "job.data"
REPORT_MARK = "\nreport: "

Ended = Literal["pass", "fail", "timeout", "silent", "called", "impossible"]
"""How a test ended. ``silent``: the function's process ended before it answered. ``called``: the first call of a probe.
``impossible``: the test asks for what cannot cross."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments by position and by name."""


class ProgramJob(TypedDict):
    """The content of ``JOB_FILE`` for the process of the function."""

    code: str
    entry_point: str


class TestJob(TypedDict):
    """A test, as the problem has it."""

    prompt: str
    test: str
    entry_point: str


class TestsJob(TypedDict):
    """The content of ``JOB_FILE`` for the process of the test."""

    tests: list[TestJob]
    """One; several for a probe."""
    patience: float
    """Seconds of the clock that all answers together may take."""
    probe: bool
    """Whether to end each test at its first call, which nobody answers."""


class TestReport(TypedDict):
    """The last words of the process of the test, as JSON behind ``REPORT_MARK`` on stderr, test by test."""

    ended: Ended
    input: str
    expected: str
    got: str
    number: int
    """The test's number."""


_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, range})


def first_not_data(value: Any, *, classes: bool = False) -> str | None:
    """Return what in a decoded value has lost something on the way, if anything.

    Args:
        classes: whether an instance that has become one of its plain base counts.
    """
    frontier = [value]
    while frontier:
        value = frontier.pop()
        if type(value) is NotData:
            return value.description
        if classes and type(type(value)) is not type:
            return f"an instance of a {type(value).__name__}"
        for elements in _parts(value):
            # Mostly all are numbers or text.
            if not _LEAVES.issuperset(map(type, elements)):
                frontier += elements
    return None


def _parts(value: Any) -> tuple[Collection[Any], ...]:
    if isinstance(value, dict):
        return value.keys(), value.values()
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return (value,)
    if type(value).__module__ == "numpy" and value.dtype.kind == "O":
        return (value.ravel().tolist(),)
    return ()


_PRINTED_CHARACTERS = 1 << 20
_TEXT_CHARACTERS = 1000
_ARGUMENTS_BYTES = 1 << 16


def main() -> None:
    """Load the program, then answer calls until there are no more."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    with open(JOB_FILE, "rb") as file:
        program: ProgramJob = read_message(file, JOB_LIMITS)
    printed = _Printed()
    with contextlib.redirect_stdout(printed):
        try:
            function = _load(program)
        except BaseException as error:
            _write(answers, {"kind": "raised", **_raised(error)})
            return
        _write(answers, {"kind": "loaded"})
        while True:
            try:
                call: Call = read_message(calls, LIMITS)
            except EOFError:
                return
            _write(answers, _answer(function, call) | {"printed": printed.take()})


def _load(program: ProgramJob) -> Any:
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    # Not with this module's own `from __future__ import annotations`.
    exec(compile(program["code"], "solution.py", "exec", dont_inherit=True), vars(module))
    if program["entry_point"] not in vars(module):
        raise NameError(f"name '{program['entry_point']}' is not defined")
    return vars(module)[program["entry_point"]]


def _answer(function: Any, call: Call) -> dict[str, Any]:
    arguments, named = call
    before = encode(call, LIMITS)
    try:
        value = function(*arguments, **named)
        answer = _described(value, [*arguments, *named.values()])
    except BaseException as error:
        answer = {"kind": "raised", **_raised(error)}
    try:
        if encode(call, LIMITS) != before:
            answer["arguments"] = call
    except PlainDataError as error:
        return {"kind": "unfit", "reason": str(error)}
    return answer


def _described(value: Any, arguments: list[Any]) -> dict[str, Any]:
    for number, argument in enumerate(arguments):
        if value is argument and isinstance(value, (list, dict, set, bytearray)):
            return {"kind": "argument", "number": number}
    if isinstance(value, collections.abc.Iterator):
        return _items(value)
    return {"kind": "value", "value": value}


def _items(iterator: collections.abc.Iterator[Any]) -> dict[str, Any]:
    items: list[Any] = []
    answer: dict[str, Any] = {"kind": "items", "items": items, "more": False, "then": None}
    try:
        items.extend(islice(iterator, MOST_ITEMS))
        answer["more"] = len(items) == MOST_ITEMS and next(iterator, answer) is not answer
    except BaseException as error:
        # `extend` keeps what came before the error.
        answer["then"] = _raised(error)
    return answer


def _raised(error: BaseException) -> dict[str, Any]:
    """Return an exception as plain data: the names of its classes, nearest first, and what it was made of."""
    names = [kind.__name__ for kind in type.mro(type(error))]
    try:
        encoded = encode(tuple(error.args), LIMITS)
        if len(encoded) <= _ARGUMENTS_BYTES and first_not_data(arguments := decode(encoded, LIMITS)) is None:
            return {"classes": names, "arguments": arguments}
    except BaseException:
        # Whatever a program's own exception does when it is asked.
        pass
    try:
        return {"classes": names, "arguments": (str(error)[:_TEXT_CHARACTERS],)}
    except BaseException:
        return {"classes": names, "arguments": ()}


def _write(answers: BinaryIO, answer: dict[str, Any]) -> None:
    try:
        write_message(answers, answer, LIMITS)
    except PlainDataError as error:
        write_message(answers, {"kind": "unfit", "reason": str(error)}, LIMITS)


class _Printed(io.StringIO):
    """Keeps what a program prints, up to a limit."""

    def write(self, text: str) -> int:
        room = _PRINTED_CHARACTERS - self.tell()
        super().write(text[: max(room, 0)])
        return len(text)

    def take(self) -> str:
        """Return all that was printed since the last time."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text
