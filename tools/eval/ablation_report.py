"""Rows of an ablation come in, ``ablation.md`` goes out: a table with intervals, and a plot of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.files import write_text
from reflectron.tools.eval.intervals import Estimate, difference, share
from reflectron.tools.eval.score import suite_name
from reflectron.tools.eval.variants import FULL

Row = Mapping[str, Any]

_METHOD = """\
pass@1 of greedy answers, with 95 % intervals over tasks and seeds: Wilson's, for as many tasks as have the variance
that is seen. `minus full` is paired by task and seed, in points; an interval without 0 is a difference. Each interval
stands for itself: of twenty, one misses. With one seed it speaks of other tasks, not of other seeds.
"""


@dataclass(frozen=True)
class Comparison:
    """A variant on one suite of tests."""

    passed: Estimate
    minus_full: Estimate | None
    """None for ``full`` itself, and without a seed in common with it."""


def compare(rows: Sequence[Row], suite: str) -> dict[str, Comparison]:
    """Every variant on ``suite``, in the rows' order."""
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
        found[variant] = Comparison(share(_matrix(by_seed, list(by_seed), suite)), minus_full)
    return found


def _matrix(by_seed: Mapping[int, Row], seeds: Sequence[int], suite: str) -> np.ndarray:
    """What passed: [seeds, tasks], the tasks in the order of their names, for each row has them in its own."""
    tasks = sorted(by_seed[seeds[0]]["passed"][suite])
    return np.array([[by_seed[seed]["passed"][suite][task] for task in tasks] for seed in seeds])


def write_report(folder: Path, rows: Sequence[Row], *, config: str, same_tokens: bool) -> None:
    """Write ``ablation.md`` and its plot ``ablation.png``.

    Args:
        folder: where.
        rows: of ``ablation.jsonl``; at least one.
        config: what was varied.
        same_tokens: how long the variants trained.
    """
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
        *_table(rows, dataset, found),
        "",
        "![pass@1 of the variants](ablation.png)",
        "",
        "## Settings",
        "",
        *_settings(rows),
        "",
    ]
    _plot(folder / "ablation.png", dataset, found)
    write_text(folder / "ablation.md", "\n".join(parts))


def _table(rows: Sequence[Row], dataset: str, found: Mapping[str, Mapping[str, Comparison]]) -> list[str]:
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
    """What each variant changes of the configuration."""
    changed = {row["variant"]: row["overrides"] for row in rows}
    return [
        f"- {variant}: {', '.join(f'`{word}`' for word in words) or 'the configuration as it stands'}"
        for variant, words in changed.items()
    ]


def _plot(path: Path, dataset: str, found: Mapping[str, Mapping[str, Comparison]]) -> None:
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
