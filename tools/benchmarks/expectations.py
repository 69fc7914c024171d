"""Expected answers of evalplus's tasks: what the canonical solutions answer, made in the sandbox, and kept.

They are kept by the content of the task, a file a suite: gzipped messages of plain data, first what all inputs have in
common, then for each input its arguments and the expected answer. Any program, a sample's or a canonical one, runs on
its inputs by ``AnswerPipes``, which looks at nothing that the program writes.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectron.engine.files import installed_version, one_line, printable, sha256_of, whole_file, write_text
from reflectron.tools.benchmarks.benchmark import OF_TIME, BenchmarkProblem
from reflectron.tools.sandbox import plain_data
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.plain_data import (
    FORMAT_VERSION,
    DataLimits,
    NotData,
    PlainDataError,
    encode,
    read_message,
    write_message,
)
from reflectron.tools.sandbox.process import run_sandboxed
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

# A canonical solution may use this for a suite.
_TRUSTED_SUITE_SECONDS = 600
_TRUSTED_MEMORY_BYTES = 4 << 30
_TRUSTED_LIMITS = DataLimits(message_bytes=1 << 30, nodes=1 << 27)
_CACHE_VERSION = 1


AnswerForm = Literal["whole", "set", "presence"]
"""What is wanted of an answer: itself, a set given as any iterable, or whether there is one."""


@dataclass(frozen=True, eq=False)
class Task:
    """A task with its inputs as they are passed to the function."""

    dataset: str
    """As evalplus calls it."""
    task_id: str
    entry_point: str
    canonical: str
    """The whole program: prompt and solution."""
    atol: float
    inputs: tuple[list[Any], list[Any]]
    """Argument lists of base and plus."""
    answer_form: AnswerForm = "whole"
    """In which a sample's answers are compared."""
    expected_form: AnswerForm = "whole"
    """In which the canonical solution's are kept."""

    @functools.cached_property
    def key(self) -> str:
        """Return the SHA-256 of all that determines its expected answers."""
        digest = hashlib.sha256()
        versions = [_CACHE_VERSION, FORMAT_VERSION, platform.python_version(), installed_version("numpy") or ""]
        state = [self.dataset, self.entry_point, self.canonical, self.atol, *versions]
        for part in (json.dumps(state).encode(), *encoded_inputs(self)):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


def make_task(
    dataset: str,
    problem: BenchmarkProblem,
    inputs: tuple[list[Any], list[Any]],
    answer_form: AnswerForm = "whole",
    expected_form: AnswerForm = "whole",
) -> Task:
    """Return what a published row says of a task, but for its inputs, which some datasets write in a form of theirs."""
    canonical, atol = problem.prompt + problem.record["canonical_solution"], problem.record["atol"]
    return Task(dataset, problem.task_id, problem.entry_point, canonical, atol, inputs, answer_form, expected_form)


def expectations_folder() -> Path:
    """Return where expected answers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reflectron" / "eval"


@dataclass(frozen=True)
class Expectation:
    """Where a task's expected answers are, a file a suite, and the CPU seconds that each took."""

    files: tuple[Path, Path]
    seconds: tuple[list[float], list[float]]


@functools.lru_cache(maxsize=32)
def encoded_inputs(task: Task) -> tuple[bytes, bytes]:
    """Return inputs of base and plus as plain data; samples of one task mostly come one after the other."""
    base, plus = (encode(inputs, _TRUSTED_LIMITS) for inputs in task.inputs)
    return base, plus


class Expectations:
    """Holds expected answers by task, for any thread; each is looked at once.

    Args:
        cache: the folder where they are kept.
    """

    def __init__(self, cache: Path, kind: SandboxKind) -> None:
        self._cache, self._kind = cache, kind
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._known: dict[str, Expectation] = {}

    def of(self, task: Task) -> Expectation:
        """Return expected answers of a task, made now if the cache lacks them or holds damaged ones.

        Raises:
            ValueError: when the canonical solution fails, or the cache cannot be written.
        """
        with self._lock:
            lock = self._locks.setdefault(task.key, threading.Lock())
        with lock:
            if task.key not in self._known:
                try:
                    self._known[task.key] = self._kept(task) or self._made(task)
                except OSError as error:
                    raise ValueError(f"expected answers cannot be kept in {self._cache}: {error}") from error
            return self._known[task.key]

    def _paths(self, task: Task) -> tuple[tuple[Path, Path], Path]:
        base, plus, times = (self._cache / f"{task.key}.{name}" for name in ("base.gz", "plus.gz", "json"))
        return (base, plus), times

    def _kept(self, task: Task) -> Expectation | None:
        files, times = self._paths(task)
        try:
            kept = json.loads(times.read_text(encoding="utf-8"))
            if kept["sha256"] == [sha256_of(path) for path in files]:
                base, plus = kept["seconds"]
                return Expectation(files, (base, plus))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _made(self, task: Task) -> Expectation:
        files, times = self._paths(task)
        self._cache.mkdir(parents=True, exist_ok=True)
        seconds = _make(task, files, self._kind)
        # Written last: where it is, the answers are whole.
        write_text(times, json.dumps({"seconds": seconds, "sha256": [sha256_of(path) for path in files]}))
        return Expectation(files, seconds)


def _make(task: Task, files: tuple[Path, Path], kind: SandboxKind) -> tuple[list[float], list[float]]:
    """Write a task's files; return the CPU seconds of its inputs."""
    program = ProgramWithInputs(
        code=task.canonical,
        entry_point=task.entry_point,
        suites=encoded_inputs(task),
        seconds=[[float(_TRUSTED_SUITE_SECONDS)] * len(inputs) for inputs in task.inputs],
        suite_seconds=_TRUSTED_SUITE_SECONDS,
        memory_bytes=_TRUSTED_MEMORY_BYTES,
        form=task.expected_form,
    )
    with sandbox_folder() as folder, AnswerPipes(program, folder, stored=True) as stored:
        cut = stored.run(kind)
        base, plus = (
            _write_suite(task, inputs, os.dup(answers), file, cut.words)
            for inputs, answers, file in zip(task.inputs, stored.answers, files, strict=True)
        )
    return base, plus


def _write_suite(task: Task, inputs: Sequence[Any], answers: int, path: Path, why: str) -> list[float]:
    common = {"dataset": task.dataset, "entry_point": task.entry_point, "atol": task.atol, "count": len(inputs)}
    seconds: list[float] = []
    with (
        open(answers, "rb") as stream,
        whole_file(path) as whole,
        gzip.open(whole, "wb", compresslevel=1) as file,
    ):
        write_message(file, common)  # type: ignore[arg-type]
        for arguments in inputs:
            took, answer = _expected(task, stream, len(seconds), why)
            seconds.append(took)
            write_message(file, (arguments, answer), _TRUSTED_LIMITS)  # type: ignore[arg-type]
    return seconds


def _expected(task: Task, stream: Any, number: int, why: str) -> tuple[float, Any]:
    try:
        outcome, took, answer = read_message(stream, _TRUSTED_LIMITS)
    except (EOFError, PlainDataError) as error:
        raise ValueError(
            f"the canonical solution of {task.task_id} stopped after {number} inputs: {why or error}"
        ) from None
    if outcome == "unsaid":
        # As in evalplus, no sample passes an input whose answer takes that much.
        return took, NotData(answer)
    if outcome != "answer":
        raise ValueError(f"the canonical solution of {task.task_id} ends with {outcome}: {printable(answer)}")
    return took, answer


_FOLDER_BYTES = 64 << 20
_STORED_BYTES = 4 << 30
# For the sandbox's own processes, the imports and the writing of answers, beside the time of the suites.
_OVERHEAD_SECONDS = 30
_PATIENCE = 5


@dataclass(frozen=True, kw_only=True)
class ProgramWithInputs:
    """A program to run: code, a function of it, and suites of inputs for it."""

    code: str
    entry_point: str
    suites: Sequence[bytes]
    """Lists of argument lists, encoded as plain data."""
    seconds: Sequence[Sequence[float]]
    """CPU time allowed to each input."""
    suite_seconds: int
    """CPU time allowed to a suite."""
    memory_bytes: int
    form: AnswerForm = "whole"


@dataclass(frozen=True)
class Cut:
    """The reason why a program ended before it should have; it has no words if the program did not."""

    words: str = ""
    by_time: bool = False
    """A limit on its time ended it."""


class AnswerPipes:
    """A program's answers, one pipe a suite, with the read ends open before the program starts.

    Args:
        folder: an empty folder, the program's writable one.
        stored: files instead of pipes, for a program that is trusted to write that much.
    """

    def __init__(self, program: ProgramWithInputs, folder: Path, *, stored: bool = False) -> None:
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
        """Run the program to its end; say why it ended before it should have, if it did.

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
        limits = SandboxLimits(
            wall_seconds=_PATIENCE * cpu_seconds,
            cpu_seconds=cpu_seconds,
            memory_bytes=self._program.memory_bytes,
            folder_bytes=_STORED_BYTES if self._stored else _FOLDER_BYTES,
            file_bytes=_STORED_BYTES if self._stored else _FOLDER_BYTES,
        )
        outcome = run_sandboxed(kind, [sys.executable, "-I", "answering.py"], folder=self._folder, limits=limits)
        if outcome.breach is not None:
            return Cut(f"limit: {outcome.breach}", by_time=outcome.breach in OF_TIME)
        if outcome.returncode == 0:
            return Cut()
        said = printable(outcome.stderr.strip().rpartition("\n")[2])
        how = f"exit code {outcome.returncode}" if outcome.ended == "exited" else f"signal {-(outcome.returncode or 0)}"
        if not self._started():
            raise OSError(f"the sandbox's own script ended with {how} before the program was started: {said}")
        return Cut(f"its sandbox's script was ended ({how})" + (f": {said}" if said else ""))

    def _started(self) -> bool:
        """Return whether the script has removed the job's file, which the program, coming after, cannot bring back."""
        return os.fstat(self._job).st_nlink == 0


def copy_script(name: str, folder: Path) -> None:
    """Put a script that runs alone in a sandbox, and the format it speaks, into the sandbox's folder."""
    shutil.copyfile(Path(__file__).with_name(name), folder / name)
    shutil.copyfile(Path(plain_data.__file__), folder / "plain_data.py")
