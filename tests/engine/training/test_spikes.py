"""Which losses stand out."""

from __future__ import annotations

import random
import statistics

import pytest

from reflectron.engine.training.diagnostics import SpikeDetector

GENERATOR = random.Random(0)
LOSSES = [2.0 - 0.001 * step + GENERATOR.gauss(0, 0.05) for step in range(400)]


def test_only_the_outlier_of_a_noisy_curve_is_a_spike() -> None:
    detector = SpikeDetector(window=100, threshold=6.0)
    losses = [*LOSSES[:200], 3.5, *LOSSES[200:]]
    assert [step for step, loss in enumerate(losses) if detector.look(loss)] == [200]


def test_what_it_stands_out_from() -> None:
    detector = SpikeDetector(window=100, threshold=6.0, losses=LOSSES)
    spike = detector.look(9.0)
    assert spike is not None
    assert spike.median == statistics.median(LOSSES[-100:])
    # Gaussian noise of 0.05 around a slope of 0.1 a window.
    assert spike.deviation == pytest.approx(0.05, rel=0.4)


def test_spikes_do_not_raise_the_bar() -> None:
    detector = SpikeDetector(window=100, threshold=6.0, losses=LOSSES)
    assert all(detector.look(3.5) for _ in range(20))


@pytest.mark.parametrize(("losses", "threshold"), [(LOSSES[:19], 6.0), (LOSSES, 0.0)])
def test_too_few_losses_or_no_threshold(losses: list[float], threshold: float) -> None:
    assert SpikeDetector(100, threshold, losses).look(100.0) is None


def test_a_loss_that_does_not_vary_has_a_deviation() -> None:
    detector = SpikeDetector(100, 6.0, [1.0] * 50)
    assert detector.look(1.02) is None
    assert detector.look(1.04) is not None
