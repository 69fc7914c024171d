"""``reflectron eval score``: completions in, pass@k out; of HumanEval+ and MBPP+ as evalplus 0.3.1 counts it.

Nothing is downloaded. Verdicts are kept as they are made, by all that determines them, and so are expected answers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from typing_extensions import assert_never

from reflectron.engine.files import is_stream, write_text
from reflectron.tools.eval.functions import check_tests, judge_function
from reflectron.tools.eval.judging import affordable_workers, in_threads, judge_samples, says_how_to_resume, tracked
from reflectron.tools.eval.problems import (
    Dataset,
    Problem,
    ProblemFile,
    add_problem_arguments,
    find_problems,
    load_problems,
)
from reflectron.tools.eval.programs import judge_program, shares_by_group, with_toolchain
from reflectron.tools.eval.samples import Sample, read_samples
from reflectron.tools.eval.verdict import LONGER_SECONDS, SUITES, Verdict, Verdicts
from reflectron.tools.eval.verdict_file import VerdictFile, verdict_keys
from reflectron.tools.sandbox.process import SandboxKind, add_sandbox_arguments, choose_sandbox

if TYPE_CHECKING:
    from reflectron.tools.eval.expectations import Task
    from reflectron.tools.eval.judge import Judge, JudgeLimits

_PASS_AT = (1, 10, 100)
_SHOWN_FAILURES = 10
# A test of one's own calls its function about that often.
_CALLS_FACTOR = 10


class Score(TypedDict):
    """What ``--json`` writes; shares are 0 to 1."""

    dataset: str
    n_tasks: int
    n_samples: int
    pass_at_1: dict[str, float]
    """By suite; ``plus`` counts samples that pass base and plus, as evalplus does."""
    pass_at_k: dict[str, dict[str, float]]
    """By k, as far as every task has k samples: the unbiased estimator of the Codex paper (arXiv 2107.03374)."""
    n_passed: dict[str, int]
    """Samples."""
    passed: dict[str, dict[str, int]]
    """Samples of each task, by suite."""
    failed: list[dict[str, Any]]
    """Every sample that does not pass plus, with its first failing input."""
    at_limit: list[dict[str, Any]]
    """Samples whose verdict hangs on the limit of CPU time: status by suite, and as it is with ten seconds an input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("completions", metavar="FILE", help="JSONL: task_id and solution, or completion of the prompt")
    add_problem_arguments(parser)
    parser.add_argument("--partial", action="store_true", help="score the tasks that the file has, and no others")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    add_scoring_arguments(parser)


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``eval score`` and ``eval run`` have in common."""
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="samples at once; 0: cores and memory say")
    parser.add_argument(
        "--min-time-limit", type=float, default=1.0, metavar="S", help="CPU seconds an input has at least (1)"
    )
    parser.add_argument("--javatuples", metavar="JAR", help="javatuples-1.2.jar, for MultiPL-E's Java problems")
    add_sandbox_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Score and print; returns 0 whatever the score is."""
    kind, limits = choose_sandbox(args.sandbox, args.i_understand), scoring_limits(args)
    file = find_problems(args.dataset, args.data)
    problems = load_problems(file.dataset, file.path)
    samples = read_samples(Path(args.completions), problems, partial=args.partial)
    result = score_samples(args, file, problems, samples, limits, kind, _verdicts_of(args))
    print(describe(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=2) + "\n")
    return 0


def _verdicts_of(args: argparse.Namespace) -> Path:
    """Where verdicts are kept: beside the result, else beside the completions where that folder can be written."""
    result = args.json if args.json and not is_stream(Path(args.json)) else None
    beside = Path(result or args.completions.removesuffix(".gz")).with_suffix(".verdicts.jsonl")
    if result or os.access(beside.parent, os.W_OK):
        return beside
    name = hashlib.sha256(os.fsencode(Path(args.completions).resolve())).hexdigest()
    return expectations_folder() / f"{name}.verdicts.jsonl"


def scoring_limits(args: argparse.Namespace) -> JudgeLimits:
    """Limits of one sample from the command line.

    Raises:
        ValueError: when the time limit is below evalplus's own second.
    """
    try:
        from reflectron.tools.eval.judge import JudgeLimits
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install 'reflectron[eval]'") from None
    if args.min_time_limit < 1:
        raise ValueError(f"--min-time-limit is {args.min_time_limit}, expected at least 1 second")
    return JudgeLimits(input_seconds=args.min_time_limit)


def score_samples(
    args: argparse.Namespace,
    file: ProblemFile,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    limits: JudgeLimits,
    kind: SandboxKind,
    verdicts: Path,
) -> Score:
    """Judge every sample as its dataset asks for; ``args`` are those of ``add_scoring_arguments``.

    Args:
        verdicts: the file that keeps them; those that are there already are not made again.

    Raises:
        ValueError: when no toolchain for the samples is installed, or a problem's own test cannot work.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    workers = affordable_workers(args.workers, limits.memory_bytes)
    java_classes = Path(args.javatuples) if args.javatuples else None
    if java_classes is not None and not java_classes.is_file():
        raise ValueError(f"{java_classes} is not a file (--javatuples)")
    if file.dataset == "multipl-e":
        samples = with_toolchain(problems, samples)
    suites = len(SUITES) if file.dataset in ("humaneval", "mbpp") else 1
    with VerdictFile(verdicts, suites) as kept:
        keys = verdict_keys(file.dataset, problems, samples, limits, kind, args.javatuples)
        unjudged = {sample.task_id for sample, key in zip(samples, keys, strict=True) if key not in kept.verdicts}
        wanted = [problem for problem in problems if problem.task_id in unjudged]
        with (
            says_how_to_resume(keys, kept),
            _judge_of(file.dataset, wanted, limits, kind, java_classes, workers) as judge,
        ):
            found = judge_samples(samples, keys, judge, kept, workers=workers, kind=kind)
    for group, share in shares_by_group(file.dataset, problems, samples, found).items():
        print(f"{group:<12} {100 * share:.1f}")
    return summarize(file.name, samples, found)


@contextlib.contextmanager
def _judge_of(
    dataset: Dataset,
    problems: Sequence[Problem],
    limits: JudgeLimits,
    kind: SandboxKind,
    java_classes: Path | None,
    workers: int,
) -> Iterator[Callable[[Sample], Verdicts]]:
    """What judges one sample of ``problems``, after what all samples of a problem need has been made or checked."""
    by_id = {problem.task_id: problem for problem in problems}
    if dataset == "humaneval" or dataset == "mbpp":
        from reflectron.tools.eval.judge import Judge

        with Judge(limits, kind, expectations_folder()) as judge:
            yield _evalplus_judge(judge, dataset, problems, workers)
    elif dataset == "functions":
        check_tests(problems, kind, workers)
        seconds = _CALLS_FACTOR * limits.input_seconds
        yield lambda sample: (judge_function(by_id[sample.task_id], sample.code, seconds, kind),)
    elif dataset == "multipl-e" or dataset == "ds1000":
        yield lambda sample: (judge_program(by_id[sample.task_id], sample.code, kind, java_classes),)
    else:
        assert_never(dataset)


def _evalplus_judge(
    judge: Judge, dataset: Literal["humaneval", "mbpp"], problems: Sequence[Problem], workers: int
) -> Callable[[Sample], Verdicts]:
    tasks = {problem.task_id: make_task(dataset, problem) for problem in problems}
    # Before any sample, or the samples of one task would all wait for them.
    with contextlib.closing(in_threads(judge.prepare, tasks.values(), workers)) as made:
        for _ in tracked(made, len(tasks), "expected answers"):
            pass
    return lambda sample: judge.judge(tasks[sample.task_id], sample.code)


def make_task(dataset: Literal["humaneval", "mbpp"], problem: Problem) -> Task:
    """A published row as what its function is called with."""
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    from reflectron.tools.eval.expectations import Task

    base, plus = problem.record["base_input"], problem.record["plus_input"]
    if dataset == "mbpp":
        base, plus = (mbpp_deserialize_inputs(problem.task_id, inputs) for inputs in (base, plus))
    canonical = problem.prompt + problem.record["canonical_solution"]
    return Task(dataset, problem.task_id, problem.entry_point, canonical, problem.record["atol"], (base, plus))


def summarize(dataset: str, samples: Sequence[Sample], verdicts: Sequence[Sequence[Verdict]]) -> Score:
    """Counts and estimates.

    Args:
        verdicts: of each sample; on base and plus, or on base alone where a benchmark has one suite of tests.
    """
    from evalplus.eval import PASS, estimate_pass_at_k

    suites = SUITES[: len(verdicts[0])]
    passed: dict[str, dict[str, int]] = {suite: dict.fromkeys((s.task_id for s in samples), 0) for suite in suites}
    failed = []
    for sample, outcomes in zip(samples, verdicts, strict=True):
        # As evalplus: what fails base does not count for plus.
        good = [all(verdict.status == PASS for verdict in outcomes[: n + 1]) for n in range(len(suites))]
        for suite, value in zip(suites, good, strict=True):
            passed[suite][sample.task_id] += value
        if not all(good):
            failed.append(_failure(sample, dict(zip(suites, outcomes, strict=True)), suites[good.index(False)]))
    totals = list(Counter(sample.task_id for sample in samples).values())
    counts = {suite: list(tasks.values()) for suite, tasks in passed.items()}
    at_k = {
        str(k): {suite: float(estimate_pass_at_k(totals, good, k).mean()) for suite, good in counts.items()}
        for k in _PASS_AT
        if min(totals) >= k
    }
    return Score(
        dataset=dataset,
        n_tasks=len(totals),
        n_samples=len(samples),
        pass_at_1=at_k["1"],
        pass_at_k=at_k,
        n_passed={suite: sum(good) for suite, good in counts.items()},
        passed=passed,
        failed=failed,
        at_limit=[
            _at_limit(sample, dict(zip(suites, outcomes, strict=True)))
            for sample, outcomes in zip(samples, verdicts, strict=True)
            if any(verdict.longer for verdict in outcomes)
        ],
    )


def describe(result: Score) -> str:
    """What a person wants to know of a result."""
    lines = []
    for k, shares in result["pass_at_k"].items():
        parts = [f"{suite_name(result['dataset'], suite)} {100 * share:.1f}" for suite, share in shares.items()]
        lines.append(f"pass@{k:<4} {'   '.join(parts)}")
    passed = ", ".join(f"{count} {suite}" for suite, count in result["n_passed"].items())
    lines.append(f"{result['n_tasks']} tasks, {result['n_samples']} samples, passed: {passed}")
    for failure in result["failed"][:_SHOWN_FAILURES]:
        shown = "  ".join(f"{key} {failure[key]}" for key in ("input", "expected", "got") if failure[key])
        lines.append(f"  {failure['task_id']} ({failure['suite']} {failure[failure['suite']]})  {shown}")
    if (more := len(result["failed"]) - _SHOWN_FAILURES) > 0:
        lines.append(f"  and {more} more in the JSON file")
    lines += _describe_at_limit(result["at_limit"])
    return "\n".join(lines)


def suite_name(dataset: str, suite: str) -> str:
    """What a suite of a dataset is called in tables."""
    names = {"humaneval": "HumanEval", "mbpp": "MBPP", "multipl-e": "MultiPL-E", "ds1000": "DS-1000"}
    name = names.get(dataset, dataset)
    return f"{name}+" if suite == "plus" else name


def _describe_at_limit(found: Sequence[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [f"{len(found)} samples hang on the limit of CPU time; with {LONGER_SECONDS:g} s an input:"]
    for row in found[:_SHOWN_FAILURES]:
        changes = (f"{suite} {row[suite]}, then {status}" for suite, status in row["longer"].items())
        lines.append(f"  {row['task_id']} sample {row['sample']}  {'  '.join(changes)}")
    if (more := len(found) - _SHOWN_FAILURES) > 0:
        lines.append(f"  and {more} more in the JSON file")
    return lines


def _at_limit(sample: Sample, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    return {
        "task_id": sample.task_id,
        "sample": sample.number,
        **{suite: verdict.status for suite, verdict in verdicts.items()},
        "longer": {suite: verdict.longer for suite, verdict in verdicts.items() if verdict.longer},
    }


def _failure(sample: Sample, verdicts: dict[str, Verdict], suite: str) -> dict[str, Any]:
    first = verdicts[suite]
    return {
        "task_id": sample.task_id,
        "sample": sample.number,
        **{name: verdict.status for name, verdict in verdicts.items()},
        "suite": suite,
        "input": first.input,
        "expected": first.expected,
        "got": first.got,
    }


def expectations_folder() -> Path:
    """Where expected answers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reflectron" / "eval"
