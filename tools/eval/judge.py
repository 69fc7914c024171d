"""One sample comes in, evalplus's verdict on it goes out: per suite (base, plus) a status and the first failure.

Answers are made in the sandbox and judged here by evalplus's own ``unsafe_execute``, in a process of its own, so the
code under test and what decides about it never share memory. Expected answers are those of the canonical solution, made
in the sandbox as well and kept in a cache by the content of the task. Time limits count CPU time: a loaded machine
gives the verdicts of an idle one.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import platform
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import evalplus.eval
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS, MBPP_OUTPUT_SET_EQ_TASKS

from reflectron.engine.files import write_text
from reflectron.tools.eval.answers import AnswerPipes, DataUnpickler, Program, read_all
from reflectron.tools.eval.verdict import Verdict
from reflectron.tools.sandbox.process import SandboxKind, sandbox_folder

_SHOWN_CHARACTERS = 300
# A canonical solution may use this for a suite.
_TRUSTED_SUITE_SECONDS = 600
# evalplus gives an input four times what the canonical solution took, if that is more than the least (config.py).
_FACTOR = 4.0
# Longer than any comparison takes; a sample's own time is counted elsewhere.
_JUDGE_SECONDS = 600
_NO_ANSWER = "ended before it answered"
_UNCOUNTED = "evalplus 0.3.1 passes no answer to this task: its oracle skips the counting (eval/__init__.py)"


@dataclass(frozen=True, kw_only=True)
class JudgeLimits:
    """What the code of one sample may use."""

    input_seconds: float = 10.0
    """CPU time of one input, at least."""
    suite_seconds: int = 60
    """CPU time of a suite (evalplus: 60 s of the clock)."""
    memory_bytes: int = 4 * 2**30
    """As evalplus."""


@dataclass(frozen=True)
class Task:
    """A task of HumanEval+ or MBPP+ with its inputs as they are passed to the function."""

    dataset: Literal["humaneval", "mbpp"]
    task_id: str
    entry_point: str
    canonical: str
    """The whole program: prompt and solution."""
    atol: float
    inputs: tuple[list[Any], list[Any]]
    """Of base and plus; argument lists."""

    @property
    def key(self) -> str:
        """SHA-256 of all that determines its expected answers."""
        state = [self.entry_point, self.canonical, repr(self.inputs), platform.python_version()]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()


@dataclass(frozen=True)
class Expectation:
    """Where a task's expected answers are, a file a suite, and the CPU seconds that each took."""

    files: tuple[Path, Path]
    seconds: tuple[list[float], list[float]]


def cached_expectation(task: Task, cache: Path, kind: SandboxKind) -> Expectation:
    """Expected answers of a task, made now if the cache lacks them.

    Raises:
        ValueError: when the canonical solution fails.
    """
    files = (cache / f"{task.key}.base.pickle.gz", cache / f"{task.key}.plus.pickle.gz")
    times = cache / f"{task.key}.seconds.json"
    if not times.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Written last: where it is, the answers are whole.
        write_text(times, json.dumps(_make_expectation(task, files, kind)))
    base, plus = json.loads(times.read_text(encoding="utf-8"))
    return Expectation(files, (base, plus))


def _make_expectation(task: Task, files: tuple[Path, Path], kind: SandboxKind) -> list[list[float]]:
    allowed = [[float(_TRUSTED_SUITE_SECONDS)] * len(inputs) for inputs in task.inputs]
    program = _program(task, task.canonical, allowed, _TRUSTED_SUITE_SECONDS, JudgeLimits().memory_bytes)
    seconds: list[list[float]] = []
    with sandbox_folder() as folder:
        for path, inputs, messages in zip(
            files, task.inputs, read_all(AnswerPipes(program, folder), kind), strict=True
        ):
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            seconds.append([])
            with gzip.open(partial, "wb", compresslevel=1) as file:
                for outcome, took, answer in messages:
                    if outcome != "answer":
                        raise ValueError(f"the canonical solution of {task.task_id} ends with {outcome}: {answer}")
                    if task.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS:
                        answer = answer is not None
                    pickle.dump(answer, file, protocol=4)
                    seconds[-1].append(took)
            if len(seconds[-1]) != len(inputs):
                raise ValueError(f"the canonical solution of {task.task_id} stopped after {len(seconds[-1])} inputs")
            partial.replace(path)
    return seconds


def judge_sample(
    task: Task, code: str, expectation: Expectation, limits: JudgeLimits, kind: SandboxKind
) -> tuple[Verdict, Verdict]:
    """Run one sample on base and plus inputs; both verdicts, as evalplus gives them."""
    allowed = [[max(limits.input_seconds, _FACTOR * took) for took in taken] for taken in expectation.seconds]
    program = _program(task, code, allowed, limits.suite_seconds, limits.memory_bytes)
    with sandbox_folder() as folder, contextlib.ExitStack() as judges:
        pipes = AnswerPipes(program, folder)
        verdicts = [judges.enter_context(_forked_judge(task, suite, pipes, expectation)) for suite in range(2)]
        pipes.close()
        ended = pipes.run(kind)
        base, plus = (_verdict(verdict, ended) for verdict in verdicts)
        return base, plus


@contextlib.contextmanager
def _forked_judge(task: Task, suite: int, pipes: AnswerPipes, expectation: Expectation) -> Iterator[Connection]:
    """A process that reads the answers of a suite and sends its verdict; killed at the end."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_judge, args=(task, suite, pipes, expectation, theirs))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _verdict(sent: Connection, ended: str) -> Verdict:
    try:
        verdict: Verdict = sent.recv() if sent.poll(_JUDGE_SECONDS) else Verdict("timeout", got="not judged in time")
    except EOFError:
        return Verdict("fail", got="its answers could not be judged within the limit on memory")
    # Nobody was left to say why there was no further answer.
    unsaid = verdict.status == "fail" and verdict.got == _NO_ANSWER
    if unsaid and ended != "exited":
        return replace(verdict, status="timeout" if ended.endswith("_time") else "fail", got=f"limit: {ended}")
    return verdict


def _judge(task: Task, suite: int, pipes: AnswerPipes, expectation: Expectation, send: Connection) -> None:
    pipes.keep_only(suite)
    inputs = task.inputs[suite]
    with gzip.open(expectation.files[suite], "rb") as file:
        replay = _Replay(pipes.messages(suite), file)
        global _answer
        _answer = replay.answer
        progress, status = multiprocessing.Value("i", 0), multiprocessing.Value("i", -1)
        details: Any = multiprocessing.Array("b", len(inputs))
        evalplus.eval.unsafe_execute(
            task.dataset,
            task.entry_point,
            # All that this process executes in the place of the sample.
            f"from {__name__} import _answer as {task.entry_point}",
            inputs,
            replay,
            # The clock is not what limits an answer; the sandbox counts its CPU time.
            [_JUDGE_SECONDS] * len(inputs),
            task.atol,
            True,
            status,
            details,
            progress,
        )
    done = progress.value
    # The last lines of evalplus's untrusted_check.
    if status.value == evalplus.eval._SUCCESS and done == len(inputs) and all(details):
        send.send(Verdict(evalplus.eval.PASS))
    elif status.value == evalplus.eval._SUCCESS:
        send.send(Verdict(evalplus.eval.FAIL, got=_UNCOUNTED))
    else:
        failed = inputs[max(done - 1, 0)]
        send.send(Verdict(replay.status, _short(failed), _short(replay.expected), replay.got()))


def _answer(*arguments: object) -> object:
    """Replaced in a judge's process by the replay of its answers."""
    raise NotImplementedError


class _Replay:
    """Stands for both the function under test and the list of expected answers, each asked once an input, in order."""

    def __init__(self, messages: Iterator[tuple[str, float, Any]], expected: Any) -> None:
        self._messages, self._expected_file = messages, expected
        self.status: str = evalplus.eval.FAIL
        self.expected: Any = None
        self._got: Any = None
        self._error = ""

    def answer(self, *arguments: object) -> object:
        """What the sample answered to the next input.

        Raises:
            RuntimeError: when it raised, ended or ran out of time there.
        """
        try:
            outcome, _, content = next(self._messages, ("error", 0.0, _NO_ANSWER))
        except Exception as error:
            # What a pickle of nonsense can raise is not to be listed.
            outcome, content = "error", f"wrote no answer but what reads as {type(error).__name__}"
        if outcome == "answer":
            self._got = content
            return content
        self._error, self.expected = content, DataUnpickler(self._expected_file).load()
        if outcome == "timeout":
            self.status = evalplus.eval.TIMEOUT
        raise RuntimeError(content)

    def __getitem__(self, index: int) -> object:
        self.expected = DataUnpickler(self._expected_file).load()
        return self.expected

    def got(self) -> str:
        """The newest answer, or why there was none."""
        return self._error or _short(self._got)


def _short(value: object) -> str:
    brief = reprlib.Repr()
    brief.maxlist = brief.maxtuple = brief.maxset = brief.maxdict = 20
    brief.maxstring = brief.maxother = brief.maxlong = _SHOWN_CHARACTERS
    return brief.repr(value)[:_SHOWN_CHARACTERS]


def _program(
    task: Task, code: str, seconds: Sequence[Sequence[float]], suite_seconds: int, memory_bytes: int
) -> Program:
    return Program(
        code=code,
        entry_point=task.entry_point,
        suites=task.inputs,
        seconds=seconds,
        suite_seconds=suite_seconds,
        memory_bytes=memory_bytes,
        as_set=task.dataset == "mbpp" and task.entry_point in MBPP_OUTPUT_SET_EQ_TASKS,
    )
