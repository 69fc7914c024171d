"""Masks equal the recorded ones; random strategies draw exact counts, and the same again for the same listing."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import numpy as np
import pytest

from reflectron.engine.config import MaskConfig
from reflectron.engine.data.masking import mask_rate, visible_tokens
from reflectron.engine.data.sampler import Draws, SampleRef, mask_draws
from reflectron.engine.data.tokenization import TokenizedSample
from testkit.places import TESTS_DIR

GOLDEN: dict[str, Any] = json.loads((TESTS_DIR / "golden" / "golden.json").read_text(encoding="utf-8"))
BLOCK_TYPES = ["<|text|>", "<|code|>", "<|execution|>"]
RATES = {name: rate["rate"] for name, rate in GOLDEN["masks"]["rates"].items()}


def recorded_sample(record: dict[str, Any]) -> TokenizedSample:
    reflection = record["type"] == "reflection"
    blocks = [(BLOCK_TYPES.index(kind), start, end) for kind, start, end in record["blocks_first_assistant"]]
    return TokenizedSample(
        kind=record["type"],
        input_ids=np.array(record["input_ids"], np.int32),
        supervised=np.array(record["labels"]) != -100,
        blocks=np.array(blocks if reflection else [], np.int32).reshape(-1, 3),
        prefix_end=record["first_endofmessage"] + 1 if reflection else 0,
        final_start=record["last_assistant"] if reflection else -1,
    )


SAMPLES = {record["name"]: recorded_sample(record) for record in GOLDEN["samples"] if not record["dropped"]}
REFLECTION = {name: sample for name, sample in SAMPLES.items() if sample.kind == "reflection"}
PRIVILEGED = TokenizedSample(
    kind="privileged",
    input_ids=np.arange(20, dtype=np.int32),
    supervised=np.arange(20) >= 12,
    blocks=np.empty((0, 3), np.int32),
    prefix_end=7,
    final_start=11,
)


def recorded_mask(strategy: str) -> MaskConfig:
    if strategy.startswith("block_"):
        return MaskConfig(strategy="block", order=strategy.removeprefix("block_"))
    return MaskConfig(strategy=strategy)  # type: ignore[arg-type]


def seen(sample: TokenizedSample, mask: MaskConfig, rate: float, ref: SampleRef | None = None) -> np.ndarray:
    visible = visible_tokens(sample, mask, rate, mask_draws(3407, ref or SampleRef(0, 0, 0)))
    assert visible is not None
    return visible


@pytest.mark.parametrize("strategy", GOLDEN["masks"]["values"])
def test_recorded_masks(strategy: str) -> None:
    recorded = GOLDEN["masks"]["values"][strategy]
    assert recorded.keys() == REFLECTION.keys()
    for name, by_rate in recorded.items():
        assert by_rate.keys() == RATES.keys()
        for rate, expected in by_rate.items():
            visible = seen(SAMPLES[name], recorded_mask(strategy), RATES[rate])
            assert visible.dtype == bool
            assert "".join("01"[int(token)] for token in visible) == expected, (name, rate)


@pytest.mark.parametrize("strategy", ["random_block", "random_token"])
@pytest.mark.parametrize("rate", [0.0, 0.001, 1 / 3, 0.5, 0.67, 0.999, 1.0])
def test_random_strategies_hide_an_exact_count(strategy: Literal["random_block", "random_token"], rate: float) -> None:
    for sample in REFLECTION.values():
        visible = seen(sample, MaskConfig(strategy=strategy), rate)
        start, end = sample.blocks[0, 1], sample.blocks[-1, 2]
        assert not visible[:start].any()
        assert not visible[end : sample.prefix_end].any()
        assert visible[sample.prefix_end :].all()
        if strategy == "random_token":
            assert (~visible[start:end]).sum() == math.ceil((end - start) * rate)
            continue
        whole = [visible[first:last] for _, first, last in sample.blocks]
        assert all(block.all() or not block.any() for block in whole)
        assert sum(not block.any() for block in whole) == math.ceil(len(whole) * rate)


def test_sequential_token_hides_from_the_left() -> None:
    sample = SAMPLES["r_two_repeats"]
    start, end = sample.blocks[0, 1], sample.blocks[-1, 2]
    for rate in (0.0, 0.01, 0.5, 1.0):
        visible = seen(sample, MaskConfig(strategy="sequential_token"), rate)[start:end]
        hidden = math.ceil((end - start) * rate)
        assert not visible[:hidden].any()
        assert visible[hidden:].all()


@pytest.mark.parametrize("strategy", ["random_block", "random_token"])
def test_random_strategies_are_keyed_by_the_listing(strategy: Literal["random_block", "random_token"]) -> None:
    sample, mask = SAMPLES["r_two_repeats"], MaskConfig(strategy=strategy)

    def draws(epochs: range, samples: range) -> list[bytes]:
        return [seen(sample, mask, 0.5, SampleRef(e, s, 0)).tobytes() for e in epochs for s in samples]

    first, again = draws(range(2), range(20)), draws(range(2), range(20))
    assert first == again
    assert first[:20] != first[20:]
    # Six blocks of which three are hidden leave 20 outcomes.
    assert len(set(first)) > 10
    # In another order of asking, the draws are the same.
    assert draws(range(1, 2), range(19, 20)) == first[-1:]


@pytest.mark.parametrize(
    ("rate", "hidden"),
    [(0.0, "t"), (0.32999, "t"), (0.33, "tc"), (0.66999, "tc"), (0.67, "tce"), (1.0, "tce")],
)
def test_block_types_are_hidden_from_their_rate_on(rate: float, hidden: str) -> None:
    sample = SAMPLES["r_tce_simple"]
    for order in ("tce", "ect", "cte"):
        visible = seen(sample, MaskConfig(order=order), rate)
        types = {"tce"[kind] for kind, start, _ in sample.blocks if not visible[start]}
        assert types == set(order[: len(hidden)])


def test_none_shows_everything() -> None:
    assert all(seen(sample, MaskConfig(strategy="none"), 1.0).all() for sample in REFLECTION.values())


def test_a_generation_sample_has_no_student() -> None:
    for strategy in ("none", "block", "random_token"):
        mask = MaskConfig(strategy=strategy)
        assert visible_tokens(SAMPLES["g_00"], mask, 0.5, Draws(0)) is None


@pytest.mark.parametrize("strategy", ["block", "sequential_block", "random_block", "random_token", "all"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_privileged_context_is_hidden_at_every_rate(strategy: str, rate: float) -> None:
    assert seen(PRIVILEGED, recorded_mask(strategy), rate).tolist() == [False] * 7 + [True] * 13


def test_the_rate_rises_to_one_at_the_last_step() -> None:
    assert [mask_rate(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert mask_rate(0, 1) == 1.0
    # The thresholds of the block strategy are reached by the rate in floating point, too.
    assert mask_rate(98, 300) >= 0.33 > mask_rate(97, 300)
    assert mask_rate(200, 300) >= 0.67 > mask_rate(199, 300)
