"""Problems of one's own, in the fields of OpenAI's HumanEval: models are asked as for that, tests are the file's.

Program and test run in two sandboxes and meet only through plain data: the test calls a function that hands its
arguments over and takes the answer back. So the program sees neither the test nor a word that means success, and the
test never loads what the program is made of.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import assert_never

from reflectron.engine.files import printable
from reflectron.tools.benchmarks.benchmark import (
    Benchmark,
    BenchmarkProblem,
    JudgeSettings,
    Row,
    SampleJudge,
    SuiteVerdict,
    limit_verdict,
)
from reflectron.tools.benchmarks.candidate_process import (
    JOB_FILE,
    JOB_LIMITS,
    REPORT_MARK,
    ProgramJob,
    TestJob,
    TestReport,
    TestsJob,
)
from reflectron.tools.benchmarks.humaneval import NEXT_DEFINITION, ask_for_function, function_problem, function_solution
from reflectron.tools.benchmarks.judging import in_threads, tracked
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.plain_data import write_message
from reflectron.tools.sandbox.process import SandboxDialogue, Speaker, hold_dialogue, run_sandboxed, staged
from reflectron.tools.sandbox.sandboxed import SandboxOutcome
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

# Seconds of the clock for each second of CPU time, which is what counts: a loaded machine passes what an idle one does.
_PATIENCE = 5
# For two interpreters to start, beside what the program and the test take.
_START_SECONDS = 1
_TEST_SECONDS = 60
_PROBED_AT_ONCE = 64
MEMORY_BYTES = 4 << 30
"""What a program may use, and its test as well, address space included."""
# A test calls its function about that often.
_CALLS_FACTOR = 10
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
_SHOWN_CHARACTERS = 200


def judge_function(problem: BenchmarkProblem, code: str, cpu_seconds: float, kind: SandboxKind) -> SuiteVerdict:
    """Run a problem's test on one sample, which may use ``cpu_seconds`` for all calls together."""
    program_seconds = math.ceil(cpu_seconds) + _START_SECONDS
    patience = float(_PATIENCE * program_seconds)
    with sandbox_folder() as test_folder, sandbox_folder() as program_folder:
        test_limits = _limits(_TEST_SECONDS, _PATIENCE * _TEST_SECONDS + patience)
        asking = Speaker(
            _staged_tests([problem], test_folder, patience, probe=False), test_folder, test_limits, _ENVIRONMENT
        )
        argv = staged(program_folder, "benchmarks.candidate_process", "sandbox.plain_data")
        _write_job(program_folder, ProgramJob(code=code, entry_point=problem.entry_point))
        answering = Speaker(argv, program_folder, _limits(program_seconds, math.inf), _ENVIRONMENT)
        return _verdict(hold_dialogue(kind, asking, answering))


@dataclass(frozen=True, order=True)
class Mistake:
    """A mistake in a problem's test."""

    task_id: str
    reason: str
    passes_all: bool = False
    """Whether all programs pass it; otherwise none does."""


def check_tests(problems: Sequence[BenchmarkProblem], kind: SandboxKind, workers: int) -> None:
    """Run every test up to its first call, so that one that can pass nobody is found before the first sample.

    One that passes everybody is named on stderr.

    Raises:
        ValueError: naming the problem and what is wrong with its test.
    """
    batches = [problems[start : start + _PROBED_AT_ONCE] for start in range(0, len(problems), _PROBED_AT_ONCE)]
    with contextlib.closing(in_threads(lambda batch: mistakes_in_tests(batch, kind), batches, workers)) as results:
        found = sorted(itertools.chain.from_iterable(tracked(results, len(batches), "looking at tests")))
    passing = [mistake for mistake in found if mistake.passes_all]
    failing = [mistake for mistake in found if not mistake.passes_all]
    if passing:
        print(f"every program passes problem {_named(passing)}", file=sys.stderr)
    if failing:
        raise ValueError(f"no program can pass problem {_named(failing)}")


def _named(mistakes: Sequence[Mistake]) -> str:
    """Name the first, and how many more there are."""
    first, more = mistakes[0], len(mistakes) - 1
    and_more = f" (and {more} more have such tests)" if more else ""
    return f"{printable(first.task_id)}{and_more}: {printable(first.reason)}"


def mistakes_in_tests(problems: Sequence[BenchmarkProblem], kind: SandboxKind) -> list[Mistake]:
    """Return what is wrong with tests that can pass no program, or fail none."""
    seconds = _TEST_SECONDS * len(problems)
    with sandbox_folder() as folder:
        argv = _staged_tests(problems, folder, 0.0, probe=True)
        limits = _limits(seconds, _PATIENCE * seconds)
        outcome = run_sandboxed(kind, argv, folder=folder, limits=limits, environment=_ENVIRONMENT)
    reports: dict[int, TestReport] = {}
    for report in _reports(outcome):
        # The first: a test may call its candidate from a process of its own, and end there and here.
        reports.setdefault(report["number"], report)
    mistakes: list[Mistake] = []
    for number, problem in enumerate(problems):
        if number not in reports:
            return [*mistakes, Mistake(problem.task_id, f"its test cannot be tried: {_ended(outcome).got}")]
        if mistake := _mistake(problem, reports[number]):
            mistakes.append(mistake)
    return mistakes


def _mistake(problem: BenchmarkProblem, report: TestReport) -> Mistake | None:
    """Return what is wrong with a test; nothing where it comes to call its candidate."""
    task, name, ended = problem.task_id, problem.entry_point, report["ended"]
    if ended == "called":
        return None
    elif ended == "pass":
        return Mistake(task, f"its test never calls {name}", passes_all=True)
    elif ended == "impossible":
        return Mistake(task, report["got"])
    elif ended == "fail" or ended == "timeout" or ended == "silent":
        line = f" at `{report['expected']}`" if report["expected"] else ""
        return Mistake(task, f"its test fails before it calls {name}: {report['got']}{line}")
    else:
        assert_never(ended)


def _staged_tests(problems: Sequence[BenchmarkProblem], folder: Path, patience: float, *, probe: bool) -> list[str]:
    argv = staged(folder, "benchmarks.check_process", "benchmarks.candidate_process", "sandbox.plain_data")
    tests = [TestJob(prompt=p.prompt, test=p.record["test"], entry_point=p.entry_point) for p in problems]
    _write_job(folder, TestsJob(tests=tests, patience=patience, probe=probe))
    return argv


def _write_job(folder: Path, job: ProgramJob | TestsJob) -> None:
    with (folder / JOB_FILE).open("wb") as file:
        write_message(file, dict(job), JOB_LIMITS)


def _limits(cpu_seconds: int, wall_seconds: float) -> SandboxLimits:
    return SandboxLimits(wall_seconds=wall_seconds, cpu_seconds=cpu_seconds, memory_bytes=MEMORY_BYTES, processes=256)


def _reports(outcome: SandboxOutcome) -> list[TestReport]:
    """Return what the test's process said; it is our own, and so is what it says."""
    if outcome.ended != "exited":
        return []
    return [json.loads(report) for report in outcome.stderr.split(REPORT_MARK)[1:]]


def _verdict(dialogue: SandboxDialogue) -> SuiteVerdict:
    reports = _reports(dialogue.asking)
    if not reports:
        why = _ended(dialogue.asking)
        return SuiteVerdict(why.status, got=f"the test came to no result: {why.got}")
    # A test may use processes of its own, each of which reports.
    report = next((report for report in reports if report["ended"] != "pass"), reports[-1])
    ended, arguments = report["ended"], report["input"]
    if ended == "silent":
        why = _ended(dialogue.answering)
        return SuiteVerdict(why.status, arguments, got=f"the program ended before its check did: {why.got}")
    elif ended == "pass":
        return SuiteVerdict("pass")
    elif ended == "timeout":
        return SuiteVerdict("timeout", arguments, report["expected"], report["got"])
    elif ended == "fail" or ended == "impossible" or ended == "called":
        return SuiteVerdict("fail", arguments, report["expected"], report["got"])
    else:
        assert_never(ended)


def _ended(outcome: SandboxOutcome) -> SuiteVerdict:
    """Return how a process ended that should have continued."""
    if outcome.breach is not None:
        return limit_verdict(outcome.breach)
    if outcome.ended == "signal":
        return SuiteVerdict("fail", got="a signal")
    return SuiteVerdict("fail", got=outcome.stderr.strip()[-_SHOWN_CHARACTERS:] or f"exit code {outcome.returncode}")


def _problem(row: Row) -> BenchmarkProblem:
    for name in OWN.fields:
        if not isinstance(row[name], str):
            raise ValueError(f"has {name!r} of type {type(row[name]).__name__}, expected text")
    if not row["entry_point"].isidentifier():
        raise ValueError(f"has entry_point {row['entry_point']!r}, expected a function's name")
    if "def check(" not in row["test"]:
        raise ValueError("has a 'test' without `def check(candidate)`, which every sample would fail")
    return function_problem(row)


@contextlib.contextmanager
def _judge(problems: Sequence[BenchmarkProblem], settings: JudgeSettings) -> Iterator[SampleJudge]:
    check_tests(problems, settings.kind, settings.workers)
    seconds = _CALLS_FACTOR * settings.limits.input_seconds
    yield lambda problem, code: (judge_function(problem, code, seconds, settings.kind),)


OWN = Benchmark(
    name="functions",
    title="your own problems",
    fields=("task_id", "prompt", "entry_point", "test"),
    problem=_problem,
    ask=ask_for_function,
    next_statement=NEXT_DEFINITION,
    solution=function_solution,
    judge=_judge,
)
