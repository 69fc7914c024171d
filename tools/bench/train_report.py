"""Rows of ``bench train`` -> ``train.md`` with tables and goals, and ``train.png``; nothing in them is not in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflectron.tools.bench.report import goal_table, table
from reflectron.tools.bench.rows import Row
from reflectron.tools.bench.train_goals import measured, over_schedule, schedule_ms, shapes_of, train_goals
from reflectron.tools.bench.train_plan import BASELINE, ENGINE

METHOD = """\
A step is an optimizer step on the same samples with the same weights: forward, backward, clipping, AdamW. Learning rate
0 leaves the weights alone, so all variants compute the same loss and gradient norm, which the rows hold. Times are
medians over rounds that run every variant once, each time another one first; in brackets the 20 and 80 per cent
quantiles. `hf_reference` is the reference's way: transformers' Llama, one sample a forward, teacher and student both at
full length, losses on the logits of every token, gradient checkpointing. Utilisation (MFU) counts the operations that
the loss needs (each view as long as it is seen, attention within it, logits of rows with a loss; nothing computed
twice, no padding) against the dense bf16 peak. Peak memory leaves out what the other model beside it keeps. Data is
prepared before, as a run prepares it while the step before runs.
"""


def write_report(rows: list[Row], folder: Path | None) -> str:
    """The report as Markdown; with a folder, also ``train.md`` and ``train.png`` in it."""
    if not rows:
        return "no rows\n"
    parts = [_header(rows[0]), METHOD, goal_table(train_goals(rows))]
    parts += [_shape(rows, shape) for shape in shapes_of(rows)]
    text = "\n".join(parts)
    if folder is not None:
        picture = "\n![speed and where the time goes](train.png)\n" if _plot(rows, folder / "train.png") else ""
        (folder / "train.md").write_text(text + picture, encoding="utf-8")
    return text


def _header(row: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    place = f"{row['devices']} x {row['device']}, {row['dtype']}"
    return f"# Training steps\n\n{place}; {versions}; commit {row['commit']}\n"


def _shape(rows: list[Row], shape: str) -> str:
    own = [row for row in rows if row["shape"] == shape]
    first = own[0]
    kinds = ("teacher", "student", "generation")
    tokens = {kind: over_schedule([(r["mask_rate"], r[f"tokens_{kind}"]) for r in own]) for kind in kinds}
    facts = (
        f"{first['layers']} layers; {first['samples']} samples of {first['data']}, tokens of "
        f"{', '.join(f'{kind} {count:,.0f}' for kind, count in tokens.items())}; microbatches of up to "
        f"{first['tokens_per_microbatch']} tokens, recompute {first['recompute']}"
    )
    names = list(dict.fromkeys(row["variant"] for row in own))
    speed = table(
        ["variant", "samples/s", f"x {BASELINE}", "useful tokens/s", "MFU", "peak GiB", "ms a step", "backends", ""],
        [_speed(rows, shape, name) for name in names],
    )
    groups = _groups(own)
    spent = table(["variant, ms of one step", *groups], [_spent(rows, shape, name, groups) for name in names])
    rates = "".join(
        f"| {row['variant']} | {row['mask_rate']:.3f} | {_times(row)} | {_predicted(row)} |\n"
        for row in own
        if row["reason"] is None
    )
    by_rate = f"| variant | mask rate | ms a step | predicted ms, GiB |\n| --- | --- | --- | --- |\n{rates}"
    return f"## {shape}\n\n{facts}.\n\nOver the mask schedule:\n\n{speed}\nWhere it goes:\n\n{spent}\n{by_rate}"


def _speed(rows: list[Row], shape: str, name: str) -> list[str]:
    own = measured(rows, shape, name)
    mean = schedule_ms(rows, shape, name)
    if mean is None:
        reasons = [r["reason"] for r in rows if r["shape"] == shape and r["variant"] == name and r["reason"]]
        return [name, *[""] * 7, "; ".join(dict.fromkeys(reasons))]
    first, against = own[0], schedule_ms(rows, shape, BASELINE)
    useful = over_schedule([(r["mask_rate"], r["useful_tokens_per_second"]) for r in own])
    mfu = [(r["mask_rate"], r["mfu"]) for r in own if r["mfu"] is not None]
    peaks = [r["peak_memory_gib"] for r in own if r["peak_memory_gib"] is not None]
    return [
        name,
        f"{first['samples'] / mean * 1e3:.4g}",
        f"{against / mean:.2f}" if against else "",
        f"{useful:,.0f}",
        f"{over_schedule(mfu):.1%}" if mfu else "",
        f"{max(peaks):.1f}" if peaks else "",
        f"{mean:.4g}",
        ", ".join(f"{part} {value}" for part, value in first["backends"].items()),
        first["note"],
    ]


def _spent(rows: list[Row], shape: str, name: str, groups: list[str]) -> list[str]:
    own = [r for r in measured(rows, shape, name) if r.get("time_ms_by_group")]
    means = [over_schedule([(r["mask_rate"], r["time_ms_by_group"][group]) for r in own]) for group in groups]
    return [name, *("" if mean is None else f"{mean:.4g}" for mean in means)]


def _times(row: Row) -> str:
    return f"{row['step_time_ms_p50']:.4g} ({row['step_time_ms_p20']:.4g}-{row['step_time_ms_p80']:.4g})"


def _predicted(row: Row) -> str:
    if row.get("predicted_step_time_ms") is None:
        return ""
    return f"{row['predicted_step_time_ms']:.4g}, {row['predicted_memory_gib']:.1f}"


def _plot(rows: list[Row], path: Path) -> bool:
    """Speed over the baseline above, stacked time of one step below, a group of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(s, n) for s in shapes_of(rows) for n in dict.fromkeys(r["variant"] for r in rows if r["shape"] == s)]
    bars = [(shape, name) for shape, name in bars if schedule_ms(rows, shape, name)]
    if not bars:
        return False
    figure, axes = pyplot.subplots(2, 1, figsize=(4 + 0.9 * len(bars), 9), layout="constrained", sharex=True)
    labels = [f"{shape}\n{name}" for shape, name in bars]
    means = {bar: schedule_ms(rows, *bar) or 0.0 for bar in bars}
    base = {shape: schedule_ms(rows, shape, BASELINE) or schedule_ms(rows, shape, ENGINE) for shape, _ in bars}
    axes[0].bar(labels, [(base[bar[0]] or means[bar]) / means[bar] for bar in bars])
    axes[0].set_ylabel(f"samples/s over {BASELINE}")
    foot = [0.0] * len(bars)
    for group in _groups(rows):
        heights = [_mean_group(rows, *bar, group) for bar in bars]
        axes[1].bar(labels, heights, bottom=foot, label=group)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    axes[1].set_ylabel("ms of one profiled step")
    axes[1].tick_params(axis="x", labelrotation=90, labelsize="small")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _groups(rows: list[Row]) -> list[str]:
    return list(next((row["time_ms_by_group"] for row in rows if row.get("time_ms_by_group")), {}))


def _mean_group(rows: list[Row], shape: str, name: str, group: str) -> float:
    own: list[Any] = [r for r in measured(rows, shape, name) if r.get("time_ms_by_group")]
    return over_schedule([(r["mask_rate"], r["time_ms_by_group"][group]) for r in own]) or 0.0
