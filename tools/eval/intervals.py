"""What several runs passed of the same tasks comes in, shares and differences with 95 % intervals go out.

Tasks and seeds are both samples: other tasks could have been asked, other seeds trained. The variance of a mean is the
sum of its variances over tasks and over seeds, in which chance that belongs to neither counts twice, so intervals err
on the wide side. Few seeds say little about their spread, hence Student's t with Satterthwaite's degrees of freedom.
With one seed nothing is known of it, and an interval speaks of tasks alone.

S seeds, T tasks; a matrix [S, T] holds 1 where a run passed a task, else 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_TWO_SIDED = 0.975


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


def share(passed: np.ndarray) -> Estimate:
    """Share of tasks passed, by Wilson's interval for as many tasks as would have this variance without seeds.

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
    """Share of tasks passed, less the baseline's: paired by seed and task.

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
    """Variance of the mean of ``values`` [S, T], and the quantile that a 95 % interval takes."""
    from scipy import stats

    seeds, tasks = values.shape
    over_tasks = float(values.mean(axis=0).var()) / tasks
    over_seeds = float(values.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    if over_seeds == 0:
        return over_tasks, float(stats.norm.ppf(_TWO_SIDED))
    freedom = (seeds - 1) * (1 + over_tasks / over_seeds) ** 2
    return over_tasks + over_seeds, float(stats.t.ppf(_TWO_SIDED, freedom))
