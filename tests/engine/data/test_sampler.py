"""Sample order: a function of seed and epoch alone, with exact repeats and access to any step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from reflectron.engine.data.sampler import Draws, SampleOrder, SampleRef, mask_draws


def make(repeat: Sequence[float], samples: Sequence[int], seed: int) -> SampleOrder:
    """An order of files with so many samples."""
    return SampleOrder(repeat, np.repeat(np.arange(len(samples)), samples), seed)


def stream(order: SampleOrder, batch_size: int, samples: int) -> list[SampleRef]:
    refs: list[SampleRef] = []
    for step in range(-(-samples // batch_size)):
        refs += order.global_batch(step, batch_size)
    return refs[:samples]


def test_whole_repeats_list_every_sample_in_every_epoch() -> None:
    order = make([1.0, 2.0], [5, 3], seed=3407)
    assert order.epoch_length(0) == order.epoch_length(7) == 11
    refs = stream(order, 4, 33)
    for epoch in range(3):
        listed = [r for r in refs if r.epoch == epoch]
        assert refs[11 * epoch : 11 * (epoch + 1)] == listed
        assert Counter(r.sample for r in listed) == {**dict.fromkeys(range(5), 1), **dict.fromkeys(range(5, 8), 2)}
        assert len(set(listed)) == 11
        assert {r.occurrence for r in listed} == {0, 1}


def test_order_does_not_depend_on_batch_size_or_on_what_was_read_before() -> None:
    repeat, samples = [1.0, 0.4, 2.5, 1.3], [10, 10, 10, 5]
    one_by_one = stream(make(repeat, samples, seed=1), 1, 300)
    assert all(stream(make(repeat, samples, seed=1), size, 300) == one_by_one for size in (7, 64, 300))
    resumed = make(repeat, samples, seed=1)
    assert [resumed.global_batch(step, 7) for step in (40, 3, 21)] == [
        one_by_one[7 * step : 7 * step + 7] for step in (40, 3, 21)
    ]


def test_order_differs_between_epochs_and_seeds() -> None:
    first, second = (stream(make([1.0], [50], seed), 50, 100) for seed in (1, 2))
    samples = [[r.sample for r in refs] for refs in (first[:50], first[50:], second[:50])]
    assert sorted(samples[0]) == sorted(samples[1]) == sorted(samples[2])
    assert samples[0] != samples[1] != samples[2] != samples[0]


def test_order_is_pinned() -> None:
    """A recorded order: a change here changes every run that is resumed."""
    batch = make([1.0, 1.5, 2.0], [3, 2, 1], seed=3407).global_batch(0, 10)
    assert [(r.epoch, r.sample, r.occurrence) for r in batch] == [
        (0, 4, 1),
        (0, 5, 0),
        (0, 4, 0),
        (0, 3, 0),
        (0, 5, 1),
        (0, 2, 0),
        (0, 1, 0),
        (0, 0, 0),
        (1, 4, 0),
        (1, 5, 1),
    ]


@pytest.mark.parametrize("repeat", [0.1, 0.29, 0.7, 1.3, 2.5])
def test_a_fractional_repeat_is_exact_over_epochs_and_drawn_anew(repeat: float) -> None:
    n, epochs = 33, 40
    order = make([repeat], [n], seed=5)
    refs = stream(order, 100, sum(order.epoch_length(e) for e in range(epochs)))
    assert abs(len(refs) - repeat * n * epochs) <= 0.5
    by_epoch = [Counter(r.sample for r in refs if r.epoch == epoch) for epoch in range(epochs)]
    for listed in by_epoch:
        assert set(listed.values()) <= {int(repeat), int(repeat) + 1}
        assert abs(listed.total() - repeat * n) <= 1
    drawn = [frozenset(s for s, times in listed.items() if times > int(repeat)) for listed in by_epoch]
    assert len(set(drawn)) > 30
    # Each sample's listings are a sum of 40 draws: six standard deviations around the mean.
    share = repeat - int(repeat)
    extra = np.array([sum(s in d for d in drawn) for s in range(n)])
    assert np.all(np.abs(extra - epochs * share) < 6 * np.sqrt(epochs * share * (1 - share)))


def test_files_with_different_fractions_keep_their_own_shares() -> None:
    order = make([0.5, 0.2, 1.0], [10, 10, 4], seed=0)
    listed = [r.sample for r in stream(order, 11, order.epoch_length(0))]
    assert [sum(lo <= s < hi for s in listed) for lo, hi in ((0, 10), (10, 20), (20, 24))] == [5, 2, 4]


def test_the_last_batch_of_a_run_is_smaller_and_never_runs_past_the_end() -> None:
    order = make([1.0], [10], seed=0)
    assert [order.total_samples(epochs) for epochs in (1, 2, 1.5, 0.25, 0.001)] == [10, 20, 15, 3, 1]
    assert [order.total_steps(epochs, 4) for epochs in (1, 2, 1.5, 0.25)] == [3, 5, 4, 1]
    batches = [order.global_batch(step, 4, epochs=1.5) for step in range(order.total_steps(1.5, 4))]
    assert [len(b) for b in batches] == [4, 4, 4, 3]
    assert [ref for batch in batches for ref in batch] == stream(order, 4, 15)


def test_a_batch_larger_than_the_data_takes_several_epochs() -> None:
    batch = make([1.0, 0.4], [1, 1], seed=0).global_batch(3, 7)
    assert len(batch) == 7
    assert len({r.epoch for r in batch}) >= 5


def test_a_fraction_is_drawn_from_each_file_alone() -> None:
    """Files of the same fraction keep a share each, and another file changes nothing of what the first one gives."""

    def listed(order: SampleOrder, epoch: int) -> list[set[int]]:
        refs = [r for r in stream(order, 7, order.total_samples(epoch + 1)) if r.epoch == epoch]
        return [{r.sample for r in refs if lo <= r.sample < lo + 40} for lo in (0, 40, 80)]

    alone, two = make([0.25], [40], seed=2), make([0.25, 0.25], [40, 40], seed=2)
    three = make([0.25, 0.25, 0.5], [40, 40, 40], seed=2)
    for epoch in range(4):
        first, second, third = listed(three, epoch)
        assert (len(first), len(second), len(third)) == (10, 10, 20)
        assert listed(two, epoch) == [first, second, set()]
        assert listed(alone, epoch) == [first, set(), set()]
        assert {sample - 40 for sample in second} != first


def test_mask_draws_are_keyed_by_the_listing() -> None:
    refs = [SampleRef(e, s, o) for e in range(3) for s in range(3) for o in range(3)]
    draws = {int(mask_draws(seed, ref).bits(1)[0]) for seed in (0, 1) for ref in refs}
    assert len(draws) == 2 * len(refs)
    assert mask_draws(0, refs[5]).bits(4).tolist() == mask_draws(0, refs[5]).bits(4).tolist()


def splitmix64(state: int, count: int) -> list[int]:
    """The published algorithm, number after number."""
    numbers, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


def test_draws_are_pinned() -> None:
    """Recorded numbers: no library's update changes them. A change here needs another DRAWS_VERSION."""
    # The first numbers of SplitMix64 with seed 1234567, as published with it.
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    draws = Draws(3407, 2, 0, 5, 1)
    assert draws.bits(3).tolist() == splitmix64(draws._state, 3)
    assert draws.bits(3).tolist() == [1081752488432412722, 15324621369260199637, 2296428400794985468]
    assert draws.order(8).tolist() == [0, 2, 5, 4, 1, 3, 7, 6]
    assert Draws(2**70 + 1).bits(1).tolist() == [8417394503571518923]


def test_draws_of_different_keys_differ() -> None:
    keys = [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (2**64, 0), (0, 2**64), (1, 1), (2**64 + 1,)]
    assert len({int(Draws(*key).bits(1)[0]) for key in keys}) == len(keys)


def test_draws_are_uniform() -> None:
    """Each of 6 places holds each number equally often: six standard deviations around the mean of 4000 orders."""
    orders = np.array([Draws(9, i).order(6) for i in range(4000)])
    counts = np.array([np.bincount(orders[:, place], minlength=6) for place in range(6)])
    assert np.all(np.abs(counts - 4000 / 6) < 6 * np.sqrt(4000 / 6 * 5 / 6))
