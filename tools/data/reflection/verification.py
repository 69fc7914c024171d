"""Whether a one-off answer passes its sequence's tests, and whether those tests would notice if it did not.

Every run has a fresh sandbox. A run passes when its tests come to their end, not when it merely exits with 0: the tests
are sent when the code has run, and when they have ended the process is asked for a word that nobody knew before.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.text import printable
from reflectron.tools.data.reflection.mutation import mutants, without_bodies
from reflectron.tools.data.reflection.program import Tests
from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.limits import Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Sandboxed

_SCRIPT = Path(__file__).with_name("trial.py")
_FATE_CHARACTERS = 200

Fate = str
"""``passed``, or what ended the run: an exception's name, or the limit that was overstepped."""
Runner = Callable[[str, str], Fate]
"""Runs code and then its tests."""


@dataclass(frozen=True)
class Verdict:
    """What verification found."""

    reason: str | None
    """Why the answer is no good: ``<kind>: <detail>``; None when it is."""
    mutants_tried: int = 0
    killed_by: str | None = None
    """The change that made an assertion fail."""


def verify(answer: str, tests: Tests, most_mutants: int, run: Runner) -> Verdict:
    """Run an answer with its tests, then changed answers until an assertion fails.

    A change that makes the program crash proves only that it was called; an assertion has to notice a wrong result.

    Args:
        answer: code that parses.
    """
    if not tests.targets:
        return Verdict("other names: the answer defines no function or class that the sequence tested")
    if (fate := run(answer, tests.code)) != "passed":
        return Verdict(f"tests fail on the answer: {fate}")
    tried = 0
    for tried, mutant in enumerate(itertools.islice(mutants(answer), most_mutants), 1):
        if run(mutant.code, tests.code) == "AssertionError":
            return Verdict(None, tried, mutant.change)
    if run(without_bodies(answer, tests.targets), tests.code) == "passed":
        return Verdict(f"tests call nothing: {', '.join(sorted(tests.targets))} may raise and they still pass", tried)
    return Verdict(f"vacuous tests: no assertion fails for any of {tried} mutants", tried)


def sandbox_runner(kind: SandboxKind, limits: Limits) -> Runner:
    """Runs programs, each in a fresh sandbox and an empty folder, without input."""

    def run(code: str, tests: str) -> Fate:
        deadline = time.monotonic() + limits.wall_seconds
        with sandbox_folder() as folder, contextlib.ExitStack() as pipes:
            shutil.copyfile(_SCRIPT, folder / "trial.py")
            theirs, ours = os.pipe()
            pipes.callback(os.close, ours)
            os.set_blocking(ours, False)
            try:
                running = Sandboxed(
                    kind,
                    [sys.executable, "-I", "trial.py"],
                    writable={wall.FOLDER: folder},
                    limits=limits,
                    environment={},
                    stdin=theirs,
                )
            finally:
                os.close(theirs)
            with running:
                for name, part in (("program.py", code), ("tests.py", tests)):
                    fate = _told(running, ours, {"name": name, "code": part}, deadline)
                    if fate != "passed":
                        return fate or _ended(running, deadline)
                word = secrets.token_hex(16)
                said = _told(running, ours, {"word": word}, deadline)
                return "passed" if said == word else _ended(running, deadline)

    return run


def _told(running: Sandboxed, stdin_fd: int, part: dict[str, str], deadline: float) -> Fate | None:
    """What the script in the sandbox says of a part; None when it says nothing, or nothing of its kind."""
    line = running.ask(stdin_fd, json.dumps(part).encode() + b"\n", deadline)
    try:
        fate = json.loads(line or b"")
    # Nesting beyond the parser's stack, a number of too many digits, no UTF-8.
    except (ValueError, RecursionError):
        return None
    return printable(fate, _FATE_CHARACTERS) if isinstance(fate, str) else None


def _ended(running: Sandboxed, deadline: float) -> Fate:
    """Why nothing more was said."""
    if running.process.breach is None and time.monotonic() >= deadline:
        running.process.stop("wall_time")
    # What it printed is of no interest; what ended it is.
    outcome = running.outcome("", "", 0.0)
    return "ended before its tests" if outcome.ended == "exited" else outcome.ended
