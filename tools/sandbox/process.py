"""Run programs that a model wrote, behind a wall and within limits, and say how they ended.

`run_sandboxed` runs one program; `hold_dialogue` runs two in two sandboxes, each the other's stdin, neither seeing the
other; `staged` copies modules of ours to where a sandboxed program can import them. Whatever a program does, the call
returns within the wall-clock limit plus the time to kill it, holds no more than ``output_bytes`` of its output, and
leaves no process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.sandboxed import Sandboxed, SandboxOutcome
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

_READ_BYTES = 1 << 16
_POLL_SECONDS = 0.05
# For the watch to notice why a program ended whose pipes are closed.
_NOTICE_SECONDS = 1.0
_TOOLS = Path(__file__).parent.parent
_INSTALL = "`apt-get install bubblewrap`, `dnf install bubblewrap` or `conda install -c conda-forge bubblewrap`"
_UNSAFE = "or `--sandbox none --i-understand` runs that code with all your rights"


def run_sandboxed(
    kind: SandboxKind,
    argv: Sequence[str],
    *,
    folder: Path,
    limits: SandboxLimits,
    stdin: str = "",
    read_only: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> SandboxOutcome:
    """Run ``argv`` to its end and kill what it leaves behind.

    Args:
        kind: "none" keeps the limits, but hides nothing from the program and lets it escape them.
        argv: with paths relative to ``folder``. The running Python is visible, editable installs are not.
        folder: the one folder that the program can write and you can read, inside ``/sandbox``: its working folder
            and home. Run by root, its files belong to another user afterwards.
        read_only: further paths that the program sees under their own names.
        environment: added to a clean one; nothing is inherited.

    Raises:
        OSError: the sandbox could not be made, so that nothing has run.
    """
    before = time.monotonic()
    with tempfile.TemporaryFile() as given:
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        running = Sandboxed(
            kind,
            argv,
            writable={wall.FOLDER: folder},
            limits=limits,
            environment=environment or {},
            read_only=read_only,
            stdin=given.fileno(),
        )
    with running:
        stdout, stderr = running.communicate(before + limits.wall_seconds)
        return running.outcome(stdout, stderr, time.monotonic() - before)


def add_sandbox_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--sandbox`` and ``--i-understand``, for `choose_sandbox`."""
    parser.add_argument(
        "--sandbox",
        choices=get_args(SandboxKind),
        default="bubblewrap",
        help="how model-written code is isolated (default: bubblewrap)",
    )
    parser.add_argument(
        "--i-understand", action="store_true", help="with --sandbox none: code that a model wrote runs with your rights"
    )


def choose_sandbox(requested: SandboxKind, i_understand: bool) -> SandboxKind:
    """Return the sandbox to use, tried out.

    Raises:
        ValueError: bubblewrap is missing or does not work here, or "none" was not confirmed.
    """
    if wall.is_walled(requested):
        _try_wall()
    elif not i_understand:
        raise ValueError("--sandbox none runs model-written code with all your rights: confirm with --i-understand")
    return requested


def _try_wall() -> None:
    for program, package in (("bwrap", _INSTALL), ("prlimit", "`util-linux`"), ("setpriv", "`util-linux`")):
        if shutil.which(program) is None:
            raise ValueError(f"model-written code runs in bubblewrap, but {program} is missing: {package}; {_UNSAFE}")
    if not Path(f"/proc/self/task/{threading.get_native_id()}/children").exists():
        raise ValueError(f"this Linux tells no children of a process, so that limits cannot be kept; {_UNSAFE}")
    with sandbox_folder() as folder:
        try:
            outcome = run_sandboxed("bubblewrap", ["true"], folder=folder, limits=SandboxLimits())
        except OSError as error:
            raise ValueError(f"{error}; docs/sandbox.md says how to allow it, {_UNSAFE}") from None
    if outcome.returncode != 0:
        raise ValueError(f"a trial in the sandbox ended with {outcome.ended}: {outcome.stderr.strip()}; {_UNSAFE}")


@dataclass(frozen=True)
class Speaker:
    """Describes one of the two programs."""

    argv: Sequence[str]
    folder: Path
    limits: SandboxLimits
    environment: Mapping[str, str]


@dataclass(frozen=True)
class SandboxDialogue:
    """Records how both programs ended, with what they wrote to stderr."""

    asking: SandboxOutcome
    answering: SandboxOutcome


def hold_dialogue(kind: SandboxKind, asking: Speaker, answering: Speaker) -> SandboxDialogue:
    """Run both programs until the asking one has ended; then the other is killed.

    The asking program's limit on the clock is that of the dialogue; how long it waits for an answer is its own affair.

    Raises:
        OSError: a sandbox could not be made.
    """
    before = time.monotonic()
    deadline = before + asking.limits.wall_seconds
    with contextlib.ExitStack() as running:
        with contextlib.ExitStack() as ends:
            questions, answers = _pipe(ends), _pipe(ends)
            asker = running.enter_context(_started(kind, asking, answers[0], questions[1]))
            answerer = running.enter_context(_started(kind, answering, questions[0], answers[1]))
        report = _Kept(asker, asking.limits.output_bytes)
        complaints = _Kept(answerer, answering.limits.output_bytes)
        _read(asker, answerer, (report, complaints), deadline)
        if not asker.process.wait(deadline):
            asker.process.stop("wall_time")
        seconds = time.monotonic() - before
        asked = asker.outcome("", report.text(), seconds)
        if complaints.ended:
            answerer.process.wait(time.monotonic() + _NOTICE_SECONDS)
        return SandboxDialogue(asked, answerer.outcome("", complaints.text(), seconds))


def _pipe(ends: contextlib.ExitStack) -> tuple[int, int]:
    pipe = os.pipe()
    for end in pipe:
        ends.callback(os.close, end)
    return pipe


def _started(kind: SandboxKind, speaker: Speaker, stdin: int, stdout: int) -> Sandboxed:
    return Sandboxed(
        kind,
        speaker.argv,
        writable={wall.FOLDER: speaker.folder},
        limits=speaker.limits,
        environment=speaker.environment,
        stdin=stdin,
        stdout=stdout,
    )


def _read(asker: Sandboxed, answerer: Sandboxed, kept: Sequence[_Kept], deadline: float) -> None:
    """Read what both write to stderr until the asking program has ended."""
    report = kept[0]
    with selectors.DefaultSelector() as selector:
        for one in kept:
            selector.register(one.descriptor, selectors.EVENT_READ, one)
        while not report.ended and time.monotonic() < deadline:
            ended = asker.process.ended()
            ready = selector.select(_POLL_SECONDS)
            for key, _ in ready:
                if not key.data.take():
                    selector.unregister(key.fd)
            # The end of the one who answers lets the other end as well.
            if answerer.process.stopped() or (answerer.process.stands_still() and asker.process.stands_still()):
                answerer.process.stop("idle")
            # Where there is no wall, a process left behind may hold the pipe open.
            if ended and not ready:
                return


class _Kept:
    """Keeps the beginning of what a program writes to stderr; one that writes more is ended."""

    def __init__(self, program: Sandboxed, most: int) -> None:
        self.ended = False
        self.descriptor = program.stderr_fd
        self._program, self._most, self._data = program, most, b""

    def take(self) -> bool:
        """Read what is there; returns whether there can be more."""
        data = os.read(self.descriptor, _READ_BYTES)
        self.ended = not data
        if len(self._data) + len(data) > self._most:
            self._program.process.stop("output")
        self._data += data[: self._most - len(self._data)]
        return not self.ended

    def text(self) -> str:
        """Return what was kept, as text."""
        return self._data.decode(errors="replace")


def staged(folder: Path, module: str, *needed: str) -> list[str]:
    """Copy a module of ``reflectron.tools`` and those that it imports into ``folder``.

    Args:
        module: as ``eval.answering``; it has a function ``main``.

    Returns:
        The command that calls its ``main``, for a sandbox whose folder this is.
    """
    for name in (module, *needed):
        path = Path(*name.split(".")).with_suffix(".py")
        target = folder / "reflectron" / "tools" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_TOOLS / path, target)
        target.with_name("__init__.py").touch()
    program = f"import os, sys\nsys.path.insert(0, os.getcwd())\nfrom reflectron.tools.{module} import main\nmain()"
    return [sys.executable, "-I", "-c", program]
