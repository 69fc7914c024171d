"""What others wrote is shown on one line, without a character that a terminal or a file could trip over."""

from __future__ import annotations

import pytest

from reflectron.engine.files import one_line, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("two\nlines\tand a tab", "two lines and a tab"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("C1 \x9b31m", r"C1 \x9b31m"),
        ("half a pair \ud800", r"half a pair \ud800"),
        ("reversed \u202e", r"reversed \u202e"),
        ("日本語 é", "日本語 é"),
        (12, "12"),
        ("", ""),
    ],
)
def test_printable(text: object, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_printable_is_bounded() -> None:
    assert printable("x" * 10_000_000, 20) == "x" * 19 + "…"
    assert printable("\x1b" * 1000, 20) == (r"\x1b" * 5)[:19] + "…"
    assert printable("x" * 20, 20) == "x" * 20


def test_one_line_of_an_error_that_has_no_text() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    assert one_line(Mute()) == "Mute:"
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
