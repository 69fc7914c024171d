"""Packing: what every plan must satisfy, on random batches, and what it must reach on lengths like the papers'."""

from __future__ import annotations

import itertools
import statistics
import time

import numpy as np
import pytest

from reflectron.engine.data.packing import CostModel, PackPlan, plan_packs

# Training a 7B Llama: 32 layers, hidden 4096, vocabulary 32,000.
COST_7B = CostModel(per_token=3 * 1.3e10, per_token_squared=3 * 32 * 2 * 4096.0, per_row=3 * 2 * 4096 * 32000.0)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def paper_like_batch(seed: int, n: int = 512) -> Batch:
    """78 % generation samples of about 790 tokens; 22 % reflection samples of about 2400, the student sees 25-90 %."""
    rng = np.random.default_rng(seed)
    reflection = rng.random(n) < 0.22
    generation_length = np.clip(rng.lognormal(np.log(790) - 0.1, 0.45, n), 200, 2000).astype(np.int32)
    reflection_length = np.clip(rng.normal(2400, 750, n), 600, 4096).astype(np.int32)
    visible = np.clip(rng.normal(rng.choice([0.25, 0.4, 0.6, 0.9]), 0.08, n), 0.25, 0.9)
    teacher = np.where(reflection, reflection_length, generation_length)
    student = np.where(reflection, (reflection_length * visible).astype(np.int32), 0)
    return teacher, student, (0.7 * teacher).astype(np.int32) + np.where(reflection, 700, 0)


def random_batch(rng: np.random.Generator, budget: int) -> Batch:
    n = int(rng.integers(1, 40))
    teacher = rng.integers(1, budget // 2 + 1, n)
    student = np.where(rng.random(n) < 0.5, rng.integers(0, budget // 2 + 1, n), 0)
    return teacher, student, rng.integers(1, teacher + student + 1)


def plan(batch: Batch, budget: int = 8192, ranks: int = 1, multiple: int = 64, cost: CostModel = COST_7B) -> PackPlan:
    return plan_packs(
        *batch, tokens_per_microbatch=budget, data_parallel_size=ranks, cost=cost, pad_to_multiple=multiple
    )


def unpadded(batch: Batch) -> np.ndarray:
    """FLOPs of each sample's attention and output layer, which padding does not change: [n]."""
    teacher, student, rows = (x.astype(np.float64) for x in batch)
    return COST_7B.per_token_squared * (teacher**2 + student**2) + COST_7B.per_row * rows


def loads(plan: PackPlan, batch: Batch) -> np.ndarray:
    """FLOPs of each microbatch as it runs, padding included: [rank, microbatch]."""
    flops, linear = unpadded(batch), COST_7B.per_token * plan.sequence_length
    return np.array([[linear + flops[list(m)].sum() for m in rank] for rank in plan.microbatches])


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_is_complete_within_the_budget_and_equal_on_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    multiple, ranks = int(rng.choice([1, 8, 64])), int(rng.choice([1, 2, 3, 8]))
    batch = random_batch(rng, budget := 1024)
    result = plan(batch, budget, ranks, multiple)

    tokens = batch[0] + batch[1]
    microbatches = list(itertools.chain(*result.microbatches))
    sums = [int(tokens[list(m)].sum()) for m in microbatches]
    assert sorted(itertools.chain(*microbatches)) == list(range(len(tokens)))
    assert all(list(m) == sorted(m) for m in microbatches)
    assert len(result.microbatches) == ranks
    assert len({len(rank) for rank in result.microbatches}) == 1
    assert max(sums) <= result.sequence_length <= budget
    assert result.sequence_length % multiple == 0
    assert result.sequence_length - max(sums) < multiple
    assert result.fill == pytest.approx(tokens.sum() / (result.sequence_length * len(microbatches)))
    assert sum(not m for m in microbatches) == max(0, len(microbatches) - len(tokens))
    assert result == plan(tuple(x.copy() for x in batch), budget, ranks, multiple)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_fill_and_balance_on_lengths_like_the_papers(ranks: int) -> None:
    for seed in range(5):
        batch = paper_like_batch(seed)
        result = plan(batch, ranks=ranks)
        tokens = batch[0] + batch[1]
        # Nothing can be shorter than the largest sample, and k cannot be less than a multiple of the ranks: with few
        # microbatches a rank, that alone may leave space.
        assert result.fill >= 0.97 or (ranks > 4 and result.sequence_length - tokens.max() < 64)
        flops = loads(result, batch)
        heaviest_sample = COST_7B.per_token * result.sequence_length + unpadded(batch).max()
        assert flops.max() < 1.01 * max(flops.mean(), heaviest_sample)
        assert flops.sum(1).max() < 1.0005 * flops.sum(1).mean()


def test_number_of_microbatches_is_the_smallest_that_fits() -> None:
    for seed, ranks in itertools.product(range(3), (2, 4, 8)):
        batch = paper_like_batch(seed)
        result = plan(batch, ranks=ranks)
        count = sum(len(rank) for rank in result.microbatches)
        assert count == -(-int((batch[0] + batch[1]).sum()) // (8192 * ranks)) * ranks


@pytest.mark.parametrize(("ranks", "group"), [(1, 4), (2, 4), (4, 3)])
def test_an_interleaved_pipeline_gets_whole_groups_of_microbatches(ranks: int, group: int) -> None:
    """The same tokens in more microbatches, each of them shorter."""
    batch = paper_like_batch(0)
    free = plan(batch, ranks=ranks)
    grouped = plan_packs(
        *batch,
        tokens_per_microbatch=8192,
        data_parallel_size=ranks,
        cost=COST_7B,
        pad_to_multiple=64,
        microbatch_multiple=group,
    )
    count = len(grouped.microbatches[0])
    assert count % group == 0
    assert 0 <= count - len(free.microbatches[0]) < group
    assert grouped.fill >= 0.95


def test_quadratic_cost_is_balanced_where_tokens_are_equal() -> None:
    """Two long and eight short samples, equal tokens: the long ones must not meet, though tokens would allow it."""
    teacher = np.array([400, 400] + [100] * 8)
    none = np.zeros_like(teacher)
    result = plan((teacher, none, none), budget=800, ranks=2, multiple=1)
    assert [sum(teacher[list(m)]) for rank in result.microbatches for m in rank] == [800, 800]
    assert [sum(1 for s in rank[0] if s < 2) for rank in result.microbatches] == [1, 1]


def test_a_tight_budget_is_met_by_exchanges() -> None:
    """Longest first alone puts 7 beside 5 and overflows; {7, 4, 4} and {5, 5, 5} fit two microbatches of 15 exactly."""
    teacher = np.array([7, 5, 5, 5, 4, 4])
    none = np.zeros_like(teacher)
    result = plan((teacher, none, none), budget=15, multiple=1)
    assert sorted(result.microbatches[0]) == [(0, 4, 5), (1, 2, 3)]
    assert result.fill == 1.0


def test_more_ranks_than_samples_leaves_empty_microbatches() -> None:
    batch = np.array([10, 20]), np.array([0, 5]), np.array([5, 9])
    result = plan(batch, ranks=4)
    assert sorted(len(rank) for rank in result.microbatches) == [1, 1, 1, 1]
    assert sorted(rank[0] for rank in result.microbatches) == [(), (), (0,), (1,)]


def test_a_sample_that_cannot_fit_is_named() -> None:
    batch = np.array([10, 900, 20]), np.array([0, 200, 0]), np.array([5, 5, 5])
    with pytest.raises(ValueError, match=r"position 1 .* 1100 tokens .*tokens_per_microbatch is 1024.* at least 1152"):
        plan(batch, budget=1024, multiple=128)


def test_a_batch_is_planned_in_milliseconds() -> None:
    """3 to 5 ms on one core; the bound leaves room for a loaded machine."""
    seconds = []
    for seed in range(7):
        batch = paper_like_batch(seed)
        start = time.perf_counter()
        plan(batch, ranks=8)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.05
