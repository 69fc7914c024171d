"""``reflectron eval score``: completions in, pass@k out; of HumanEval+ and MBPP+ as evalplus 0.3.1 counts it.

Nothing is downloaded and nothing of an earlier run is taken for a result: only expected answers are kept, by content.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from reflectron.engine.files import write_text
from reflectron.tools.eval.problems import Problem, ProblemFile, add_problem_arguments, find_problems, load_problems
from reflectron.tools.eval.rows import read_json_lines
from reflectron.tools.eval.verdict import SUITES, Verdict
from reflectron.tools.sandbox.process import SandboxKind, add_sandbox_arguments, choose_sandbox

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from reflectron.tools.eval.judge import JudgeLimits, Task

T = TypeVar("T")

_PASS_AT = (1, 10, 100)
_SHOWN_FAILURES = 10


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


@dataclass(frozen=True)
class Sample:
    """One program for a task."""

    task_id: str
    number: int
    """Among those of its task, in the file's order."""
    code: str


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
        "--min-time-limit", type=float, default=10.0, metavar="S", help="CPU seconds an input has at least (10)"
    )
    parser.add_argument("--javatuples", metavar="JAR", help="javatuples-1.2.jar, for MultiPL-E's Java problems")
    add_sandbox_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Score and print; returns 0 whatever the score is."""
    kind, limits = choose_sandbox(args.sandbox, args.i_understand), scoring_limits(args)
    file = find_problems(args.dataset, args.data)
    problems = load_problems(file.dataset, file.path)
    samples = read_samples(Path(args.completions), problems, partial=args.partial)
    result = score_samples(args, file, problems, samples, limits, kind)
    print(describe(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=2) + "\n")
    return 0


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


def read_samples(path: Path, problems: Sequence[Problem], *, partial: bool) -> list[Sample]:
    """Completions as evalplus reads them: a ``solution`` is a program, a ``completion`` follows the prompt.

    Raises:
        ValueError: naming the line that is no completion, or how many tasks have none (unless ``partial``).
    """
    prompts = {problem.task_id: problem.prompt for problem in problems}
    counts: dict[str, int] = {}
    samples = []
    for number, row in read_json_lines(path):
        task_id = row.get("task_id")
        if task_id not in prompts:
            raise ValueError(f"{path}:{number} has task_id {task_id!r}, which the data set does not have")
        code = row.get("solution")
        if code is None and isinstance(row.get("completion"), str):
            code = prompts[task_id] + row["completion"]
        if not isinstance(code, str):
            raise ValueError(f"{path}:{number} has neither a text 'solution' nor a text 'completion'")
        samples.append(Sample(task_id, counts.setdefault(task_id, 0), code))
        counts[task_id] += 1
    missing = [task_id for task_id in prompts if task_id not in counts]
    if missing and not (partial and samples):
        raise ValueError(
            f"{path} has no completion for {len(missing)} of {len(prompts)} tasks, such as {missing[0]}; "
            "--partial scores the others"
        )
    return samples


def score_samples(
    args: argparse.Namespace,
    file: ProblemFile,
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    limits: JudgeLimits,
    kind: SandboxKind,
) -> Score:
    """Judge every sample as its data set asks for; ``args`` are those of ``add_scoring_arguments``.

    Raises:
        ValueError: when no toolchain for the samples is installed.
    """
    if file.dataset in ("humaneval", "mbpp"):
        return score(file.dataset, problems, samples, limits, kind, args.workers)
    from reflectron.tools.eval.programs import ProgramLimits, score_programs

    java_classes = Path(args.javatuples) if args.javatuples else None
    if java_classes is not None and not java_classes.is_file():
        raise ValueError(f"{java_classes} is not a file (--javatuples)")
    program_limits = ProgramLimits(check_seconds=limits.input_seconds, java_classes=java_classes)
    return score_programs(file, problems, samples, program_limits, kind, args.workers)


def score(
    dataset: Literal["humaneval", "mbpp"],
    problems: Sequence[Problem],
    samples: Sequence[Sample],
    limits: JudgeLimits,
    kind: SandboxKind,
    workers: int = 0,
) -> Score:
    """Judge every sample, each in a sandbox of its own.

    Args:
        workers: samples judged at once; 0 takes a core each, as far as memory allows what each may use.
    """
    wanted = {sample.task_id for sample in samples}
    tasks = {problem.task_id: make_task(dataset, problem) for problem in problems if problem.task_id in wanted}
    jobs = [(tasks[sample.task_id], sample.code, limits, kind) for sample in samples]
    expected = [(task, kind) for task in tasks.values()]
    with worker_pool(workers, limits.memory_bytes) as pool:
        # Before any sample, or the samples of one task would all make them.
        list(tracked(pool.map(_prepare, expected), len(expected), "expected answers"))
        verdicts = list(tracked(pool.map(_judge, jobs), len(jobs), "judging"))
    return summarize(dataset, samples, verdicts)


def make_task(dataset: Literal["humaneval", "mbpp"], problem: Problem) -> Task:
    """A published row as what its function is called with."""
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    from reflectron.tools.eval.judge import Task

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
    return "\n".join(lines)


def suite_name(dataset: str, suite: str) -> str:
    """What a suite of a data set is called in tables."""
    names = {"humaneval": "HumanEval", "mbpp": "MBPP", "multipl-e": "MultiPL-E", "ds1000": "DS-1000"}
    name = names.get(dataset, dataset)
    return f"{name}+" if suite == "plus" else name


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


def _prepare(job: tuple[Task, SandboxKind]) -> None:
    from reflectron.tools.eval.judge import cached_expectation

    task, kind = job
    cached_expectation(task, expectations_folder(), kind)


def _judge(job: tuple[Task, str, JudgeLimits, SandboxKind]) -> tuple[Verdict, Verdict]:
    from reflectron.tools.eval.judge import cached_expectation, judge_sample

    task, code, limits, kind = job
    return judge_sample(task, code, cached_expectation(task, expectations_folder(), kind), limits, kind)


def worker_pool(workers: int, memory_bytes: int) -> ProcessPoolExecutor:
    """Processes that judge.

    Args:
        workers: how many; 0 is a core each, as far as the free memory has ``memory_bytes`` for each.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import psutil

    affordable = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // memory_bytes)
    # Fresh processes: judges are forked from them, and must inherit neither threads nor a model.
    return ProcessPoolExecutor(workers or max(affordable, 1), mp_context=multiprocessing.get_context("spawn"))


def tracked(results: Iterable[T], total: int, what: str) -> Iterable[T]:
    """``results``, with a progress bar on a terminal."""
    from rich.progress import track

    return track(results, description=what, total=total, disable=not sys.stderr.isatty(), transient=True)
