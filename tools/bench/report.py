"""Rows -> ``head.md`` with a table for each case and the goals, and ``head.png``; nothing in them is not in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflectron.tools.bench.goals import Goal, goals, where
from reflectron.tools.bench.providers import FLOOR, OURS
from reflectron.tools.bench.rows import Row

ERRORS = {
    "error_grad_teacher": "dH teacher",
    "error_grad_student": "dH student",
    "kl_error_grad_student": "dH student, KL alone",
    "error_grad_weight": "dW",
}
METHOD = f"""\
Loss: mean CE(teacher) + mean CE(student) + mean KL(teacher || student) of N pairs on one bf16 output matrix, hence
R = 2N rows; `full` is forward and backward, `forward` the loss alone. Times are medians, in brackets the 20 and 80 per
cent quantiles, over rounds that call every provider once, each time another one first; ratios are formed within a
round. `/ {FLOOR}` divides by the matrix products alone (logits, and for `full` dH and dW), `TFLOP/s` counts their
6 R V d or 2 R V d. Extra memory is the peak beyond inputs and returned gradients. Errors are relative, in the Frobenius
norm, to fp64 from the same bf16 numbers, on up to 512 rows of each gradient; `KL alone` is a call of its own without
cross entropies, which would hide it. A shard `V/4` is measured alone, as if it were the whole vocabulary, its
statistics merged as in a group of one: no communication is in its time.
"""


def write_report(rows: list[Row], folder: Path | None) -> str:
    """The report as Markdown; with a folder, also ``head.md`` and ``head.png`` in it."""
    text = "\n".join([_header(rows), METHOD, goal_table(goals(rows)), _providers(rows), *_cases(rows)])
    if folder is not None:
        plotted = _plot(rows, folder / "head.png")
        picture = "\n![times and errors](head.png)\n" if plotted else ""
        (folder / "head.md").write_text(text + picture, encoding="utf-8")
    return text


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def _header(rows: list[Row]) -> str:
    if not rows:
        return "# Distillation head\n"
    row = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    return f"# Distillation head\n\n{row['device']}, CUDA {row['cuda']}; {versions}; commit {row['commit']}\n"


def goal_table(found: list[Goal]) -> str:
    """Which goals are met, and by which figure."""
    words = {True: "met", False: "not met", None: "not measured"}
    return table(["goal", "", "worst figure"], [[goal.text, words[goal.met], goal.figure] for goal in found])


def _providers(rows: list[Row]) -> str:
    """What each provider cannot do, and why one is missing altogether."""
    notes = {row["provider"]: row["note"] for row in rows if row["note"]}
    missing = {row["provider"]: row["reason"] for row in rows if "d" not in row}
    return table(["provider", "note"], [[name, note] for name, note in (notes | missing).items()])


def _cases(rows: list[Row]) -> list[str]:
    """A section for each case, in the order of measurement."""
    sections = []
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if "d" in row:
            by_case.setdefault(where(row), []).append(row)
    for case, group in by_case.items():
        cells = {(row["provider"], row["mode"], row["metric"]): row for row in group}
        kl, clock = (_number(cells.get((*key, metric))) for key, metric in ((_TRUTH, "kl"), (_GPU, "sm_clock")))
        providers = list(dict.fromkeys([FLOOR, OURS, *(row["provider"] for row in group)]))
        keys = {(row["provider"], row["mode"]) for row in group} - {_TRUTH, _GPU}
        order = sorted(keys, key=lambda key: (providers.index(key[0]), key[1] != "full"))
        lines = [_line(cells, *key) for key in order]
        header = ["provider", "mode", "ms", f"/ {FLOOR}", f"/ {OURS}", "TFLOP/s", "extra MiB", *ERRORS.values(), ""]
        facts = [f"KL {kl} nats"] * bool(kl) + [f"SM clock {clock} MHz"] * bool(clock)
        sections.append(f"## {case}\n\n{', '.join(facts)}\n\n{table(header, lines)}")
    return sections


_TRUTH, _GPU = ("float64", "full"), ("gpu", "full")


def _line(cells: dict[tuple[str, str, str], Row], provider: str, mode: str) -> list[str]:
    def cell(metric: str, spread: bool = False) -> str:
        return _number(cells.get((provider, mode, metric)), spread)

    metrics = [cell("throughput"), cell("extra_memory"), *map(cell, ERRORS)]
    times = [cell(metric, True) for metric in ("time", f"time_over_{FLOOR}", f"time_over_{OURS}")]
    reasons = [row["reason"] for key, row in cells.items() if key[:2] == (provider, mode) and row["reason"]]
    return [provider, mode, *times, *metrics, "; ".join(dict.fromkeys(reasons))]


def _number(row: Row | None, spread: bool = False) -> str:
    if row is None or row["p50"] is None:
        return ""
    text = f"{row['p50']:.4g}"
    return f"{text} ({row['p20']:.4g}-{row['p80']:.4g})" if spread else text


def _plot(rows: list[Row], path: Path) -> bool:
    """Ratios to the floor above, errors of the divergence's gradient below; whether there was something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = [row for row in rows if row.get("tp") == 1 and row["mode"] == "full" and row["p50"] is not None]
    ratios = [row for row in whole if row["metric"] == f"time_over_{FLOOR}"]
    divergence = [row for row in whole if row["metric"] == "kl_error_grad_student"]
    panels = [
        (ratios, f"time / {FLOOR}", False),
        (divergence, "relative error of dH student, KL alone", True),
    ]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return False
    widest = max(len({where(row) for row in panel[0]}) for panel in panels)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(4 + 1.1 * widest, 5 * len(panels)), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _bars(axis, *panel)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _bars(axis: Any, rows: list[Row], label: str, logarithmic: bool) -> None:
    """A group of bars a case, a colour a provider, a whisker from the 20 to the 80 per cent quantile."""
    cases = list(dict.fromkeys(map(where, rows)))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    if logarithmic:
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 1)  # alike in every plot; bars on a logarithmic scale have no natural foot
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        own = [row for row in rows if row["provider"] == name]
        places = [cases.index(where(row)) + (index - (len(names) - 1) / 2) * width for row in own]
        whiskers = [[row["p50"] - row["p20"] for row in own], [row["p80"] - row["p50"] for row in own]]
        axis.bar(places, [row["p50"] for row in own], width, yerr=whiskers, label=name)
    axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize="x-small")
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")
