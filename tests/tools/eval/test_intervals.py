"""Intervals: known formulas where they apply, and the promised coverage where tasks and seeds both vary."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from reflectron.tools.eval.report import difference, share

Z = 1.959963984540054


@pytest.mark.parametrize(("passed", "tasks"), [(0, 164), (1, 20), (70, 164), (20, 20)])
def test_with_one_seed_a_share_has_wilsons_interval(passed: int, tasks: int) -> None:
    found = share(np.array([[1] * passed + [0] * (tasks - passed)]))
    wilson = stats.binomtest(passed, tasks).proportion_ci(method="wilson")
    assert found.value == passed / tasks
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))


def test_equal_seeds_add_no_evidence() -> None:
    once = np.array([[1, 0, 0, 1, 0, 1, 1, 1]])
    assert share(np.repeat(once, 3, axis=0)) == share(once)


def test_seeds_that_differ_widen_an_interval() -> None:
    # Means of the two seeds: 3/4 and 1/4; of the tasks: 1, 1/2, 1/2, 0.
    passed = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    over_tasks, over_seeds = (1 / 8) / 4, (1 / 8) / 2
    quantile = stats.t.ppf(0.975, (1 + over_tasks / over_seeds) ** 2)
    effective = 0.25 / (over_tasks + over_seeds)
    # Wilson's interval at one half.
    half = 0.5 * quantile / math.sqrt(effective + quantile**2)
    found = share(passed)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_with_one_seed_a_difference_has_bonetts_and_prices_interval() -> None:
    # Of 20 tasks 5 only the one passes, 2 only the other.
    ours = np.array([[1] * 5 + [0] * 2 + [1] * 13])
    theirs = np.array([[0] * 5 + [1] * 2 + [1] * 13])
    found = difference(ours, theirs)
    only_ours, only_theirs = 6 / 22, 3 / 22
    middle = only_ours - only_theirs
    half = Z * math.sqrt((only_ours + only_theirs - middle**2) / 22)
    assert (found.value, found.low, found.high) == pytest.approx((3 / 20, middle - half, middle + half))


def test_runs_that_agree_are_not_proven_equal() -> None:
    same = np.array([[1, 0, 1, 1]] * 3)
    found = difference(same, same)
    assert found.value == 0
    assert found.low == pytest.approx(-found.high)
    assert found.high > 0.2


@pytest.mark.parametrize(
    ("seeds", "tasks", "level", "spread_of_tasks", "spread_of_seeds"),
    [(3, 164, 0.0, 3.0, 0.1), (3, 164, -5.0, 1.5, 0.2), (3, 164, 0.0, 3.0, 0.4), (5, 50, 0.0, 2.0, 0.2)],
)
def test_coverage(seeds: int, tasks: int, level: float, spread_of_tasks: float, spread_of_seeds: float) -> None:
    """Tasks of different difficulty, seeds of different luck: 95 % intervals hold the truth that often at least."""
    random = np.random.default_rng(0)
    effect, trials = 0.5, 400

    def passed(difficulty: np.ndarray, shift: float) -> np.ndarray:
        luck = random.normal(0, spread_of_seeds, (seeds, 1))
        return random.random((seeds, tasks)) < 1 / (1 + np.exp(-(difficulty + shift + luck)))

    def truth(shift: float) -> float:
        spread = math.hypot(spread_of_tasks, spread_of_seeds)
        logits = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000, level + shift, spread)
        return float(np.mean(1 / (1 + np.exp(-logits))))

    shares = truth(effect), truth(0.0)
    held = np.zeros(2)
    for _ in range(trials):
        difficulty = random.normal(level, spread_of_tasks, tasks)
        ours, theirs = passed(difficulty, effect), passed(difficulty, 0.0)
        one, both = share(ours), difference(ours, theirs)
        held += [one.low <= shares[0] <= one.high, both.low <= shares[0] - shares[1] <= both.high]
    # Two standard deviations of 400 trials below 95 %.
    assert (held / trials >= 0.928).all(), held / trials
