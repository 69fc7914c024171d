"""Judges samples of HumanEval+ and MBPP+: per suite (base, plus) evalplus's verdict and the first failure.

Answers are made in one sandbox and compared in another, by evalplus's own ``unsafe_execute``; between them and to here
cross plain data and a line of JSON, so that neither the code under test nor what it wrote ever shares memory with what
decides about it. Expected answers are those of the canonical solution, made in the sandbox as well and kept in a cache
by the content of the task. Time limits count CPU time: a loaded machine gives the verdicts of an idle one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reflectron.tools.eval.answers import AnswerPipes, Program
from reflectron.tools.eval.comparer import Comparer, Comparison
from reflectron.tools.eval.expectations import Expectations, Task, encoded_inputs
from reflectron.tools.eval.verdict import LONGER_SECONDS, Verdict
from reflectron.tools.sandbox.process import SandboxKind, sandbox_folder

# evalplus gives an input four times what the canonical solution took, if that is more than the least (config.py).
_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class JudgeLimits:
    """What the code of one sample may use."""

    input_seconds: float = 1.0
    """CPU time of one input, at least (evalplus: 1 s of the clock)."""
    suite_seconds: int = 60
    """CPU time of a suite (evalplus: 60 s of the clock)."""
    memory_bytes: int = 4 * 2**30
    """As evalplus."""
    comparing_seconds: int = 20
    """CPU time of comparing the answers of a suite, by a process of ours."""


class Judge:
    """Judges samples, also from several threads at once; leaving its context ends its processes.

    Args:
        cache: folder of expected answers.
    """

    def __init__(self, limits: JudgeLimits, kind: SandboxKind, cache: Path) -> None:
        self._limits, self._kind = limits, kind
        self._expectations = Expectations(cache, kind)
        self._lock = threading.Lock()
        self._idle: list[Comparer] = []

    def __enter__(self) -> Judge:
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

    def judge(self, task: Task, code: str) -> tuple[Verdict, Verdict]:
        """Run one sample on base and plus inputs; both verdicts, as evalplus gives them.

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

    def _run(self, task: Task, code: str, suites: Sequence[int], limits: JudgeLimits) -> list[Comparison]:
        """Outcomes of some suites."""
        outcomes = self._run_once(task, code, suites, limits)
        if all(outcome.finished for outcome in outcomes):
            return outcomes
        # Where the sample is to blame for that, it is so again.
        return self._run_once(task, code, suites, limits)

    def _run_once(self, task: Task, code: str, suites: Sequence[int], limits: JudgeLimits) -> list[Comparison]:
        known = self._expectations.of(task)
        program = Program(
            code=code,
            entry_point=task.entry_point,
            suites=[encoded_inputs(task)[suite] for suite in suites],
            seconds=[[max(limits.input_seconds, _FACTOR * took) for took in known.seconds[suite]] for suite in suites],
            suite_seconds=limits.suite_seconds,
            memory_bytes=limits.memory_bytes,
            form="set" if task.as_set else "whole",
        )
        with self._comparer() as comparer, sandbox_folder() as folder, AnswerPipes(program, folder) as pipes:
            begun = [
                comparer.compare(answers, pipes.ended, known.files[suite])
                for answers, suite in zip(pipes.answers, suites, strict=True)
            ]
            pipes.stop_reading()
            cut = pipes.run(self._kind)
            return [comparison.read(cut) for comparison in begun]

    @contextlib.contextmanager
    def _comparer(self) -> Iterator[Comparer]:
        """A comparer for one sample; it serves again unless something about it was odd."""
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


def _with_longer(comparison: Comparison, again: Comparison) -> Comparison:
    return replace(comparison, verdict=replace(comparison.verdict, longer=again.verdict.status))
