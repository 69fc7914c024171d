"""The dynamic mask: which tokens of a reflection sample the student sees at a given point of the run.

The mask rate rises from near 0 to 1 over the steps, and with it the share of the reflection sequence that is hidden
(ReflectionCoder, arXiv 2405.17057, section 3.3). Everything after the reflection turn is always visible; BOS, the first
user turn and the tags around the reflection sequence never are.
"""

from __future__ import annotations

import math

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.config import MaskConfig
from reflectron.engine.data.sampler import Draws
from reflectron.engine.data.tokenization import TokenizedSample

_BLOCK_TYPES = {"t": 0, "c": 1, "e": 2}

# Rates from which the second and the third block type of the order are hidden too, as in the reference implementation.
_SECOND_TYPE_FROM, _THIRD_TYPE_FROM = 0.33, 0.67


def mask_rate(step: int, total_steps: int) -> float:
    """Return the rate of 0-based ``step``: 1 / total_steps at the first, 1 at the last and after."""
    return min((step + 1) / total_steps, 1.0)


def visible_tokens(sample: TokenizedSample, mask: MaskConfig, rate: float, draws: Draws) -> np.ndarray | None:
    """Return what the student sees of ``sample``: bool [N], or None for a generation sample, which has no student.

    Args:
        sample: tokens and blocks.
        mask: strategy, and the order of block types for ``block``.
        rate: mask rate, 0 to 1.
        draws: used by the random strategies only; keyed by seed, epoch and sample.
    """
    if sample.kind == "generation":
        return None
    length = len(sample.input_ids)
    if mask.strategy == "none":
        return np.ones(length, dtype=bool)
    visible = np.arange(length) >= sample.prefix_end
    if len(sample.blocks):
        start, end = sample.blocks[0, 1], sample.blocks[-1, 2]
        visible[start:end] = _visible_reflection(sample.blocks, mask, rate, draws)
    return visible


def _visible_reflection(blocks: np.ndarray, mask: MaskConfig, rate: float, draws: Draws) -> np.ndarray:
    """Decide which tokens of the reflection sequence are visible, whose ``blocks`` adjoin each other."""
    lengths = blocks[:, 2] - blocks[:, 1]
    n_blocks, n_tokens = len(blocks), int(lengths.sum())
    if mask.strategy == "none":
        return np.ones(n_tokens, dtype=bool)
    if mask.strategy == "all":
        return np.zeros(n_tokens, dtype=bool)
    if mask.strategy == "block":
        hidden_types = [_BLOCK_TYPES[letter] for letter in mask.order[: _hidden_type_count(rate)]]
        return np.repeat(~np.isin(blocks[:, 0], hidden_types), lengths)
    if mask.strategy == "sequential_block":
        return np.repeat(np.arange(n_blocks) >= math.ceil(n_blocks * rate), lengths)
    if mask.strategy == "random_block":
        return np.repeat(_all_but_drawn(n_blocks, rate, draws), lengths)
    if mask.strategy == "sequential_token":
        return np.arange(n_tokens) >= math.ceil(n_tokens * rate)
    if mask.strategy == "random_token":
        return _all_but_drawn(n_tokens, rate, draws)
    assert_never(mask.strategy)


def _hidden_type_count(rate: float) -> int:
    return 1 + (rate >= _SECOND_TYPE_FROM) + (rate >= _THIRD_TYPE_FROM)


def _all_but_drawn(count: int, rate: float, draws: Draws) -> np.ndarray:
    kept = np.ones(count, dtype=bool)
    kept[draws.order(count)[: math.ceil(count * rate)]] = False
    return kept
