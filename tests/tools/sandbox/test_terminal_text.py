"""Printed text becomes what is read at a terminal; no control character is left."""

from __future__ import annotations

import random
import time

import pytest

from reflectron.tools.sandbox.channels import plain_text
from reflectron.tools.sandbox.interpreter import Interpreter
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

CASES = {
    "a\tb\nc\n": "a\tb\nc\n",
    "\x1b[1;31mred\x1b[0m": "red",
    "\x1b[38:2::255:0:0mred\x1b[m": "red",
    "\x1b[?25l\x1b[2J\x1b[Hhome\x1b[?25h": "home",
    "\x1b]0;title\x07text": "text",
    "\x1b]8;;http://a.b\x1b\\\\link\x1b]8;;\x1b\\\\": "link",
    "\x1bP1$r\x1b\\\\text": "text",
    "\x1b]52;c;cm0gLXJm\nnext": "\nnext",
    "\x9b31mred \x9d0;title\x9ctext": "red text",
    "\x1b(Bset \x1b=\x1b>\x1b7\x1b8": "set ",
    "\x1b": "",
    "\x1b[": "",
    "\a\b\f\v\x7f\x00\x85": "",
    "one\r\ntwo\r\n": "one\ntwo\n",
    " 10%\r 50%\r100%\n": "100%\n",
    "long line\rshort": "shortline",
    "long line\r\x1b[Kshort": "short",
    "done\r": "done",
    "\u202eright to left": "right to left",
    "é 漢字 👩‍💻 \u200f": "é 漢字 👩‍💻 \u200f",
}


@pytest.mark.parametrize("printed", CASES)
def test_what_is_read(printed: str) -> None:
    assert plain_text(printed.replace("\\\\", "\\")) == CASES[printed]


def test_no_control_character_is_left_whatever_is_printed() -> None:
    draw = random.Random(0)
    alphabet = "\x1b\x9b\x9d[]0;K\\mPaé\r\n\t\0\x07\x08\x9c\u2066\ud800 "
    for _ in range(3000):
        text = plain_text("".join(draw.choices(alphabet, k=draw.randrange(30))))
        assert not [char for char in text if not char.isprintable() and char not in "\n\t"], text
        text.encode()


def test_a_megabyte_of_it_takes_no_time() -> None:
    for part in ("\r", "\x1b]", "\x1b[", "\x1b[0", "ab\r\x1b[K", "\x9d\x1b"):
        before = time.process_time()
        plain_text("x" * 500_000 + part * 250_000)
        assert time.process_time() - before < 5


def test_a_cell_is_recorded_as_text(sandbox: SandboxKind) -> None:
    printed = "\x1b[31mred\x1b[0m \x1b]0;title\a1%\r2%"
    code = f"print({printed!r}, flush=True)\nraise ValueError('\\x1b]2;t\\x07 \\x9b7m')"
    with Interpreter(sandbox, SandboxLimits(wall_seconds=60, cpu_seconds=60)) as interpreter:
        text = interpreter.execute(code).text
    assert text.startswith("2%d 1%\n"), text
    assert not [char for char in text if not char.isprintable() and char not in "\n\t"]
    assert "ValueError" in text
