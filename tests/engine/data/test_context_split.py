"""The split of a pack over context-parallel ranks: complete, equal in tokens, and balanced in attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from reflectron.engine.config import BatchConfig, Config, DataConfig, ParallelConfig
from reflectron.engine.data.context_split import share_of_pack, split_tokens
from reflectron.engine.data.global_batch import assemble, share_of_batch
from reflectron.engine.data.microbatch import LossRows, Microbatch, row_fields, segments_of
from reflectron.engine.data.packing import CostModel, plan_packs
from reflectron.engine.data.views import SampleViews

PAIR_VALUES = ("teacher_labels", "student_labels", "ce_teacher_weight", "ce_student_weight", "kl_weight")


def random_segments(seed: int, size: int) -> tuple[list[int], int]:
    """Lengths of segments, some shorter than the ranks, and a T that holds them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.choice([4, 40, 400]), rng.integers(1, 9)).tolist()
    padding = int(rng.integers(0, 3)) * size
    return lengths, -(-sum(lengths) // size) * size + padding


def paper_like_pack(seed: int, tokens: int) -> list[int]:
    """Views of one microbatch: 78 % generation samples of about 790 tokens, reflections of about 2400, seen in part."""
    rng = np.random.default_rng(seed)
    n = 64
    reflection = rng.random(n) < 0.22
    generation = np.clip(rng.lognormal(np.log(790) - 0.1, 0.45, n), 200, 2000)
    teacher = np.where(reflection, np.clip(rng.normal(2400, 750, n), 600, 4096), generation).astype(np.int64)
    student = np.where(reflection, teacher * np.clip(rng.normal(0.5, 0.2, n), 0.25, 0.9), 0).astype(np.int64)
    cost = CostModel(per_token=1.0, per_token_squared=1e-4, per_row=0.0)
    sizes = {"tokens_per_microbatch": tokens, "data_parallel_size": 1, "pad_to_multiple": 64}
    plan = plan_packs(teacher, student, np.zeros(n, np.int64), cost=cost, **sizes)
    return [int(view) for i in plan.microbatches[0][0] for view in (teacher[i], student[i]) if view]


def causal_pairs(places: np.ndarray, lengths: list[int]) -> int:
    """Attention of the tokens at ``places``: how many tokens each of them attends to."""
    within = np.concatenate([np.arange(1, length + 1) for length in lengths])
    return int(within[places[places < len(within)]].sum())


def test_a_field_of_the_rows_must_say_how_ranks_share_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithScores(LossRows):
        scores: torch.Tensor | None = None

    with pytest.raises(TypeError, match=r"WithScores\.scores is annotated with 0 RowField"):
        row_fields(WithScores)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_one_rank_and_every_rank_as_many(seed: int, size: int) -> None:
    lengths, sequence_length = random_segments(seed, size)
    split = split_tokens(lengths, sequence_length, size)
    assert sorted(np.concatenate([one.places for one in split])) == list(range(sequence_length))
    assert {len(one.places) for one in split} == {sequence_length // size}
    starts = set(np.cumsum([0, *lengths]).tolist())
    for one in split:
        assert one.chunks, "no rank is left without a query"
        assert {chunk.segment_start for chunk in one.chunks} <= starts
        chunked = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in one.chunks])
        assert np.array_equal(one.places[: len(chunked)], chunked)
        if sum(lengths) >= size:
            assert (one.places[len(chunked) :] >= sum(lengths)).all()


@pytest.mark.parametrize(("size", "bound"), [(2, 1.001), (4, 1.003), (8, 1.006)])
def test_attention_is_balanced_on_lengths_like_the_papers(size: int, bound: float) -> None:
    """Whole packs cut into 2 C chunks, whatever their segments, leave one rank 1.2 to 1.8 times the mean."""
    ours, whole_packs = [], []
    for seed in range(10):
        lengths = paper_like_pack(seed, 8192)
        sequence_length = -(-sum(lengths) // (2 * size)) * 2 * size
        pairs = [causal_pairs(one.places, lengths) for one in split_tokens(lengths, sequence_length, size)]
        ours.append(max(pairs) / np.mean(pairs))
        chunks = np.arange(sequence_length).reshape(2 * size, -1)
        zigzag = [causal_pairs(np.concatenate([chunks[r], chunks[-1 - r]]), lengths) for r in range(size)]
        whole_packs.append(max(zigzag) / np.mean(zigzag))
    assert max(ours) < bound
    assert np.mean(whole_packs) > 1.15


def test_one_long_sample_is_balanced_exactly() -> None:
    split = split_tokens([32768], 32768, 8)
    assert len({causal_pairs(one.places, [32768]) for one in split}) == 1


def random_pack(seed: int, size: int) -> Microbatch:
    lengths, sequence_length = random_segments(seed, size)
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, high: int = 1000) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator)

    pairs, unpaired, used = 13, 22, sum(lengths)
    rows: dict[str, Any] = {name: some(pairs, used) for name in ("teacher_index", "student_index")}
    rows |= {name: some(pairs) for name in PAIR_VALUES}
    rows |= {"index": some(unpaired, used), "labels": some(unpaired), "ce_weight": some(unpaired)}
    return Microbatch(
        # Each token is its own place, so that one sees where it went.
        tokens=torch.arange(sequence_length),
        position_ids=some(sequence_length),
        segment_lengths=tuple(lengths),
        segments=segments_of(lengths, lengths, sequence_length),
        loss_rows=LossRows(**rows, generation_rows=9),
    )


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_each_row_is_computed_once_from_its_own_hidden_state(seed: int, size: int) -> None:
    """The exchange is carried out on the tokens themselves, which are their places in the pack."""
    pack = random_pack(seed, size)
    shares = [share_of_pack(pack, rank, size) for rank in range(size)]
    exchanges = [share.loss_rows.exchange for share in shares]
    sent = [
        share.tokens[exchange.send_index].split(exchange.send_counts)
        for share, exchange in zip(shares, exchanges, strict=True)
        if exchange is not None
    ]
    found: dict[str, list[torch.Tensor]] = {}
    for rank, (share, exchange) in enumerate(zip(shares, exchanges, strict=True)):
        assert exchange is not None
        assert exchange.receive_counts == tuple(len(parts[rank]) for parts in sent)
        received = torch.cat([parts[rank] for parts in sent])
        assert len(received.unique()) == len(received), "a hidden state travels once"
        for name, value in vars(share.loss_rows).items():
            if isinstance(value, torch.Tensor):
                found.setdefault(name, []).append(received[value] if name.endswith("index") else value)
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), getattr(pack.loss_rows, name)), name
    assert sum(share.loss_rows.generation_rows for share in shares) == pack.loss_rows.generation_rows
    rows = [len(share.loss_rows.teacher_index) + len(share.loss_rows.index) for share in shares]
    assert max(rows) - min(rows) <= 2


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of [tokens, width], the last query beside the last key."""
    future = torch.ones(len(query), len(key), dtype=torch.bool).triu(len(key) - len(query) + 1)
    return (query @ key.t()).masked_fill(future, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_chunks_attend_as_whole_segments_do(seed: int, size: int) -> None:
    pack = random_pack(seed, size)
    lengths, shares = pack.segment_lengths, [share_of_pack(pack, rank, size) for rank in range(size)]
    q, k, v = torch.randn(3, len(pack.tokens), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    segments = zip(*(x[: sum(lengths)].split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([attend(*segment) for segment in segments])
    everyones = torch.cat([share.tokens for share in shares])
    for share in shares:
        segments = share.segments
        assert torch.equal(share.position_ids, pack.position_ids[share.tokens])
        places = share.tokens.split([*segments.query_lengths, len(share.tokens) - sum(segments.query_lengths)])
        assert share.key_index is not None
        used = sum(segments.key_lengths)
        keys = everyones[share.key_index[:used]].split(segments.key_lengths)
        assert torch.equal(everyones[share.key_index[used:]], share.tokens[sum(segments.query_lengths) :])
        for mine, seen in zip(places, keys, strict=False):
            # Below that many tokens padding attends as well.
            if sum(lengths) >= size:
                assert torch.allclose(attend(q[mine], k[seen], v[seen]), expected[mine], rtol=1e-10)


def generation_views(length: int) -> SampleViews:
    none = np.empty(0, dtype=np.int64)
    return SampleViews(
        input_ids=np.arange(length, dtype=np.int32),
        student_positions=none,
        rows=np.arange(length - 1),
        pair_rows=none,
        pair_teacher_labels=none,
        pair_student_labels=none,
    )


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (1, 3), (2, 1), (2, 2), (1, 8), (4, 8), (3, 2)])
@pytest.mark.parametrize("budget", [64, 701, 8192])
def test_packs_are_padded_to_what_the_ranks_can_share(tensor: int, context: int, budget: int) -> None:
    """A sample as long as the budget fits, whatever the ranks divide."""
    config = Config(
        data=DataConfig(max_length=budget),
        batch=BatchConfig(tokens_per_microbatch=budget),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, context_parallel_size=context),
    )
    cost = CostModel(per_token=1.0, per_token_squared=0.0, per_row=0.0)
    batch = assemble([generation_views(budget), generation_views(20)], config, cost, 0.0, 0, 1)
    assert batch.sequence_length % (tensor * context) == 0
    assert batch.sequence_length - budget < tensor * context
    for rank in range(context):
        share = share_of_batch(batch, rank, context)
        assert [len(one.tokens) for one in share.microbatches] == [batch.sequence_length // context] * 2


def test_the_share_of_a_rank_is_a_multiple_of_a_tile() -> None:
    config = Config(parallel=ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4))
    cost = CostModel(per_token=1.0, per_token_squared=0.0, per_row=0.0)
    batch = assemble([generation_views(1000)], config, cost, 0.0, 0, 1)
    assert batch.sequence_length == 1024
