"""Scores completions: each is judged as its benchmark asks for, and pass@k is counted as evalplus 0.3.1 counts it.

Nothing is downloaded. Verdicts are kept as they are made, by all that determines them, and so are expected answers.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from reflectron.engine.files import is_stream, printable, require
from reflectron.tools.benchmarks.benchmark import (
    LONGER_SECONDS,
    SUITES,
    Benchmark,
    BenchmarkProblem,
    JudgeLimits,
    JudgeSettings,
    ProgramSample,
    SuiteVerdict,
    Verdicts,
)
from reflectron.tools.benchmarks.catalogue import ProblemFile, read_json_lines, suite_name
from reflectron.tools.benchmarks.expectations import expectations_folder
from reflectron.tools.benchmarks.judging import (
    VerdictFile,
    affordable_workers,
    judge_samples,
    says_how_to_resume,
    verdict_keys,
)
from reflectron.tools.sandbox.process import choose_sandbox
from reflectron.tools.sandbox.wall import SandboxKind

_PASS_AT = (1, 10, 100)
_SHOWN_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The way samples are judged; the names of the fields are those of the command line's options."""

    workers: int = 0
    min_time_limit: float = 1.0
    javatuples: str | None = None
    sandbox: SandboxKind = "bubblewrap"
    i_understand: bool = False

    def settings(self) -> JudgeSettings:
        """Return what a benchmark's judge needs.

        Raises:
            ValueError: when evalplus or the sandbox is missing, or an option cannot be.
        """
        kind = choose_sandbox(self.sandbox, self.i_understand)
        require("evalplus", extra="eval")
        if self.min_time_limit < 1:
            raise ValueError(f"--min-time-limit is {self.min_time_limit}, expected at least 1 second")
        limits = JudgeLimits(input_seconds=self.min_time_limit)
        java_classes = Path(self.javatuples) if self.javatuples else None
        if java_classes is not None and not java_classes.is_file():
            raise ValueError(f"{java_classes} is not a file (--javatuples)")
        workers = affordable_workers(self.workers, limits.memory_bytes)
        return JudgeSettings(limits=limits, kind=kind, workers=workers, java_classes=java_classes)


class Score(TypedDict):
    """The content of ``--json``; shares are 0 to 1."""

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


def score_samples(
    file: ProblemFile,
    problems: Sequence[BenchmarkProblem],
    samples: Sequence[ProgramSample],
    settings: JudgeSettings,
    verdicts: Path,
) -> Score:
    """Judge every sample as its benchmark asks for, and print the shares of its groups.

    Args:
        verdicts: the file that keeps them; those that are there already are not made again.

    Raises:
        ValueError: when no sample can be judged here, or a problem's own test cannot work.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    benchmark = file.benchmark
    samples = _without_unavailable(benchmark, problems, samples)
    by_id = {problem.task_id: problem for problem in problems}
    with VerdictFile(verdicts, len(benchmark.suites)) as kept:
        determining = (settings.limits, settings.kind, settings.java_classes)
        keys = verdict_keys(benchmark.name, problems, samples, *determining)
        unjudged = {sample.task_id for sample, key in zip(samples, keys, strict=True) if key not in kept.verdicts}
        wanted = [problem for problem in problems if problem.task_id in unjudged]
        with says_how_to_resume(keys, kept), benchmark.judge(wanted, settings) as judge:
            found = judge_samples(
                samples,
                keys,
                lambda sample: judge(by_id[sample.task_id], sample.code),
                kept,
                workers=settings.workers,
                kind=settings.kind,
            )
    for group, share in _shares_by_group(benchmark, by_id, samples, found).items():
        print(f"{group:<12} {100 * share:.1f}")
    return summarize(file.name, samples, found)


def _without_unavailable(
    benchmark: Benchmark, problems: Sequence[BenchmarkProblem], samples: Sequence[ProgramSample]
) -> Sequence[ProgramSample]:
    """Return the samples that can be judged here; print which groups are skipped."""
    unavailable = benchmark.unavailable(problems)
    if benchmark.group is None or not unavailable:
        return samples
    for group, why in unavailable.items():
        print(f"{printable(group)} is skipped: {why}")
    groups = {problem.task_id: benchmark.group(problem) for problem in problems}
    left = [sample for sample in samples if groups[sample.task_id] not in unavailable]
    if not left:
        raise ValueError("nothing can be scored: nothing that these problems need is installed")
    return left


def _shares_by_group(
    benchmark: Benchmark,
    problems: Mapping[str, BenchmarkProblem],
    samples: Sequence[ProgramSample],
    verdicts: Sequence[Verdicts],
) -> dict[str, float]:
    """Return the share of samples that pass the first suite, by group."""
    if benchmark.group is None:
        return {}
    passed: dict[str, list[bool]] = {}
    for sample, (verdict, *_) in zip(samples, verdicts, strict=True):
        passed.setdefault(benchmark.group(problems[sample.task_id]), []).append(verdict.status == "pass")
    return {group: sum(values) / len(values) for group, values in passed.items()}


def read_samples(path: Path, problems: Sequence[BenchmarkProblem], *, partial: bool) -> list[ProgramSample]:
    """Read completions as evalplus reads them: a ``solution`` is a program, a ``completion`` follows the prompt.

    A sample whose text is no valid UTF-8 keeps what it has, as lone surrogates, for the judging to name.

    Raises:
        ValueError: naming the line that is no completion, or how many tasks have none (unless ``partial``).
    """
    prompts = {problem.task_id: problem.prompt for problem in problems}
    counts: dict[str, int] = {}
    samples = []
    for number, row in read_json_lines(path, errors="surrogateescape"):
        task_id = row.get("task_id")
        if not isinstance(task_id, str) or task_id not in prompts:
            shown = printable(repr(task_id))
            raise ValueError(f"{path}:{number} has task_id {shown}, which the dataset does not have")
        code = row.get("solution")
        if code is None and isinstance(row.get("completion"), str):
            code = prompts[task_id] + row["completion"]
        if not isinstance(code, str):
            raise ValueError(f"{path}:{number} has neither a text 'solution' nor a text 'completion'")
        samples.append(ProgramSample(task_id, counts.setdefault(task_id, 0), code))
        counts[task_id] += 1
    missing = [task_id for task_id in prompts if task_id not in counts]
    if missing and not (partial and samples):
        raise ValueError(
            f"{path} has no completion for {len(missing)} of {len(prompts)} tasks, such as {printable(missing[0])}; "
            "--partial scores the others"
        )
    return samples


def verdicts_beside(completions: str, result: str | None) -> Path:
    """Return where verdicts are kept: beside the result, else beside the completions if that folder can be written."""
    beside_result = result if result and not is_stream(Path(result)) else None
    beside = Path(beside_result or completions.removesuffix(".gz")).with_suffix(".verdicts.jsonl")
    if beside_result or os.access(beside.parent, os.W_OK):
        return beside
    name = hashlib.sha256(os.fsencode(Path(completions).resolve())).hexdigest()
    return expectations_folder() / f"{name}.verdicts.jsonl"


def summarize(dataset: str, samples: Sequence[ProgramSample], verdicts: Sequence[Sequence[SuiteVerdict]]) -> Score:
    """Return counts and estimates.

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
    """Describe a result for a person."""
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


def _at_limit(sample: ProgramSample, verdicts: dict[str, SuiteVerdict]) -> dict[str, Any]:
    return {
        "task_id": sample.task_id,
        "sample": sample.number,
        **{suite: verdict.status for suite, verdict in verdicts.items()},
        "longer": {suite: verdict.longer for suite, verdict in verdicts.items() if verdict.longer},
    }


def _failure(sample: ProgramSample, verdicts: dict[str, SuiteVerdict], suite: str) -> dict[str, Any]:
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
