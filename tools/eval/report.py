"""Pages about scores: one run beside the papers' numbers, and an ablation's variants with 95 % intervals.

Tasks and seeds are both samples: other tasks could have been asked, other seeds trained. The variance of a mean is the
sum of its variances over tasks and over seeds, in which chance that belongs to neither counts twice, so intervals err
on the wide side. Few seeds say little about their spread, hence Student's t with Satterthwaite's degrees of freedom.
With one seed nothing is known of it, and an interval speaks of tasks alone.

S seeds, T tasks; a matrix [S, T] holds 1 where a run passed a task, else 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.files import write_text
from reflectron.tools.benchmarks.benchmark import Benchmark
from reflectron.tools.benchmarks.catalogue import suite_name
from reflectron.tools.eval.ablation import FULL

_SHOWN_FAILURES = 200


def write_report(
    folder: Path, benchmark: Benchmark, model: str, result: Mapping[str, Any], other: Mapping[str, Any] | None
) -> Path:
    """Write ``report.md`` and its plot ``report.png``.

    Args:
        model: what the checkpoint is called in tables.
        result: a ``Score``.
        other: the score of another run on the same dataset, with its ``model``.

    Returns:
        The page's path.
    """
    dataset = result["dataset"]
    rows = [(model, result["pass_at_1"], f"this run, {result['n_tasks']} tasks")]
    if other is not None:
        rows.append((other["model"], other["pass_at_1"], f"compared run, {other['n_tasks']} tasks"))
    for paper in benchmark.published:
        shares = {suite: share / 100 for suite, share in zip(benchmark.suites, paper.pass_at_1, strict=True)}
        rows.append((paper.model, shares, paper.source))
    _plot(folder / "report.png", dataset, rows)
    parts = [f"# {suite_name(dataset, 'base')}: {model}", "", *_table(dataset, rows), "", "![pass@1](report.png)"]
    if other is not None:
        parts += ["", *_difference(result, other)]
    parts += ["", *_failures(result), ""]
    page = folder / "report.md"
    write_text(page, "\n".join(parts))
    return page


Rows = list[tuple[str, Mapping[str, float], str]]


def _table(dataset: str, rows: Rows) -> list[str]:
    suites = list(rows[0][1])
    head = " | ".join(f"{suite_name(dataset, suite)} pass@1, %" for suite in suites)
    lines = [f"| model | {head} | source |", "|---|" + "---|" * len(suites) + "---|"]
    for model, shares, source in rows:
        cells = " | ".join(f"{100 * shares[suite]:.1f}" for suite in suites)
        lines.append(f"| {_cell(model)} | {cells} | {_cell(source)} |")
    return lines


def _difference(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """List the tasks whose failed samples are more or fewer than in the other run."""
    ours, theirs = _failed_samples(result), _failed_samples(other)
    lines = [f"## Against {other['model']}", ""]
    for title, tasks in (
        ("better here", [task for task in theirs if ours.get(task, 0) < theirs[task]]),
        ("worse here", [task for task in ours if theirs.get(task, 0) < ours[task]]),
    ):
        lines.append(f"- {title} ({len(tasks)}): {', '.join(tasks) or 'none'}")
    if result["n_tasks"] != other["n_tasks"] or result["n_samples"] != other["n_samples"]:
        lines.append(f"- not the same samples: {result['n_samples']} here, {other['n_samples']} there")
    return lines


def _failed_samples(result: Mapping[str, Any]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for failure in result["failed"]:
        counts[failure["task_id"]] = counts.get(failure["task_id"], 0) + 1
    return counts


def _failures(result: Mapping[str, Any]) -> list[str]:
    lines = ["## Failed", "", "| task | sample | suite | input | expected | got |", "|---|---|---|---|---|---|"]
    for failure in result["failed"][:_SHOWN_FAILURES]:
        cells = (_cell(str(failure[key])) for key in ("task_id", "sample", "suite", "input", "expected", "got"))
        lines.append("| " + " | ".join(cells) + " |")
    if (more := len(result["failed"]) - _SHOWN_FAILURES) > 0:
        lines.append(f"\n{more} more are in `score.json`.")
    return lines


def _cell(text: str) -> str:
    """Return text that neither ends a cell nor becomes markup."""
    return text.replace("\n", " ").replace("|", r"\|").replace("<", "&lt;")


def _plot(path: Path, dataset: str, rows: Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    height = 0.8 / len(rows[0][1])
    for number, suite in enumerate(rows[0][1]):
        places = [row + number * height for row in range(len(rows))]
        shares = [100 * shares[suite] for _, shares, _ in rows]
        axis.barh(places, shares, height, label=suite_name(dataset, suite))
    axis.set_yticks(range(len(rows)), [Path(model).name for model, _, _ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("pass@1, %")
    axis.legend(loc="lower right")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


Row = Mapping[str, Any]

_METHOD = """\
pass@1 of greedy answers, with 95 % intervals over tasks and seeds: Wilson's, for as many tasks as have the variance
that is seen. `minus full` is paired by task and seed, in points; an interval without 0 is a difference. Each interval
stands for itself: of twenty, one misses. With one seed it speaks of other tasks, not of other seeds.
"""


@dataclass(frozen=True)
class VariantResult:
    """The result of a variant on one suite of tests."""

    passed: Estimate
    minus_full: Estimate | None
    """None for ``full`` itself, and without a seed in common with it."""


def compare(rows: Sequence[Row], suite: str) -> dict[str, VariantResult]:
    """Return every variant's result on ``suite``, in the rows' order."""
    by_variant: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    full = by_variant.get(FULL, {})
    found = {}
    for variant, by_seed in by_variant.items():
        shared = [seed for seed in by_seed if seed in full] if variant != FULL else []
        minus_full = None
        if shared:
            minus_full = difference(_matrix(by_seed, shared, suite), _matrix(full, shared, suite))
        found[variant] = VariantResult(share(_matrix(by_seed, list(by_seed), suite)), minus_full)
    return found


def _matrix(by_seed: Mapping[int, Row], seeds: Sequence[int], suite: str) -> np.ndarray:
    """Return what passed: [seeds, tasks], the tasks in the order of their names, for each row has them in its own."""
    tasks = sorted(by_seed[seeds[0]]["passed"][suite])
    return np.array([[by_seed[seed]["passed"][suite][task] for task in tasks] for seed in seeds])


def write_ablation_report(folder: Path, rows: Sequence[Row], *, config: str, same_tokens: bool) -> Path:
    """Write ``ablation.jsonl``, ``ablation.md`` and its plot ``ablation.png``; return the page's path.

    Args:
        folder: where.
        rows: at least one.
        config: what was varied.
        same_tokens: how long the variants trained.
    """
    write_text(folder / "ablation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    dataset, suites = rows[0]["dataset"], list(rows[0]["passed"])
    found = {suite: compare(rows, suite) for suite in suites}
    length = (
        "Every variant trained on as many tokens as `full`, to within a step."
        if same_tokens
        else "Every variant trained for the epochs or steps of the configuration."
    )
    tokens = "Tokens are those that enter the model: teacher views, student views and instruction samples, unpadded."
    parts = [
        f"# Ablation of {config} on {suite_name(dataset, 'base')}, {rows[0]['n_tasks']} tasks",
        "",
        _METHOD,
        f"{length} {tokens} Tokens, samples, steps and the last step's loss are means over seeds.",
        "",
        *_ablation_table(rows, dataset, found),
        "",
        "![pass@1 of the variants](ablation.png)",
        "",
        "## Settings",
        "",
        *_settings(rows),
        "",
    ]
    _ablation_plot(folder / "ablation.png", dataset, found)
    page = folder / "ablation.md"
    write_text(page, "\n".join(parts))
    return page


def _ablation_table(rows: Sequence[Row], dataset: str, found: Mapping[str, Mapping[str, VariantResult]]) -> list[str]:
    head = ["variant", "seeds"]
    for suite in found:
        head += [f"{suite_name(dataset, suite)}, %", "minus full, points"]
    head += ["tokens", "samples", "steps", "last loss"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for variant in next(iter(found.values())):
        own = [row for row in rows if row["variant"] == variant]
        cells = [", ".join([variant, *own[0]["same_as"]]), str(len(own))]
        for comparisons in found.values():
            cells += [_percent(comparisons[variant].passed), _percent(comparisons[variant].minus_full, signed=True)]
        cells += [f"{np.mean([row[key] for row in own]):,.0f}" for key in ("tokens", "samples", "steps")]
        losses = [row["last_loss"] for row in own if row["last_loss"] is not None]
        cells.append(f"{np.mean(losses):.3f}" if losses else "not finite")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return ""
    value, low, high = (f"{100 * number:{'+' if signed else ''}.1f}" for number in vars(estimate).values())
    return f"{value} ({low} to {high})"


def _settings(rows: Sequence[Row]) -> list[str]:
    """List what each variant changes of the configuration."""
    changed = {row["variant"]: row["overrides"] for row in rows}
    return [
        f"- {variant}: {', '.join(f'`{word}`' for word in words) or 'the configuration as it stands'}"
        for variant, words in changed.items()
    ]


def _ablation_plot(path: Path, dataset: str, found: Mapping[str, Mapping[str, VariantResult]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    variants = list(next(iter(found.values())))
    figure, (shares, differences) = pyplot.subplots(
        1, 2, figsize=(10, 1.2 + 0.45 * len(variants)), sharey=True, layout="constrained"
    )
    for number, (suite, comparisons) in enumerate(found.items()):
        offset = (number - (len(found) - 1) / 2) * 0.25
        for axis, name in ((shares, "passed"), (differences, "minus_full")):
            estimates = {place: getattr(comparisons[v], name) for place, v in enumerate(variants)}
            shown = {place + offset: estimate for place, estimate in estimates.items() if estimate is not None}
            middles = [(estimate.low + estimate.high) / 2 for estimate in shown.values()]
            halves = [50 * (estimate.high - estimate.low) for estimate in shown.values()]
            color = f"C{number}"
            axis.errorbar([100 * m for m in middles], list(shown), xerr=halves, fmt="none", ecolor=color, capsize=3)
            axis.plot([100 * e.value for e in shown.values()], list(shown), "o", color=color, label=suite)
    shares.set_yticks(range(len(variants)), variants)
    shares.invert_yaxis()
    shares.set_xlabel(f"{suite_name(dataset, 'base')} pass@1, %")
    differences.set_xlabel("minus full, points")
    differences.axvline(0, color="gray", linewidth=1)
    shares.legend(fontsize="small")
    for axis in (shares, differences):
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_TWO_SIDED = 0.975


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def share(passed: np.ndarray) -> Estimate:
    """Return the share of tasks passed, by Wilson's interval for as many tasks as have this variance without seeds.

    As for surveys (Kott and Carr, 1997); with one seed it is Wilson's own interval.

    Args:
        passed: [S, T].
    """
    value = float(passed.mean())
    variance, quantile = _variance(passed)
    # All or none passed: no spread is seen, and seeds add no evidence.
    tasks = value * (1 - value) / variance if variance else passed.shape[1]
    square = quantile**2 / tasks
    middle = (value + square / 2) / (1 + square)
    half = math.sqrt(square * value * (1 - value) + square**2 / 4) / (1 + square)
    return Estimate(value, max(middle - half, 0.0), min(middle + half, 1.0))


def difference(passed: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Return the share of tasks passed, less the baseline's: paired by seed and task.

    Its interval is Wald's with a task more on either side that only one of the two passes (Bonett and Price, 2012):
    runs that agree on these tasks are not proven to agree on others. The value is without these two.

    Args:
        passed: [S, T].
        baseline: [S, T], the same seeds and tasks.
    """
    pairs = passed.astype(float) - baseline
    one_each = np.broadcast_to([1.0, -1.0], (len(pairs), 2))
    adjusted = np.concatenate([pairs, one_each], axis=1)
    variance, quantile = _variance(adjusted)
    middle, half = float(adjusted.mean()), quantile * math.sqrt(variance)
    return Estimate(float(pairs.mean()), max(middle - half, -1.0), min(middle + half, 1.0))


def _variance(values: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean of ``values`` [S, T], and the quantile that a 95 % interval takes."""
    from scipy import stats

    seeds, tasks = values.shape
    over_tasks = float(values.mean(axis=0).var()) / tasks
    over_seeds = float(values.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    if over_seeds == 0:
        return over_tasks, float(stats.norm.ppf(_TWO_SIDED))
    freedom = (seeds - 1) * (1 + over_tasks / over_seeds) ** 2
    return over_tasks + over_seeds, float(stats.t.ppf(_TWO_SIDED, freedom))
