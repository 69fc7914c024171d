"""What the comparing process may say: a line of a fixed form, of bounded length, before a deadline."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from reflectron.tools.benchmarks.benchmark import SuiteVerdict
from reflectron.tools.benchmarks.evalplus_judge import _checked, _read_line
from reflectron.tools.benchmarks.judging import as_row, from_row

SAID = {"status": "pass", "input": "", "expected": "", "got": ""}


def line(said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"


def test_a_verdict_is_taken() -> None:
    assert _checked(line({**SAID, "got": "\ud800"})) == {**SAID, "got": "\ud800"}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        line(SAID)[:-1],
        line(SAID) * 2,
        b"[" * 10_000 + b"\n",
        b"\x80\x04N.\n",
        line([SAID]),
        line("pass"),
        line({**SAID, "status": "PASS"}),
        line({**SAID, "status": ["pass"]}),
        line({**SAID, "got": None}),
        line({**SAID, "got": {"a": 1}}),
        line({**SAID, "more": ""}),
        line({"status": "pass"}),
        line({**SAID, "got": "x" * 20_000}),
    ],
)
def test_anything_else_is_no_verdict(said: bytes) -> None:
    assert _checked(said) is None


def test_reading_ends() -> None:
    read, write = os.pipe()
    os.write(write, b"half a li")
    assert _read_line(read, time.monotonic() + 0.05) == b"half a li"
    os.write(write, b"x" * 60_000)
    assert len(_read_line(read, time.monotonic() + 60)) < 40_000
    os.close(write)
    while _read_line(read, time.monotonic() + 60):
        pass
    os.close(read)


def test_verdicts_are_printable_and_come_back() -> None:
    verdict = SuiteVerdict("timeout", "\x1b[31m", "\ud800", "x" * 10_000, longer="pass")
    assert all(text.isprintable() and len(text) <= 300 for text in as_row((verdict,))[0].values())
    assert from_row(json.loads(json.dumps(as_row((verdict, verdict))))) == (verdict, verdict)
    with pytest.raises(ValueError, match="expected a status"):
        from_row([{**as_row((verdict,))[0], "longer": "perhaps"}])
