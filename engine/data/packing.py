"""Plans which samples of a global batch share a forward, and on which rank, from their lengths and loss tokens.

The plan depends on its arguments only, so every rank computes the same one. Each sample lies in exactly one microbatch
with both of its views, no microbatch holds more tokens than the budget, and every data-parallel rank runs the same
number of microbatches, all padded to one length.

Legend: n samples of the global batch, k microbatches of the step (all ranks), T padded tokens of every microbatch.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from reflectron.engine.config import Config, ParallelConfig

# An exchange must lower the heaviest load by this share: the search ends, and rounding never decides.
_LEAST_GAIN = 1e-6
# Tokens that a context-parallel rank's share of a microbatch is rounded up to: matrix products run in tiles of it.
_TILE = 64
# What each rank's share of the tokens, under sequence parallelism too, is a multiple of where products are FP8.
_FP8_TOKENS = 16


@dataclass(frozen=True)
class CostModel:
    """Floating-point operations of a step, by what causes them; only their ratios matter here."""

    per_token: float
    """A token costs this, padding included: the linear layers."""
    per_token_squared: float
    """A view of L tokens costs this times L * L: attention."""
    per_row: float
    """For each row with a loss token: the output layer."""


@dataclass(frozen=True)
class PackPlan:
    """Where each sample of one global batch goes."""

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]
    """[data-parallel rank][microbatch] -> positions in the global batch, ascending; a rank's costliest comes first.
    A microbatch is empty only when there are fewer samples than microbatches."""
    sequence_length: int
    """T, the tokens that every microbatch of the step is padded to."""
    fill: float
    """Real tokens / (T * k), 0 to 1."""


def microbatch_multiple(parallel: ParallelConfig) -> int:
    """Return what each rank's number of microbatches is a multiple of."""
    # The interleaved schedule runs its chunks in turn on groups of as many microbatches as there are stages. Smaller
    # groups wait for each other, larger ones keep more activations than the stages need to be busy.
    return parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else 1


def packing_sizes(config: Config) -> tuple[int, int]:
    """Return the most tokens of a microbatch, and what its length is a multiple of."""
    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    ranks = tensor * context
    least = 1 if config.model.fp8 == "none" else _FP8_TOKENS
    budget = _round_up(config.batch.tokens_per_microbatch, ranks * least)
    # Matrices meet the tokens of a context-parallel rank, which sequence parallelism splits only in between. A divisor
    # of the budget, so that all of the budget can be used.
    return budget, ranks * math.lcm(least, math.gcd(budget // ranks, math.lcm(_TILE, tensor) // tensor))


def plan_packs(
    teacher_length: np.ndarray,
    student_length: np.ndarray,
    rows: np.ndarray,
    *,
    tokens_per_microbatch: int,
    data_parallel_size: int,
    cost: CostModel,
    pad_to_multiple: int,
    microbatch_multiple: int = 1,
) -> PackPlan:
    """Pack one global batch: first the least padding, then the least spread of FLOPs over microbatches and ranks.

    T follows the fullest microbatch instead of the budget, so that rounding k up to what the layout needs makes all
    microbatches shorter and, unless a single sample is as long as the budget, pads none. Every microbatch then pays the
    linear layers for T tokens alike, and what is left to balance is attention and output layer. Samples are dealt
    longest processing time first (Graham 1969) and the heaviest microbatch is relieved by exchanges, of tokens until T
    is the least multiple that k allows, then of attention and output-layer FLOPs within that T. k is the smallest
    multiple of ``data_parallel_size * microbatch_multiple`` for which this meets the budget.

    Args:
        teacher_length: int [n], tokens of the teacher view (or of the generation sample).
        student_length: int [n], tokens of the student view, 0 without one.
        rows: int [n], rows of both views with a loss token.
        tokens_per_microbatch: most tokens of a microbatch.
        data_parallel_size: ranks that share the global batch.
        cost: FLOPs per token, squared token and row.
        pad_to_multiple: T is a multiple of this.
        microbatch_multiple: each rank's number of microbatches is a multiple of this.

    Raises:
        ValueError: a sample has more tokens than a microbatch may hold; names its position in the batch.
    """
    tokens = (teacher_length + student_length).astype(np.float64)
    budget = tokens_per_microbatch // pad_to_multiple * pad_to_multiple
    _check_fits(tokens, budget, tokens_per_microbatch, pad_to_multiple)
    squares = teacher_length.astype(np.float64) ** 2 + student_length.astype(np.float64) ** 2
    unpadded = cost.per_token_squared * squares + cost.per_row * rows

    total, step = int(tokens.sum()), data_parallel_size * microbatch_multiple
    k = _round_up(_round_up(total, budget) // budget, step)
    while True:
        least = _round_up(max(_round_up(total, k) // k, int(tokens.max())), pad_to_multiple)
        microbatch = _deal_longest_first(cost.per_token * tokens + unpadded, k)
        microbatch = _exchange(microbatch, k, tokens, tokens, capacity=np.inf, enough=least)
        length = _round_up(int(np.bincount(microbatch, tokens).max()), pad_to_multiple)
        if length <= budget:
            break
        k += step
    microbatch = _exchange(microbatch, k, unpadded, tokens, capacity=length)
    load = np.bincount(microbatch, unpadded, minlength=k)
    rank = _deal_to_ranks(load, data_parallel_size)

    samples = [tuple(np.flatnonzero(microbatch == m).tolist()) for m in range(k)]
    costliest_first = np.argsort(-load, kind="stable")
    plan = tuple(tuple(samples[m] for m in costliest_first if rank[m] == r) for r in range(data_parallel_size))
    return PackPlan(microbatches=plan, sequence_length=length, fill=total / (length * k))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_fits(tokens: np.ndarray, budget: int, tokens_per_microbatch: int, pad_to_multiple: int) -> None:
    position = int(tokens.argmax())
    if tokens[position] > budget:
        need = _round_up(int(tokens[position]), pad_to_multiple)
        raise ValueError(
            f"position {position} of the global batch has {int(tokens[position])} tokens (teacher and student views), "
            f"batch.tokens_per_microbatch is {tokens_per_microbatch}, expected at least {need}: raise it, or lower "
            "data.max_length"
        )


def _deal_longest_first(weight: np.ndarray, bins: int) -> np.ndarray:
    """Give each item, the heaviest first, to the bin that is lightest so far. Returns the bin of each item, int [n]."""
    bin_of = np.empty(len(weight), np.int64)
    lightest = [(0.0, b) for b in range(bins)]
    for item in np.argsort(-weight, kind="stable").tolist():
        load, b = lightest[0]
        bin_of[item] = b
        heapq.heapreplace(lightest, (load + float(weight[item]), b))
    return bin_of


def _exchange(
    bin_of: np.ndarray, bins: int, weight: np.ndarray, size: np.ndarray, *, capacity: float, enough: float = 0.0
) -> np.ndarray:
    """Relieve the heaviest bin by its best exchange, until its weight is ``enough`` or no exchange relieves it.

    An exchange gives one item of the heaviest bin for one item of another bin or for nothing; the best one leaves the
    lower maximum of the two bins. No bin's sizes grow above ``capacity``, and no bin becomes empty: who takes the only
    item of the heaviest bin would be at least as heavy.

    Args:
        bin_of: int [n], bin of each item.
        bins: number of bins.
        weight: float [n], what is balanced.
        size: float [n], what the capacity limits.

    Returns:
        int [n], the new bin of each item.
    """
    n = len(weight)
    load, used = np.bincount(bin_of, weight, minlength=bins), np.bincount(bin_of, size, minlength=bins)
    # After the items, one partner without weight and size for each bin: to exchange for it is to move.
    partner_bin = np.concatenate([bin_of, np.arange(bins)])
    partner_weight, partner_size = (np.concatenate([x, np.zeros(bins)]) for x in (weight, size))
    while True:
        heavy = int(load.argmax())
        if load[heavy] <= enough:
            break
        own = np.flatnonzero(partner_bin[:n] == heavy)
        relief = weight[own, None] - partner_weight
        growth = size[own, None] - partner_size
        heavier = np.maximum(load[heavy] - relief, load[partner_bin] + relief)
        heavier[(growth > capacity - used[partner_bin]) | (-growth > capacity - used[heavy])] = np.inf
        row, partner = np.unravel_index(heavier.argmin(), heavier.shape)
        if heavier[row, partner] > load[heavy] * (1 - _LEAST_GAIN):
            break
        other = partner_bin[partner]
        for sums, moved in ((load, relief[row, partner]), (used, growth[row, partner])):
            sums[heavy] -= moved
            sums[other] += moved
        partner_bin[own[row]] = other
        if partner < n:
            partner_bin[partner] = heavy
    return partner_bin[:n]


def _deal_to_ranks(load: np.ndarray, data_parallel_size: int) -> np.ndarray:
    """Give each rank equally many microbatches of about equal sums of load. Returns the rank of each, int [k]."""
    there = np.arange(data_parallel_size)
    there_and_back = np.concatenate([there, there[::-1]])
    rank = np.empty(len(load), np.int64)
    rank[np.argsort(-load, kind="stable")] = np.resize(there_and_back, len(load))
    count = np.ones(len(load))
    return _exchange(rank, data_parallel_size, load, count, capacity=len(load) // data_parallel_size)
