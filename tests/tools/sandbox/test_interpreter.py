"""Cells of the interpreter: their text is a notebook's, variables live, and every ending is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reflectron.tools.sandbox.interpreter import Interpreter, InterpreterPool
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

# Enough for a loaded machine; what must run out of time has an interpreter of its own.
LIMITS = SandboxLimits(wall_seconds=120, cpu_seconds=60)


@pytest.fixture(scope="module")
def interpreter(sandbox: SandboxKind) -> Iterator[Interpreter]:
    with Interpreter(sandbox, LIMITS) as running:
        yield running


def test_text_is_what_a_notebook_shows(interpreter: Interpreter) -> None:
    cell = interpreter.execute("import sys\nprint('out', end='')\nprint(' err', file=sys.stderr, end='')\n[1, 'a']")
    assert (cell.status, cell.fresh_kernel) == ("ok", False)
    # Two streams may come in either order; the value stands on a line of its own.
    assert cell.text in ("out err\n[1, 'a']\n", " errout\n[1, 'a']\n")
    assert interpreter.execute("x = 41").text == ""
    assert interpreter.execute("x + 1").text == "42\n"


def test_a_traceback_has_no_colours_and_no_path(interpreter: Interpreter) -> None:
    cell = interpreter.execute("def f(n):\n    assert n == 2, 'not 2'\n\nf(3)")
    assert cell.status == "error"
    assert "\x1b" not in cell.text
    assert "/" not in cell.text
    assert cell.text.startswith("-" * 75 + "\nAssertionError")
    assert cell.text.endswith("\nAssertionError: not 2\n")


def test_odd_cells(interpreter: Interpreter) -> None:
    assert (interpreter.execute("").text, interpreter.execute("# nothing").text) == ("", "")
    assert interpreter.execute("print('\ud800')").text == "?\n"
    assert "SyntaxError" in interpreter.execute("x = (").text
    assert interpreter.execute("input()").status == "error"


def test_many_small_outputs_are_all_there(interpreter: Interpreter) -> None:
    cell = interpreter.execute("for n in range(300): print(n, flush=True)")
    assert cell.text == "".join(f"{n}\n" for n in range(300))


def test_a_cell_that_ends_its_interpreter(sandbox: SandboxKind) -> None:
    with Interpreter(sandbox, LIMITS) as interpreter:
        ended = interpreter.execute("x = 1\nexit()")
        assert (ended.status, ended.fresh_kernel) == ("ok", True)
        assert ended.text == "[stopped: the code ended its interpreter; all variables are lost]\n"
        assert "NameError" in interpreter.execute("x").text


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_computed(sandbox: SandboxKind) -> None:
    with Interpreter(sandbox, SandboxLimits(wall_seconds=3, cpu_seconds=60)) as interpreter:
        late = interpreter.execute("x = 1\nwhile True: pass")
        assert late.status == "wall_time"
        # On a machine that gives it no time to answer, the kernel is lost as well, and the record says so.
        assert late.fresh_kernel or interpreter.execute("x").text == "1\n"
        assert late.text.endswith(
            "[stopped: it ran longer than 3 s" + "; all variables are lost" * late.fresh_kernel + "]\n"
        )


@pytest.mark.slow
def test_each_session_of_a_pool_is_new(sandbox: SandboxKind) -> None:
    with InterpreterPool(sandbox, LIMITS, 2) as pool:
        with pool.session() as first, pool.session() as second:
            assert first.execute("x = 1\nx").text == "1\n"
            assert "NameError" in second.execute("x").text
        with pool.session() as third:
            assert "NameError" in third.execute("x").text
    with pytest.raises(ValueError, match="at least 1"):
        InterpreterPool(sandbox, LIMITS, 0)
