"""Run a program that a model wrote, behind a wall and within limits, and say how it ended.

Comes in: a command, one writable folder, limits. Goes out: an `Outcome`. Whatever the program does, this returns within
the wall-clock limit plus the time to kill it, holds no more than ``output_bytes`` of its output, and leaves no process.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.limits import Breach, Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Outcome, Sandboxed

__all__ = [
    "Breach",
    "Limits",
    "Outcome",
    "SandboxKind",
    "add_sandbox_arguments",
    "choose_sandbox",
    "run_sandboxed",
    "sandbox_folder",
]

_INSTALL = "`apt-get install bubblewrap`, `dnf install bubblewrap` or `conda install -c conda-forge bubblewrap`"
_UNSAFE = "or `--sandbox none --i-understand` runs that code with all your rights"


def run_sandboxed(
    kind: SandboxKind,
    argv: Sequence[str],
    *,
    folder: Path,
    limits: Limits,
    stdin: str = "",
    read_only: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Outcome:
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
    """``--sandbox`` and ``--i-understand``, for `choose_sandbox`."""
    parser.add_argument(
        "--sandbox",
        choices=get_args(SandboxKind),
        default="bubblewrap",
        help="the wall around model-written code (default: bubblewrap)",
    )
    parser.add_argument(
        "--i-understand", action="store_true", help="with --sandbox none: code that a model wrote runs with your rights"
    )


def choose_sandbox(requested: SandboxKind, i_understand: bool) -> SandboxKind:
    """The sandbox to use, tried out.

    Raises:
        ValueError: bubblewrap is missing or does not work here, or "none" was not confirmed.
    """
    if requested == "none":
        if not i_understand:
            raise ValueError("--sandbox none runs model-written code with all your rights: confirm with --i-understand")
        return requested
    for program, package in (("bwrap", _INSTALL), ("prlimit", "`util-linux`"), ("setpriv", "`util-linux`")):
        if shutil.which(program) is None:
            raise ValueError(f"model-written code runs in bubblewrap, but {program} is missing: {package}; {_UNSAFE}")
    if not Path(f"/proc/self/task/{threading.get_native_id()}/children").exists():
        raise ValueError(f"this Linux tells no children of a process, so that limits cannot be kept; {_UNSAFE}")
    with sandbox_folder() as folder:
        try:
            outcome = run_sandboxed(requested, ["true"], folder=folder, limits=Limits())
        except OSError as error:
            raise ValueError(f"{error}; docs/sandbox.md says how to allow it, {_UNSAFE}") from None
    if outcome.returncode != 0:
        raise ValueError(f"a trial in the sandbox ended with {outcome.ended}: {outcome.stderr.strip()}; {_UNSAFE}")
    return requested
