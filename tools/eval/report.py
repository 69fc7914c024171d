"""A score comes in, a page goes out: a table beside the papers' numbers, a plot, and what changed task by task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflectron.engine.files import write_text
from reflectron.tools.eval.published import PUBLISHED
from reflectron.tools.eval.score import suite_name

_SHOWN_FAILURES = 200


def write_report(folder: Path, model: str, result: Mapping[str, Any], other: Mapping[str, Any] | None) -> Path:
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
    for paper in PUBLISHED:
        if dataset in paper.pass_at_1:
            base, plus = paper.pass_at_1[dataset]
            rows.append((paper.model, {"base": base / 100, "plus": plus / 100}, paper.source))
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
    """Tasks whose failed samples are more or fewer than in the other run."""
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
    """Text that neither ends a cell nor becomes markup."""
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
