"""Judges samples as evalplus does: per suite (base, plus) its verdict and the first failure.

Answers are made in one sandbox and compared in another, by evalplus's own ``unsafe_execute``; between them and to here
cross plain data and a line of JSON, so that neither the code under test nor what it wrote ever shares memory with what
decides about it. Expected answers are those of the canonical solution, made in the sandbox as well and kept in a cache
by the content of the task. Time limits count CPU time: a loaded machine gives the verdicts of an idle one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reflectron.tools.benchmarks.benchmark import LONGER_SECONDS, JudgeLimits, JudgeSettings, SampleJudge, SuiteVerdict
from reflectron.tools.benchmarks.expectations import (
    AnswerPipes,
    Cut,
    Expectations,
    ProgramWithInputs,
    Task,
    copy_script,
    encoded_inputs,
    expectations_folder,
)
from reflectron.tools.benchmarks.judging import in_threads, tracked
from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.sandboxed import Sandboxed
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

# evalplus gives an input four times what the canonical solution took, if that is more than the least (config.py).
_FACTOR = 4.0


@contextlib.contextmanager
def judged_by_evalplus(tasks: Sequence[Task], settings: JudgeSettings) -> Iterator[SampleJudge]:
    """Make what all samples of ``tasks`` need, and judge while the context lasts."""
    by_id = {task.task_id: task for task in tasks}
    with EvalplusJudge(settings.limits, settings.kind, expectations_folder()) as judge:
        # Before any sample, or the samples of one task would all wait for them.
        with contextlib.closing(in_threads(judge.prepare, tasks, settings.workers)) as made:
            for _ in tracked(made, len(tasks), "expected answers"):
                pass
        yield lambda problem, code: judge.judge(by_id[problem.task_id], code)


class EvalplusJudge:
    """Judges samples, also from several threads at once; leaving its context ends its processes.

    Args:
        cache: folder of expected answers.
    """

    def __init__(self, limits: JudgeLimits, kind: SandboxKind, cache: Path) -> None:
        self._limits, self._kind = limits, kind
        self._expectations = Expectations(cache, kind)
        self._lock = threading.Lock()
        self._idle: list[Comparer] = []

    def __enter__(self) -> EvalplusJudge:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().close()

    def prepare(self, task: Task) -> None:
        """Make the expected answers of a task, if the cache lacks them.

        Raises:
            ValueError: when the canonical solution fails.
        """
        self._expectations.of(task)

    def judge(self, task: Task, code: str) -> tuple[SuiteVerdict, SuiteVerdict]:
        """Run one sample on base and plus inputs; return both verdicts, as evalplus gives them.

        Where the limit of CPU time decided, they also say what ten seconds would have.

        Raises:
            OSError: when no sandbox can be made.
            ValueError: when the canonical solution fails.
        """
        base, plus = self._run(task, code, (0, 1), self._limits)
        if self._limits.input_seconds < LONGER_SECONDS:
            longer = replace(self._limits, input_seconds=LONGER_SECONDS)
            if base.at_limit:
                base = _with_longer(base, *self._run(task, code, (0,), longer))
            if plus.at_limit and "pass" in (base.verdict.status, base.verdict.longer):
                plus = _with_longer(plus, *self._run(task, code, (1,), longer))
        return base.verdict, plus.verdict

    def _run(self, task: Task, code: str, suites: Sequence[int], limits: JudgeLimits) -> list[SuiteComparison]:
        """Return the outcomes of some suites."""
        outcomes = self._run_once(task, code, suites, limits)
        if all(outcome.finished for outcome in outcomes):
            return outcomes
        # Where the sample is to blame for that, it is so again.
        return self._run_once(task, code, suites, limits)

    def _run_once(self, task: Task, code: str, suites: Sequence[int], limits: JudgeLimits) -> list[SuiteComparison]:
        known = self._expectations.of(task)
        program = ProgramWithInputs(
            code=code,
            entry_point=task.entry_point,
            suites=[encoded_inputs(task)[suite] for suite in suites],
            seconds=[[max(limits.input_seconds, _FACTOR * took) for took in known.seconds[suite]] for suite in suites],
            suite_seconds=limits.suite_seconds,
            memory_bytes=limits.memory_bytes,
            form=task.answer_form,
        )
        with self._comparer() as comparer, sandbox_folder() as folder, AnswerPipes(program, folder) as pipes:
            begun = [
                comparer.compare(answers, pipes.ended, known.files[suite])
                for answers, suite in zip(pipes.answers, suites, strict=True)
            ]
            pipes.stop_reading()
            cut = pipes.run(self._kind)
            return [comparer.read(comparison, cut) for comparison in begun]

    @contextlib.contextmanager
    def _comparer(self) -> Iterator[Comparer]:
        """Lend a comparer to one sample; it serves again unless something about it was odd."""
        with self._lock:
            comparer = self._idle.pop() if self._idle else None
        if comparer is None or not comparer.fit():
            if comparer is not None:
                comparer.close()
            comparer = Comparer(self._kind, self._limits.comparing_seconds, self._limits.memory_bytes)
        try:
            yield comparer
        except BaseException:
            comparer.close()
            raise
        if comparer.fit():
            with self._lock:
                self._idle.append(comparer)
        else:
            comparer.close()


def _with_longer(comparison: SuiteComparison, again: SuiteComparison) -> SuiteComparison:
    return replace(comparison, verdict=replace(comparison.verdict, longer=again.verdict.status))


# Seconds of the clock: the imports on a loaded machine.
_START_SECONDS = 120
# Seconds of the clock for each second of CPU time.
_PATIENCE = 10
_FILE_BYTES = 1 << 20
_LINE_BYTES = 1 << 14
_FIELDS = ("status", "input", "expected", "got")
# Its own words beside evalplus's: the program ended without an answer; a limit that is not the input's own.
_STATUSES = ("pass", "fail", "timeout", "silent", "clock")
_UNCOMPARED = SuiteVerdict("fail", got="what compared its answers ended without a verdict")


@dataclass(frozen=True)
class SuiteComparison:
    """The outcome of one suite."""

    verdict: SuiteVerdict
    at_limit: bool
    """Whether the limit of CPU time on one input decided."""
    finished: bool = True
    """Whether the comparison came to its end."""


class Comparer:
    """A process that compares answers with the expected ones, in a sandbox of its own, one sample at a time.

    It has handled what samples wrote: it has no rights, no network and a limit of CPU time, and no more comes back than
    a line of JSON whose form is checked.

    Args:
        seconds: CPU time that comparing a suite may take, at most 255.

    Raises:
        OSError: when it does not start.
    """

    def __init__(self, kind: SandboxKind, seconds: int, memory_bytes: int) -> None:
        self._seconds = seconds
        self._open: set[int] = set()
        self._healthy = True
        limits = SandboxLimits(
            cpu_seconds=4 * seconds + _START_SECONDS,
            memory_bytes=memory_bytes,
            file_bytes=_FILE_BYTES,
            folder_bytes=_FILE_BYTES,
        )
        with contextlib.ExitStack() as on_error:
            folder = on_error.enter_context(sandbox_folder())
            copy_script("comparing.py", folder)
            self._socket, theirs = socket.socketpair()
            on_error.callback(self._socket.close)
            with theirs:
                self._sandbox = on_error.enter_context(
                    Sandboxed(
                        kind,
                        [sys.executable, "-I", "comparing.py"],
                        writable={wall.FOLDER: folder},
                        limits=limits,
                        environment={},
                        stdin=theirs.fileno(),
                    )
                )
            self._socket.settimeout(_START_SECONDS)
            if self._socket.recv(1) != b".":
                _, stderr = self._sandbox.communicate(time.monotonic() + 1)
                raise OSError(f"the judge's own sandbox did not start: {stderr.strip()[-300:]}")
            self._resources = on_error.pop_all()

    def fit(self) -> bool:
        """Return whether nothing about it has been odd so far."""
        return self._healthy and not self._sandbox.process.ended()

    def close(self) -> None:
        """Kill it."""
        self._resources.close()
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def compare(self, answers: int, ended: int, expected: Path) -> int:
        """Begin to compare answers as they come; return what ``read`` takes.

        Args:
            answers: this descriptor and the next may be closed afterwards.
            ended: of a pipe that ends when no further answer can come.

        Raises:
            OSError: when the process has ended, before it has read any answer.
        """
        read, write = os.pipe()
        self._open.add(read)
        file = os.open(expected, os.O_RDONLY | os.O_CLOEXEC)
        self._sandbox.process.renew_cpu_time()
        try:
            socket.send_fds(self._socket, [bytes([self._seconds])], [answers, ended, file, write])
            if not self._socket.recv(1):
                raise OSError(
                    f"the judge's own sandbox has ended: {self._sandbox.process.breach or 'nobody knows why'}"
                )
        finally:
            os.close(file)
            os.close(write)
        return read

    def read(self, descriptor: int, cut: Cut) -> SuiteComparison:
        """Wait for the outcome of a comparison, once the program has ended.

        Args:
            cut: why the program ended before it should have, if it did.
        """
        line = _read_line(descriptor, time.monotonic() + _PATIENCE * self._seconds)
        self._open.remove(descriptor)
        os.close(descriptor)
        said = _checked(line)
        if said is None:
            self._healthy = False
            return SuiteComparison(_UNCOMPARED, at_limit=False, finished=False)
        status = said.pop("status")
        if status == "silent":
            # Nobody was left to say why there was no further answer.
            status, said["got"] = "clock" if cut.by_time else "fail", cut.words or said["got"]
        return SuiteComparison(
            SuiteVerdict("timeout" if status == "clock" else status, **said), at_limit=status == "timeout"
        )


def _read_line(descriptor: int, deadline: float) -> bytes:
    """Return a line, or less of it when the writer ends, says too much or takes too long."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        data = os.read(descriptor, _LINE_BYTES)
        if not data:
            break
        line += data
    return line


def _checked(line: bytes) -> dict[str, str] | None:
    """Return the fields of a verdict, None if the line is none."""
    if len(line) > _LINE_BYTES or not line.endswith(b"\n"):
        return None
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or sorted(said) != sorted(_FIELDS):
        return None
    return said if all(isinstance(text, str) for text in said.values()) and said["status"] in _STATUSES else None
