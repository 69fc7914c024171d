"""Rows of ``bench train`` -> figures over the mask schedule, and which goals they show as met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reflectron.tools.bench.goals import JUDGED_ON, Goal
from reflectron.tools.bench.rows import Row
from reflectron.tools.bench.train_plan import BASELINE, ENGINE, SCHEDULE
from reflectron.tools.planner.samples import over_phases

SPEED = 2.5
SPEED_FP8 = 3.5
FP8_OVER_BF16 = 1.4
UTILISATION = 0.55
UTILISATION_SHAPES = ("codellama-7b", "codellama-34b")
BUDGET = 8192
PREDICTION = 0.15


def over_schedule(values: Sequence[tuple[float, float]]) -> float | None:
    """Mean over a run of a number given as (mask rate, number), by the phases' lengths; plain for other rates."""
    by_rate = dict(values)
    if not by_rate:
        return None
    if set(by_rate) == set(SCHEDULE):
        return over_phases([by_rate[rate] for rate in SCHEDULE])
    return sum(by_rate.values()) / len(by_rate)


def measured(rows: Iterable[Row], shape: str, variant: str) -> list[Row]:
    """The rows of a variant that hold times, in the order of measurement."""
    return [r for r in rows if r["shape"] == shape and r["variant"] == variant and r["reason"] is None]


def schedule_ms(rows: Iterable[Row], shape: str, variant: str, key: str = "step_time_ms_p50") -> float | None:
    """Mean time of a step over the mask schedule."""
    return over_schedule([(row["mask_rate"], row[key]) for row in measured(rows, shape, variant)])


def shapes_of(rows: Iterable[Row]) -> list[str]:
    """In the order of measurement."""
    return list(dict.fromkeys(row["shape"] for row in rows))


def fp8_variant(rows: Iterable[Row]) -> str | None:
    """The build of the engine that multiplies in FP8, if there is one."""
    return next((r["variant"] for r in rows if any(word.startswith("model.fp8=") for word in r.get("build", ()))), None)


def train_goals(rows: list[Row]) -> list[Goal]:
    """All goals; judged on the devices that they were set for, each by its worst shape."""
    judged = [row for row in rows if row["dtype"] == "bfloat16" and any(name in row["device"] for name in JUDGED_ON)]
    fp8 = fp8_variant(judged)
    found = [
        _least(f"at least {SPEED}x the samples/s of the reference's way in bf16", _ratios(judged, ENGINE), SPEED),
        _least(f"at least {SPEED_FP8}x in FP8", _ratios(judged, fp8), SPEED_FP8),
        _least(f"FP8 at least {FP8_OVER_BF16}x bf16", _ratios(judged, fp8, ENGINE), FP8_OVER_BF16),
    ]
    for shape in UTILISATION_SHAPES:
        at_budget = [row for row in judged if row["tokens_per_microbatch"] == BUDGET]
        share = over_schedule([(r["mask_rate"], r["mfu"]) for r in measured(at_budget, shape, ENGINE) if r["mfu"]])
        values = [] if share is None else [(share, shape)]
        text = f"bf16 utilisation of at least {UTILISATION:.0%}, {shape} at {BUDGET} tokens"
        found.append(_least(text, values, UTILISATION))
    errors = [
        (abs(row["predicted_step_time_ms"] / row["step_time_ms_p50"] - 1), f"{row['shape']}, {row['variant']}")
        for row in judged
        if row["reason"] is None and row.get("predicted_step_time_ms")
    ]
    text = f"the planner's step time within {PREDICTION:.0%}"
    if not errors:
        return [*found, Goal(text, "", None)]
    error, place = max(errors)
    return [*found, Goal(text, f"{error:.1%} ({place})", error <= PREDICTION)]


def _ratios(rows: list[Row], variant: str | None, to: str = BASELINE) -> list[tuple[float, str]]:
    """How much faster than ``to``, by shape, over the mask schedule."""
    found = []
    for shape in shapes_of(rows) if variant else []:
        mine, theirs = schedule_ms(rows, shape, str(variant)), schedule_ms(rows, shape, to)
        if mine and theirs:
            found.append((theirs / mine, shape))
    return found


def _least(text: str, values: list[tuple[float, str]], limit: float) -> Goal:
    if not values:
        return Goal(text, "", None)
    value, place = min(values)
    return Goal(text, f"{value:.3g} ({place})", value >= limit)
