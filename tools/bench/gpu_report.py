"""The files of ``reflectron bench gpu`` -> ``README.md`` beside them; nothing in it is not in a row."""

from __future__ import annotations

import json
from pathlib import Path

from reflectron.tools.bench.gpu_stages import STAGES
from reflectron.tools.bench.report import goal_table, table
from reflectron.tools.bench.rows import Row
from reflectron.tools.bench.train_goals import train_goals

# Of the planner's bytes in tensors against what torch allocated.
MEMORY = 0.15
_TRAIN = ("train", "train_34b", "memory")


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; none where it is missing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_page(out: Path) -> str:
    """Write and return the page of a run as far as it has come."""
    stages = read_rows(out / "stages.jsonl")
    first = stages[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    train = [row for name in _TRAIN for row in read_rows(out / name / "rows.jsonl")]
    parts = [
        f"# {first['device']}\n\nCUDA {first['cuda']}; {versions}; commit {first['commit']}. Made by "
        "`reflectron bench gpu` from the rows in this folder.\n",
        _stage_table(stages),
        *(_check_table(name, read_rows(out / name / "rows.jsonl")) for name, stage in STAGES.items() if stage.checks),
        _memory_table(train),
        "## Goals of training steps\n",
        goal_table(train_goals(train)),
        _links(out),
    ]
    text = "\n".join(part for part in parts if part)
    (out / "README.md").write_text(text, encoding="utf-8")
    return text


def _stage_table(stages: list[Row]) -> str:
    lines = [
        [row["stage"], STAGES[row["stage"]].what, row["outcome"], f"{row['seconds']:.0f}", row["reason"] or ""]
        for row in stages
    ]
    return table(["stage", "", "outcome", "s", ""], lines)


def _check_table(name: str, rows: list[Row]) -> str:
    """Of each part, backend and type: how many numbers were compared, how many are wrong, the largest error."""
    if not rows:
        return ""
    by_kind: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_kind.setdefault((row["part"], row["backend"], row["dtype"]), []).append(row)
    lines = []
    for kind, group in by_kind.items():
        compared = [row for row in group if "passed" in row]
        worst = max(compared, key=lambda row: row["error"], default=None)
        place = f"{worst['error']:.2g} ({worst['case']}, {worst['tensor']})" if worst else ""
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in group if row.get("reason")))
        lines.append([*kind, str(len(compared)), str(sum(not row["passed"] for row in compared)), place, reasons])
    header = ["part", "backend", "type", "numbers", "wrong", "largest relative error", ""]
    return f"## {name}: {STAGES[name].what}\n\n{table(header, lines)}"


def _memory_table(rows: list[Row]) -> str:
    """Peak memory of every step that the planner has a prediction for."""
    lines = []
    for row in rows:
        measured, predicted = row.get("peak_memory_gib"), row.get("predicted_memory_gib")
        if measured is None or predicted is None:
            continue
        error = predicted / measured - 1
        place = f"{row['shape']} x{row['layers']}, {row['variant']}, mask rate {row['mask_rate']:.2f}"
        verdict = "yes" if abs(error) <= MEMORY else "no"
        lines.append([place, f"{measured:.2f}", f"{predicted:.2f}", f"{error:+.1%}", verdict])
    if not lines:
        return ""
    header = ["step", "measured GiB", "predicted GiB", "error", f"within {MEMORY:.0%}"]
    return f"## Peak memory\n\n{table(header, lines)}"


def _links(out: Path) -> str:
    pages = [f"- [{path.parent.name}]({path.relative_to(out)})" for path in sorted(out.glob("*/*.md"))]
    return "Tables:\n\n" + "\n".join(pages) + "\n" if pages else ""
