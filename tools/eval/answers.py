"""A program goes into the sandbox, and its answers come out through pipes that whoever judges them reads.

Nothing that the program writes is looked at here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reflectron.engine.text import one_line, printable
from reflectron.tools.eval.verdict import OF_TIME
from reflectron.tools.sandbox import plain_data
from reflectron.tools.sandbox.process import Limits, SandboxKind, run_sandboxed

_FOLDER_BYTES = 64 << 20
_STORED_BYTES = 4 << 30
# Of the sandbox's own processes, the imports and the writing of answers, beside the time of the suites.
_OVERHEAD_SECONDS = 30
_PATIENCE = 5


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is run: code, a function of it, and suites of inputs for it."""

    code: str
    entry_point: str
    suites: Sequence[bytes]
    """Lists of argument lists, encoded as plain data."""
    seconds: Sequence[Sequence[float]]
    """CPU time allowed to each input."""
    suite_seconds: int
    """CPU time allowed to a suite."""
    memory_bytes: int
    form: Literal["whole", "set", "presence"] = "whole"
    """What is wanted of an answer: itself, a set given as any iterable, or whether there is one."""


@dataclass(frozen=True)
class Cut:
    """Why a program ended before it should have; no words if it did not."""

    words: str = ""
    by_time: bool = False
    """A limit on its time ended it."""


class AnswerPipes:
    """A program's answers, one pipe a suite, with the read ends open before the program starts.

    Args:
        folder: an empty folder, the program's writable one.
        stored: files instead of pipes, for a program that is trusted to write that much.
    """

    def __init__(self, program: Program, folder: Path, *, stored: bool = False) -> None:
        self._program, self._folder, self._stored = program, folder, stored
        self._open: set[int] = set()
        copy_script("answering.py", folder)
        with (folder / "job").open("wb") as job:
            fields = {name: value for name, value in vars(program).items() if name != "suites"}
            plain_data.write_message(job, fields)
            for suite in program.suites:
                job.write(len(suite).to_bytes(8, "little") + suite)
        paths = [folder / f"answers.{number}" for number in range(len(program.suites))]
        for path in paths:
            path.touch() if stored else os.mkfifo(path)
        self.answers = [self._opened(path) for path in paths]
        """Descriptors of each suite's answers."""
        self.ended, self._running = os.pipe()
        """A pipe that ends when nobody is left who could write."""
        self._open |= {self.ended, self._running}
        self._job = self._opened(folder / "job")

    def __enter__(self) -> AnswerPipes:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(*self._open)

    def stop_reading(self) -> None:
        """Let go of what others have taken over: a program that writes on when nobody else reads is ended by that."""
        self._close(*self.answers, self.ended)

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._open.add(descriptor)
        return descriptor

    def _close(self, *descriptors: int) -> None:
        for descriptor in self._open.intersection(descriptors):
            self._open.remove(descriptor)
            os.close(descriptor)

    def run(self, kind: SandboxKind) -> Cut:
        """Run the program to its end; says why it ended before it should have, if it did.

        Raises:
            OSError: when the program cannot have been the reason, because it had not been started.
        """
        try:
            return self._run(kind)
        except OSError as error:
            if not self._started():
                raise
            # The program can stop or kill what reports on it.
            return Cut(f"its sandbox ended: {one_line(error)}")
        finally:
            self._close(self._running)

    def _run(self, kind: SandboxKind) -> Cut:
        cpu_seconds = len(self._program.suites) * self._program.suite_seconds + _OVERHEAD_SECONDS
        limits = Limits(
            wall_seconds=_PATIENCE * cpu_seconds,
            cpu_seconds=cpu_seconds,
            memory_bytes=self._program.memory_bytes,
            folder_bytes=_STORED_BYTES if self._stored else _FOLDER_BYTES,
            file_bytes=_STORED_BYTES if self._stored else _FOLDER_BYTES,
        )
        outcome = run_sandboxed(kind, [sys.executable, "-I", "answering.py"], folder=self._folder, limits=limits)
        if outcome.ended == "exited" and outcome.returncode == 0:
            return Cut()
        if outcome.ended not in ("exited", "signal"):
            return Cut(f"limit: {outcome.ended}", by_time=outcome.ended in OF_TIME)
        said = printable(outcome.stderr.strip().rpartition("\n")[2])
        how = f"exit code {outcome.returncode}" if outcome.ended == "exited" else f"signal {-(outcome.returncode or 0)}"
        if not self._started():
            raise OSError(f"the sandbox's own script ended with {how} before the program was started: {said}")
        return Cut(f"its sandbox's script was ended ({how})" + (f": {said}" if said else ""))

    def _started(self) -> bool:
        """Whether the script has removed the job's file, which the program, coming after, cannot bring back."""
        return os.fstat(self._job).st_nlink == 0


def copy_script(name: str, folder: Path) -> None:
    """Put a script that runs alone in a sandbox, and the format it speaks, into the sandbox's folder."""
    shutil.copyfile(Path(__file__).with_name(name), folder / name)
    shutil.copyfile(Path(plain_data.__file__), folder / "plain_data.py")
