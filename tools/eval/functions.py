"""Problems of one's own: a program and the test of a function come in, a verdict goes out.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.text import printable
from reflectron.tools.eval.check_messages import JOB_FILE, JOB_LIMITS, REPORT_MARK, Program, Report, Test, Tests
from reflectron.tools.eval.judging import in_threads, tracked
from reflectron.tools.eval.problems import Problem
from reflectron.tools.eval.verdict import Verdict, limit_verdict
from reflectron.tools.sandbox.dialogue import Dialogue, Speaker, hold_dialogue
from reflectron.tools.sandbox.plain_data import write_message
from reflectron.tools.sandbox.process import Limits, Outcome, SandboxKind, run_sandboxed, sandbox_folder
from reflectron.tools.sandbox.staging import staged

# Of the clock; what counts is the CPU time, so that a loaded machine passes what an idle one passes.
_PATIENCE = 5
# For two interpreters to start, beside what the program and the test take.
_START_SECONDS = 1
_TEST_SECONDS = 60
_PROBED_AT_ONCE = 64
MEMORY_BYTES = 4 << 30
"""What a program may use, and its test as well, address space included."""
_NEEDED = ("eval.check_messages", "sandbox.plain_data")
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
_SHOWN_CHARACTERS = 200


def judge_function(problem: Problem, code: str, cpu_seconds: float, kind: SandboxKind) -> Verdict:
    """Run a problem's test on one sample, which may use ``cpu_seconds`` for all calls together."""
    program_seconds = math.ceil(cpu_seconds) + _START_SECONDS
    patience = float(_PATIENCE * program_seconds)
    with sandbox_folder() as test_folder, sandbox_folder() as program_folder:
        test_limits = _limits(_TEST_SECONDS, _PATIENCE * _TEST_SECONDS + patience)
        asking = Speaker(
            _staged_tests([problem], test_folder, patience, probe=False), test_folder, test_limits, _ENVIRONMENT
        )
        argv = staged(program_folder, "eval.candidate_process", *_NEEDED)
        _write_job(program_folder, Program(code=code, entry_point=problem.entry_point))
        answering = Speaker(argv, program_folder, _limits(program_seconds, math.inf), _ENVIRONMENT)
        return _verdict(hold_dialogue(kind, asking, answering))


@dataclass(frozen=True, order=True)
class Mistake:
    """What is wrong with a problem's test."""

    task_id: str
    reason: str
    passes_all: bool = False
    """Whether all programs pass it; otherwise none does."""


def check_tests(problems: Sequence[Problem], kind: SandboxKind, workers: int) -> None:
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
    """The first, and how many more there are."""
    first, more = mistakes[0], len(mistakes) - 1
    and_more = f" (and {more} more have such tests)" if more else ""
    return f"{printable(first.task_id)}{and_more}: {printable(first.reason)}"


def mistakes_in_tests(problems: Sequence[Problem], kind: SandboxKind) -> list[Mistake]:
    """What is wrong with tests that can pass no program, or fail none."""
    seconds = _TEST_SECONDS * len(problems)
    with sandbox_folder() as folder:
        argv = _staged_tests(problems, folder, 0.0, probe=True)
        limits = _limits(seconds, _PATIENCE * seconds)
        outcome = run_sandboxed(kind, argv, folder=folder, limits=limits, environment=_ENVIRONMENT)
    reports: dict[int, Report] = {}
    for report in _reports(outcome):
        # The first: a test may call its candidate from a process of its own, and end there and here.
        reports.setdefault(report["number"], report)
    mistakes: list[Mistake] = []
    for number, problem in enumerate(problems):
        if number not in reports:
            return [*mistakes, Mistake(problem.task_id, f"its test cannot be tried: {_ended(outcome).got}")]
        if reports[number]["ended"] == "pass":
            mistakes.append(Mistake(problem.task_id, f"its test never calls {problem.entry_point}", passes_all=True))
        elif reason := _mistake(problem.entry_point, reports[number]):
            mistakes.append(Mistake(problem.task_id, reason))
    return mistakes


def _mistake(name: str, report: Report) -> str:
    """Why no program can pass a test; empty for one that comes to call its candidate."""
    if report["ended"] == "called":
        return ""
    if report["ended"] == "impossible":
        return report["got"]
    line = f" at `{report['expected']}`" if report["expected"] else ""
    return f"its test fails before it calls {name}: {report['got']}{line}"


def _staged_tests(problems: Sequence[Problem], folder: Path, patience: float, *, probe: bool) -> list[str]:
    argv = staged(folder, "eval.check_process", *_NEEDED)
    tests = [Test(prompt=p.prompt, test=p.record["test"], entry_point=p.entry_point) for p in problems]
    _write_job(folder, Tests(tests=tests, patience=patience, probe=probe))
    return argv


def _write_job(folder: Path, job: Program | Tests) -> None:
    with (folder / JOB_FILE).open("wb") as file:
        write_message(file, dict(job), JOB_LIMITS)


def _limits(cpu_seconds: int, wall_seconds: float) -> Limits:
    return Limits(wall_seconds=wall_seconds, cpu_seconds=cpu_seconds, memory_bytes=MEMORY_BYTES, processes=256)


def _reports(outcome: Outcome) -> list[Report]:
    """What the test's process said; it is our own, and so is what it says."""
    if outcome.ended != "exited":
        return []
    return [json.loads(report) for report in outcome.stderr.split(REPORT_MARK)[1:]]


def _verdict(dialogue: Dialogue) -> Verdict:
    reports = _reports(dialogue.asking)
    if not reports:
        why = _ended(dialogue.asking)
        return Verdict(why.status, got=f"the test came to no result: {why.got}")
    # A test may use processes of its own, each of which reports.
    report = next((report for report in reports if report["ended"] != "pass"), reports[-1])
    ended, arguments = report["ended"], report["input"]
    if ended == "silent":
        why = _ended(dialogue.answering)
        return Verdict(why.status, arguments, got=f"the program ended before its check did: {why.got}")
    if ended == "pass":
        return Verdict("pass")
    return Verdict("timeout" if ended == "timeout" else "fail", arguments, report["expected"], report["got"])


def _ended(outcome: Outcome) -> Verdict:
    """How a process ended that should have gone on."""
    if outcome.ended == "signal":
        return Verdict("fail", got="a signal")
    if outcome.ended != "exited":
        return limit_verdict(outcome.ended)
    return Verdict("fail", got=outcome.stderr.strip()[-_SHOWN_CHARACTERS:] or f"exit code {outcome.returncode}")
