"""How a sample did in its tests: bounded, printable text under a fixed schema, whatever the sample made up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from reflectron.engine.text import printable
from reflectron.tools.sandbox.limits import Breach

SUITES = ("base", "plus")
"""The tests of HumanEval and MBPP, and those that evalplus added; other benchmarks have the first alone."""
STATUSES = ("pass", "fail", "timeout")
"""evalplus's words."""
OF_TIME = ("wall_time", "cpu_time", "idle")
"""Breaches that count as a timeout, as they do for evalplus, whose limits are of the clock."""
LONGER_SECONDS = 10.0
"""CPU time of an input in a second trial, where the limit on it decided the first."""


@dataclass(frozen=True)
class Verdict:
    """How a sample did in one suite of tests."""

    status: str
    """One of ``STATUSES``."""
    input: str = ""
    expected: str = ""
    got: str = ""
    """Of the first input that failed, shortened; for ``got`` also the error."""
    longer: str = ""
    """Status with ``LONGER_SECONDS`` of CPU time an input, where the limit on it decided; else empty."""

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.longer in ("", *STATUSES), self.longer
        for name in ("input", "expected", "got"):
            object.__setattr__(self, name, printable(getattr(self, name)))


def limit_verdict(breach: Breach) -> Verdict:
    """The verdict on a program that overstepped a limit of its sandbox."""
    return Verdict("timeout" if breach in OF_TIME else "fail", got=f"limit: {breach}")


Verdicts = tuple[Verdict, ...]
"""Of one sample, in the order of ``SUITES``."""


def as_row(verdicts: Verdicts) -> list[dict[str, str]]:
    """Verdicts as JSON holds them."""
    return [asdict(verdict) for verdict in verdicts]


def from_row(row: Any) -> Verdicts:
    """Verdicts from ``as_row``.

    Raises:
        ValueError: when ``row`` is something else.
    """
    names = {field.name for field in fields(Verdict)}
    if not isinstance(row, list) or not 1 <= len(row) <= len(SUITES):
        raise ValueError("expected a list of verdicts")
    for item in row:
        if not isinstance(item, dict) or item.keys() != names or not all(isinstance(v, str) for v in item.values()):
            raise ValueError(f"expected a verdict with the texts {', '.join(sorted(names))}")
        if item["status"] not in STATUSES or item["longer"] not in ("", *STATUSES):
            raise ValueError(f"expected a status of {', '.join(STATUSES)}")
    return tuple(Verdict(**item) for item in row)
