"""What passes between a function under test and the test that calls it: plain data, within these limits."""

from __future__ import annotations

import collections
from collections.abc import Collection
from typing import Any, Literal, TypedDict

from reflectron.tools.sandbox.plain_data import DataLimits, NotData

JOB_LIMITS = DataLimits(message_bytes=1 << 31)
LIMITS = DataLimits(message_bytes=64 << 20, nodes=1 << 22)
"""Of one call or answer."""
MOST_ITEMS = 100_000
"""Of an iterator that is the answer: its items are taken out where it lives."""

JOB_FILE = "job.data"
REPORT_MARK = "\nreport: "

Ending = Literal["pass", "fail", "timeout", "silent", "called", "impossible"]
"""How a test ended. ``silent``: the function's process ended before it answered. ``called``: the first call of a probe.
``impossible``: the test asks for what cannot cross."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments by position and by name."""


class Program(TypedDict):
    """What the process of the function finds in ``JOB_FILE``."""

    code: str
    entry_point: str


class Test(TypedDict):
    """A test, as the problem has it."""

    prompt: str
    test: str
    entry_point: str


class Tests(TypedDict):
    """What the process of the test finds in ``JOB_FILE``."""

    tests: list[Test]
    """One; several for a probe."""
    patience: float
    """Seconds of the clock that all answers together may take."""
    probe: bool
    """Whether to end each test at its first call, which nobody answers."""


class Report(TypedDict):
    """What the process of the test says at its end, as JSON behind ``REPORT_MARK`` on stderr, test by test."""

    ended: Ending
    input: str
    expected: str
    got: str
    number: int
    """Of the test."""


_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, range})


def first_not_data(value: Any, *, classes: bool = False) -> str | None:
    """What in a decoded value has lost something on the way, if anything.

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
