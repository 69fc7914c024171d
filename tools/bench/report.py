"""Pages of rows: tables, pictures and verdicts on the goals of ``bench head`` and ``bench train``.

Nothing in a page is not in a row, so that a page can be made again from its rows. A goal is judged by the worst case
that was measured, and speed and memory only on the devices that their goals were set for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reflectron.tools.bench.harness import (
    Goal,
    Row,
    by_key,
    goal_table,
    is_judged,
    judge,
    quantities,
    table,
    title,
)
from reflectron.tools.bench.head_providers import FLOOR, OURS
from reflectron.tools.planner.samples import PHASES, over_phases

# ---- the head ----

HEAD_SPEED = {"orda": 1.15, "liger": 2.5, "eager": 1.6, "compile": 1.3}
"""How much longer a peer takes, at least."""
FLOOR_RATIO = {8192: 1.10, 4096: 1.15}
"""How much longer than the three matrix products the head takes, at most, by d."""
EXTRA_MEMORY_MIB = 0.6e9 / 2**20  # at 8192 pairs, d 8192, V 32016
ERROR_RATIO = 1.2  # to torch on fp32 logits in the same precision
ERRORS = {
    "error_grad_teacher": "dH teacher",
    "error_grad_student": "dH student",
    "kl_error_grad_student": "dH student, KL alone",
    "error_grad_weight": "dW",
}
HEAD_METHOD = f"""\
Loss: mean CE(teacher) + mean CE(student) + mean KL(teacher || student) of N pairs on one bf16 output matrix, hence
R = 2N rows; `full` is forward and backward, `forward` the loss alone. Times are medians, in brackets the 20 and 80 per
cent quantiles, over rounds that call every provider once, each time another one first; ratios are formed within a
round. `/ {FLOOR}` divides by the matrix products alone (logits, and for `full` dH and dW), `TFLOP/s` counts their
6 R V d or 2 R V d. Extra memory is the peak beyond inputs and returned gradients. Errors are relative, in the Frobenius
norm, to fp64 from the same bf16 numbers, on up to 512 rows of each gradient; `KL alone` is a call of its own without
cross entropies, which would hide it. A shard `V/4` is measured alone, as if it were the whole vocabulary, its
statistics merged as in a group of one: no communication is in its time.
"""


def where(row: Row) -> str:
    """Return the case of a row, for a reader."""
    shard = "" if row["tp"] == 1 else f"/{row['tp']}"
    return f"d {row['d']}, V {row['vocab']}{shard}, {row['pairs']} pairs, {row['teacher']} teacher"


def head_goals(rows: list[Row]) -> list[Goal]:
    """Judge all goals: speed and memory on the devices they were set for, the errors on any."""
    full = [row for row in rows if row["mode"] == "full" and row["p50"] is not None]
    judged = [row for row in full if is_judged(row)]

    def select(provider: str, metric: str, **case: object) -> Iterator[tuple[float, str]]:
        wanted = {"provider": provider, "metric": metric, "tp": 1} | case
        return ((row["p50"], where(row)) for row in judged if all(row.get(k) == v for k, v in wanted.items()))

    found = []
    for d, limit in FLOOR_RATIO.items():
        text = f"time at most {limit:.2f}x the three matrix products at d {d}"
        found.append(judge(text, select(OURS, f"time_over_{FLOOR}", d=d), limit, most=True, form="{:.3g}x"))
    for peer, limit in HEAD_SPEED.items():
        text = f"at least {limit}x as fast as {peer}"
        found.append(judge(text, select(peer, f"time_over_{OURS}"), limit, most=False, form="{:.3g}x"))
    memory = select(OURS, "extra_memory", pairs=8192, d=8192, vocab=32016, teacher="near")
    text = "extra memory under 0.6 GB at 8192 pairs, d 8192, V 32016"
    found.append(judge(text, memory, EXTRA_MEMORY_MIB, most=True, form="{:.3g} MiB"))
    text = f"gradient errors at most {ERROR_RATIO}x those of torch on fp32 logits"
    return [*found, judge(text, _error_ratios(full), ERROR_RATIO, most=True, form="{:.3g}x")]


def _error_ratios(rows: list[Row]) -> Iterator[tuple[float, str]]:
    measured = [row for row in rows if "error_grad" in row["metric"]]
    eager = {(where(row), row["metric"]): row["p50"] for row in measured if row["provider"] == "eager"}
    for row in measured:
        yardstick = eager.get((where(row), row["metric"]))
        if row["provider"] == OURS and yardstick:
            yield row["p50"] / yardstick, f"{row['metric']}, {where(row)}"


def write_head_report(rows: list[Row], folder: Path | None) -> str:
    """Return the report as Markdown; with a folder, also write ``head.md`` and ``head.png`` into it."""
    head = title("Distillation head", rows[0]) if rows else "# Distillation head\n"
    parts = [head, HEAD_METHOD, goal_table(head_goals(rows)), _head_notes(rows), *_head_sections(rows)]
    return save_page(folder, "head", parts, partial(_plot_head, rows), "times and errors")


def _head_notes(rows: list[Row]) -> str:
    """Say what each provider cannot do, and why one is missing altogether."""
    notes = {row["provider"]: row["note"] for row in rows if row["note"]}
    missing = {row["provider"]: row["reason"] for row in rows if "d" not in row}
    return table(["provider", "note"], [[name, note] for name, note in (notes | missing).items()])


def _head_sections(rows: list[Row]) -> Iterator[str]:
    """Yield a section for each case, in the order of measurement."""
    header = ["provider", "mode", "ms", f"/ {FLOOR}", f"/ {OURS}", "TFLOP/s", "extra MiB", *ERRORS.values(), ""]
    for group in by_key([row for row in rows if "d" in row], "d", "vocab", "tp", "pairs", "teacher").values():
        cells = {(row["provider"], row["mode"], row["metric"]): row for row in group}
        kl, clock = (quantities(cells.get(key)) for key in (("float64", "full", "kl"), ("gpu", "full", "sm_clock")))
        providers = list(dict.fromkeys([FLOOR, OURS, *(row["provider"] for row in group)]))
        keys = {(row["provider"], row["mode"]) for row in group if row["provider"] not in ("float64", "gpu")}
        order = sorted(keys, key=lambda key: (providers.index(key[0]), key[1] != "full"))
        facts = [f"KL {kl} nats"] * bool(kl) + [f"SM clock {clock} MHz"] * bool(clock)
        lines = [_head_line(cells, *key) for key in order]
        yield f"## {where(group[0])}\n\n{', '.join(facts)}\n\n{table(header, lines)}"


def _head_line(cells: dict[tuple[str, str, str], Row], provider: str, mode: str) -> list[str]:
    def cell(metric: str, spread: bool = False) -> str:
        return quantities(cells.get((provider, mode, metric)), spread)

    metrics = [cell("throughput"), cell("extra_memory"), *map(cell, ERRORS)]
    times = [cell(metric, True) for metric in ("time", f"time_over_{FLOOR}", f"time_over_{OURS}")]
    reasons = [row["reason"] for key, row in cells.items() if key[:2] == (provider, mode) and row["reason"]]
    return [provider, mode, *times, *metrics, "; ".join(dict.fromkeys(reasons))]


def _plot_head(rows: list[Row], path: Path) -> bool:
    """Draw ratios to the floor above, errors of the divergence's gradient below; whether there was something to."""
    whole = [row for row in rows if row.get("tp") == 1 and row["mode"] == "full" and row["p50"] is not None]
    shown = {f"time_over_{FLOOR}": f"time / {FLOOR}", "kl_error_grad_student": "relative error of dH student, KL alone"}
    drawn = [(label, own) for metric, label in shown.items() if (own := [r for r in whole if r["metric"] == metric])]
    if not drawn:
        return False
    widest = max(len({where(row) for row in own}) for _, own in drawn)
    figure, axes = panels(len(drawn), 4 + 1.1 * widest, 5 * len(drawn))
    for axis, (label, own) in zip(axes, drawn, strict=True):
        axis.set_ylabel(label)
        if own[0]["unit"] == "relative":
            axis.set_yscale("log")
            axis.set_ylim(1e-4, 1)  # alike in every plot; bars on a logarithmic scale have no natural foot
        _head_bars(axis, own)
    save_picture(figure, path)
    return True


def _head_bars(axis: Any, rows: list[Row]) -> None:
    """Draw a group of bars a case, a colour a provider, a whisker from the 20 to the 80 per cent quantile."""
    cases = list(dict.fromkeys(map(where, rows)))
    by_provider = by_key(rows, "provider")
    width = 0.8 / len(by_provider)
    for index, ((name,), own) in enumerate(by_provider.items()):
        places = [cases.index(where(row)) + (index - (len(by_provider) - 1) / 2) * width for row in own]
        whiskers = [[row["p50"] - row["p20"] for row in own], [row["p80"] - row["p50"] for row in own]]
        axis.bar(places, [row["p50"] for row in own], width, yerr=whiskers, label=name)
    axis.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases], fontsize="x-small")
    axis.legend(fontsize="small")


# ---- training steps ----

BASELINE = "hf_reference"
ENGINE = "engine"
SCHEDULE = tuple((low + high) / 2 for low, high in PHASES)
"""Mask rates that stand for a whole run: the middle of each of its phases, which are equally long."""
TRAIN_SPEED = 2.5
SPEED_FP8 = 3.5
FP8_OVER_BF16 = 1.4
UTILISATION = 0.55
UTILISATION_SHAPES = ("codellama-7b", "codellama-34b")
BUDGET = 8192
PREDICTION = 0.15
TRAIN_METHOD = """\
A step is an optimizer step on the same samples with the same weights: forward, backward, clipping, AdamW. Learning rate
0 leaves the weights alone, so all variants compute the same loss and gradient norm, which the rows hold. Times are
medians over rounds that run every variant once, each time another one first; in brackets the 20 and 80 per cent
quantiles. `hf_reference` is the reference's way: transformers' Llama, one sample a forward, teacher and student both at
full length, losses on the logits of every token, gradient checkpointing. Utilisation (MFU) counts the operations that
the loss needs (each view as long as it is seen, attention within it, logits of rows with a loss; nothing computed
twice, no padding) against the dense bf16 peak. Peak memory leaves out what the other model beside it keeps. Data is
prepared before, as a run prepares it while the step before runs.
"""


def over_schedule(values: Sequence[tuple[float, float]]) -> float | None:
    """Return the mean over a run of a number given as (mask rate, number), by the phases' lengths; plain for others."""
    by_rate = dict(values)
    if not by_rate:
        return None
    if set(by_rate) == set(SCHEDULE):
        return over_phases([by_rate[rate] for rate in SCHEDULE])
    return sum(by_rate.values()) / len(by_rate)


def measured(rows: Iterable[Row], shape: str, variant: str | None) -> list[Row]:
    """Return the rows of a variant that hold times, in the order of measurement."""
    return [r for r in rows if r["shape"] == shape and r["variant"] == variant and r["reason"] is None]


def _mean(rows: Iterable[Row], key: str) -> float | None:
    """Return the mean of a number over the mask schedule, of the rows that have it."""
    return over_schedule([(row["mask_rate"], row[key]) for row in rows if row.get(key) is not None])


def _ms(rows: Iterable[Row], shape: str, variant: str | None) -> float | None:
    return _mean(measured(rows, shape, variant), "p50")


def _shapes(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["shape"] for row in rows))


def train_goals(rows: list[Row]) -> list[Goal]:
    """Judge all goals, each by its worst shape."""
    judged = [row for row in rows if row["dtype"] == "bfloat16" and is_judged(row)]
    # The build of the engine that multiplies in FP8, if there is one.
    built = (row["variant"] for row in judged if any(word.startswith("model.fp8=") for word in row["build"]))
    fp8 = next(built, None)

    def ratios(variant: str | None, to: str) -> Iterator[tuple[float, str]]:
        for shape in _shapes(judged):
            mine, theirs = _ms(judged, shape, variant), _ms(judged, shape, to)
            if mine and theirs:
                yield theirs / mine, shape

    text = f"at least {TRAIN_SPEED}x the samples/s of the reference's way in bf16"
    found = [
        judge(text, ratios(ENGINE, BASELINE), TRAIN_SPEED, most=False),
        judge(f"at least {SPEED_FP8}x in FP8", ratios(fp8, BASELINE), SPEED_FP8, most=False),
        judge(f"FP8 at least {FP8_OVER_BF16}x bf16", ratios(fp8, ENGINE), FP8_OVER_BF16, most=False),
    ]
    at_budget = [row for row in judged if row["tokens_per_microbatch"] == BUDGET]
    for shape in UTILISATION_SHAPES:
        share = _mean(measured(at_budget, shape, ENGINE), "mfu")
        text = f"bf16 utilisation of at least {UTILISATION:.0%}, {shape} at {BUDGET} tokens"
        found.append(judge(text, [] if share is None else [(share, shape)], UTILISATION, most=False))
    errors = (
        (abs(row["predicted_step_time_ms"] / row["p50"] - 1), f"{row['shape']}, {row['variant']}")
        for row in judged
        if row["reason"] is None and row.get("predicted_step_time_ms")
    )
    text = f"the planner's step time within {PREDICTION:.0%}"
    return [*found, judge(text, errors, PREDICTION, most=True, form="{:.1%}")]


def write_train_report(rows: list[Row], folder: Path | None) -> str:
    """Return the report as Markdown; with a folder, also write ``train.md`` and ``train.png`` into it."""
    if not rows:
        return "no rows\n"
    row = rows[0]
    parts = [title("Training steps", row | {"device": f"{row['devices']} x {row['device']}, {row['dtype']}"})]
    parts += [TRAIN_METHOD, goal_table(train_goals(rows)), *(_shape_section(rows, shape) for shape in _shapes(rows))]
    return save_page(folder, "train", parts, partial(_plot_train, rows), "speed and where the time goes")


def _shape_section(rows: list[Row], shape: str) -> str:
    own = [row for row in rows if row["shape"] == shape]
    first = own[0]
    tokens = ", ".join(f"{kind} {_mean(own, f'tokens_{kind}'):,.0f}" for kind in ("teacher", "student", "generation"))
    facts = (
        f"{first['layers']} layers; {first['samples']} samples of {first['data']}, tokens of {tokens}; microbatches of "
        f"up to {first['tokens_per_microbatch']} tokens, recompute {first['recompute']}"
    )
    names = list(dict.fromkeys(row["variant"] for row in own))
    groups = _groups(own)
    speed = table(
        ["variant", "samples/s", f"x {BASELINE}", "useful tokens/s", "MFU", "peak GiB", "ms a step", "backends", ""],
        [_speed_line(own, shape, name) for name in names],
    )
    spent = table(
        ["variant, ms of one step", *groups],
        [[name, *(f"{ms:.4g}" for ms in _spent(own, shape, name, groups))] for name in names],
    )
    by_rate = table(
        ["variant", "mask rate", "ms a step", "predicted ms, GiB"],
        [
            [row["variant"], f"{row['mask_rate']:.3f}", quantities(row, True), _predicted(row)]
            for row in own
            if row["reason"] is None
        ],
    )
    return f"## {shape}\n\n{facts}.\n\nOver the mask schedule:\n\n{speed}\nWhere it goes:\n\n{spent}\n{by_rate}"


def _speed_line(rows: list[Row], shape: str, name: str) -> list[str]:
    own, mean = measured(rows, shape, name), _ms(rows, shape, name)
    if mean is None:
        reasons = [row["reason"] for row in rows if row["variant"] == name and row["reason"]]
        return [name, *[""] * 7, "; ".join(dict.fromkeys(reasons))]
    first, against = own[0], _ms(rows, shape, BASELINE)
    mfu, peaks = _mean(own, "mfu"), [r["peak_memory_gib"] for r in own if r["peak_memory_gib"] is not None]
    return [
        name,
        f"{first['samples'] / mean * 1e3:.4g}",
        f"{against / mean:.2f}" if against else "",
        f"{_mean(own, 'useful_tokens_per_second'):,.0f}",
        "" if mfu is None else f"{mfu:.1%}",
        f"{max(peaks):.1f}" if peaks else "",
        f"{mean:.4g}",
        ", ".join(f"{part} {value}" for part, value in first["backends"].items()),
        first["note"],
    ]


def _groups(rows: list[Row]) -> list[str]:
    return list(next((row["time_ms_by_group"] for row in rows if row.get("time_ms_by_group")), {}))


def _spent(rows: list[Row], shape: str, name: str, groups: list[str]) -> list[float]:
    """Return the mean milliseconds of each group over the mask schedule; nothing where no profile succeeded."""
    own = [r for r in measured(rows, shape, name) if r.get("time_ms_by_group")]
    return [_mean([r | r["time_ms_by_group"] for r in own], group) or 0.0 for group in groups] if own else []


def _predicted(row: Row) -> str:
    if row.get("predicted_step_time_ms") is None:
        return ""
    return f"{row['predicted_step_time_ms']:.4g}, {row['predicted_memory_gib']:.1f}"


def _plot_train(rows: list[Row], path: Path) -> bool:
    """Draw speed over the baseline above, stacked time of one step below, a bar a variant of a shape."""
    means = {key: ms for key in by_key(rows, "shape", "variant") if (ms := _ms(rows, *key))}
    if not means:
        return False
    figure, (speed, spent) = panels(2, 4 + 0.9 * len(means), 9)
    labels = [f"{shape}\n{name}" for shape, name in means]
    bases = {shape: _ms(rows, shape, BASELINE) or _ms(rows, shape, ENGINE) for shape, _ in means}
    speed.bar(labels, [(bases[key[0]] or ms) / ms for key, ms in means.items()])
    speed.set_ylabel(f"samples/s over {BASELINE}")
    speed.tick_params(axis="x", labelbottom=False)
    groups, foot = _groups(rows), [0.0] * len(means)
    by_bar = [_spent(rows, shape, name, groups) or [0.0] * len(groups) for shape, name in means]
    for index, group in enumerate(groups):
        heights = [bar[index] for bar in by_bar]
        spent.bar(labels, heights, bottom=foot, label=group)
        foot = [low + height for low, height in zip(foot, heights, strict=True)]
    spent.set_ylabel("ms of one profiled step")
    spent.tick_params(axis="x", labelrotation=90, labelsize="small")
    spent.legend(fontsize="small")
    save_picture(figure, path)
    return True


# ---- pages and pictures ----


def save_page(folder: Path | None, name: str, parts: Iterable[str], plot: Callable[[Path], bool], alt: str) -> str:
    """Return a page as Markdown; with a folder, also write it into ``<name>.md`` and its picture into ``<name>.png``.

    ``plot`` draws the picture, and returns whether there was something to draw.
    """
    text = "\n".join(parts)
    if folder is not None:
        picture = f"\n![{alt}]({name}.png)\n" if plot(folder / f"{name}.png") else ""
        (folder / f"{name}.md").write_text(text + picture, encoding="utf-8")
    return text


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` axes, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(count, 1, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[:, 0]:
        axis.grid(axis="y", alpha=0.3)
    return figure, list(axes[:, 0])


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure and let go of it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
