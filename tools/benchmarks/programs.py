"""Runs a program with its tests in one file, in a sandbox, for benchmarks whose own scripts do the same.

A program passes when it exits with 0, as those scripts have it, and has come to the end of its tests, which they do not
ask for: one that exits early with 0 fails here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.benchmarks.benchmark import SuiteVerdict, limit_verdict
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.process import run_sandboxed
from reflectron.tools.sandbox.sandboxed import SandboxOutcome
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

# Seconds of the clock for each second of CPU time, which is what counts: a loaded machine passes what an idle one does.
_PATIENCE = 5
MEMORY_BYTES = 4 << 30
"""What one program may use, address space included."""


@dataclass(frozen=True)
class Toolchain:
    """The way programs of a language are run: every step must exit with 0."""

    file: str
    steps: tuple[tuple[str, ...], ...]
    cpu_seconds: int = 60

    @property
    def missing(self) -> str | None:
        """The first of its programs that is not installed, if any."""
        return next((step[0] for step in self.steps if not step[0].startswith("./") and _found(step[0]) is None), None)


# The mark is out of reach of a program that replaces itself by another one.
_RUN_PYTHON = """
import os
def main():
    mark, said = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with open("problem.py", encoding="utf-8") as file:
        program = compile(file.read(), "problem.py", "exec")
    exec(program, {"__name__": "__main__"})
    os.write(said, os.read(mark, 64))
main()
"""
PYTHON_TOOLCHAIN = Toolchain("problem.py", ((sys.executable, "-I", "-c", _RUN_PYTHON),), cpu_seconds=120)
"""This interpreter, which says itself when a program has come to its end."""


def run_with_tests(
    program: str, toolchain: Toolchain, kind: SandboxKind, files: Mapping[str, Path] | None = None
) -> SuiteVerdict:
    """Run a program that holds its tests; it passes when it exits with 0 and has come to the end of them.

    Args:
        program: where its tests end, it or its toolchain copies its standard input to its standard output.
        files: copied beside it, by their names there.
    """
    # In no file and in no memory of the program's before its tests have ended, unless it reads its standard input.
    mark = secrets.token_hex(16)
    with sandbox_folder() as folder:
        (folder / toolchain.file).write_bytes(program.encode(errors="replace"))
        for name, path in (files or {}).items():
            shutil.copyfile(path, folder / name)
        for step in toolchain.steps:
            outcome = _run(step, folder, toolchain, kind, mark if step is toolchain.steps[-1] else "")
            if outcome.ended != "exited" or outcome.returncode:
                return _verdict(outcome)
    if mark in outcome.stdout:
        return SuiteVerdict("pass")
    return SuiteVerdict("fail", got="the program ended before its tests did")


def _run(step: Sequence[str], folder: Path, toolchain: Toolchain, kind: SandboxKind, stdin: str) -> SandboxOutcome:
    program = step[0]
    found = None if program.startswith("./") else _found(program)
    limits = SandboxLimits(
        wall_seconds=_PATIENCE * toolchain.cpu_seconds,
        cpu_seconds=toolchain.cpu_seconds,
        memory_bytes=MEMORY_BYTES,
        processes=256,
    )
    argv = [str(found or program), *step[1:]]
    environment = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    visible = _visible(found)
    return run_sandboxed(
        kind, argv, folder=folder, limits=limits, stdin=stdin, read_only=visible, environment=environment
    )


def _found(program: str) -> Path | None:
    """Return where a program is, past rustup's stand-in, which needs a home of its own."""
    path = shutil.which(program)
    if path is None:
        return None
    if program == "rustc":
        root = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True, check=False)
        return Path(root.stdout.strip()) / "bin" / "rustc" if root.returncode == 0 else None
    return Path(path)


def _visible(program: Path | None) -> list[Path]:
    """Return what a program needs to see beside the system's folders: its installation, a JDK's settings in /etc."""
    if program is None:
        return []
    home = Path(os.path.realpath(program)).parent.parent
    settings = {Path(os.path.realpath(path)).parent for path in home.glob("conf/**/*")}
    return [path for path in (home, program.parent.parent, *sorted(settings)) if not path.is_relative_to("/usr")]


def _verdict(outcome: SandboxOutcome) -> SuiteVerdict:
    if outcome.breach is not None:
        return limit_verdict(outcome.breach)
    said = (outcome.stderr or outcome.stdout).strip()
    return SuiteVerdict("fail", got=said[-300:] or f"exit code {outcome.returncode}")
