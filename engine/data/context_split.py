"""The share of a pack that one of the context-parallel ranks which compute it together holds.

Every segment is cut into 2 C chunks, of which rank r holds the r-th and the r-th from the end. Early tokens attend to
few others and late ones to many, so that each rank has the same share of the attention of every segment (zigzag, as
megatron-core cuts rows that hold one sample; Llama 3, arXiv 2407.21783, section 3.3.2). Chunks of a segment differ in
length by a token where it cannot be divided, and still every rank holds T / C tokens: nothing is padded but the pack.
Loss tokens are shared out by number, pairs in one piece, wherever the tokens are.

T tokens of a pack, C context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from reflectron.engine.data.microbatch import LossRows, Microbatch, RowExchange, RowField, row_fields, segments_of

_ROW_FIELDS = row_fields()


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of a segment, by their places in the pack."""

    segment_start: int
    start: int
    end: int
    """One behind the last."""


@dataclass(frozen=True)
class RankTokens:
    """Tokens of a pack that one rank holds, in its order."""

    chunks: tuple[TokenRun, ...]
    """Ascending; then comes the rank's share of the padding."""
    places: np.ndarray
    """int64 [T / C], places in the pack."""


def split_tokens(segment_lengths: Sequence[int], sequence_length: int, size: int) -> tuple[RankTokens, ...]:
    """Share out the tokens of a pack, [C]; each of them goes to exactly one rank.

    Args:
        segment_lengths: tokens of each segment, in order.
        sequence_length: T, a multiple of ``size``.
        size: C.
    """
    assert sequence_length % size == 0, "packs are padded to what context-parallel ranks can share"
    used = sum(segment_lengths)
    if used < size:
        # A rank without a token would take no part in the attention's collectives: here padding counts as a segment.
        segment_lengths, used = [*segment_lengths, sequence_length - used], sequence_length
    chunks: list[list[TokenRun]] = [[] for _ in range(size)]
    holders = [*range(size), *reversed(range(size))]
    start = 0
    for number, length in enumerate(segment_lengths):
        # As many for each as if tokens were dealt one by one through the pack, so that the sums are equal.
        share = _dealt(start, start + length, size)
        # The longer half of an odd share comes last and first in turn: it is the later tokens that cost.
        early = (share + number % 2) // 2
        lengths = np.concatenate([early, (share - early)[::-1]])
        ends = start + np.cumsum(lengths)
        for rank, count, end in zip(holders, lengths.tolist(), ends.tolist(), strict=True):
            if count:
                chunks[rank].append(TokenRun(start, end - count, end))
        start += length
    padding = np.arange(used, sequence_length)
    return tuple(
        RankTokens(
            chunks=tuple(mine),
            places=np.concatenate([*(np.arange(c.start, c.end) for c in mine), padding[padding % size == rank]]),
        )
        for rank, mine in enumerate(chunks)
    )


def _dealt(start: int, end: int, size: int) -> np.ndarray:
    """Return how many of the numbers from ``start`` to below ``end`` leave the remainders 0 .. ``size`` - 1, int64
    [size]."""
    remainders = np.arange(size)
    return (end - remainders + size - 1) // size - (start - remainders + size - 1) // size


def share_of_pack(microbatch: Microbatch, rank: int, size: int) -> Microbatch:
    """Return what context-parallel rank ``rank`` of ``size`` needs to compute its share of a whole pack."""
    split = split_tokens(microbatch.segment_lengths, len(microbatch.tokens), size)
    # Where each token of the pack lies once those of all ranks are gathered one behind the other.
    gathered_place = np.empty(len(microbatch.tokens), dtype=np.int64)
    gathered_place[np.concatenate([one.places for one in split])] = np.arange(len(gathered_place))
    mine = split[rank]
    places = torch.from_numpy(mine.places)
    query_lengths = [c.end - c.start for c in mine.chunks]
    keys = [np.arange(c.segment_start, c.end) for c in mine.chunks]
    # Padding attends to itself.
    padding = mine.places[sum(query_lengths) :]
    return Microbatch(
        tokens=microbatch.tokens[places],
        position_ids=microbatch.position_ids[places],
        segment_lengths=microbatch.segment_lengths,
        segments=segments_of(query_lengths, [len(places) for places in keys], len(places)),
        loss_rows=_share_of_rows(microbatch.loss_rows, gathered_place, rank, size),
        key_index=torch.from_numpy(gathered_place[np.concatenate([*keys, padding])]),
    )


def _share_of_rows(rows: LossRows, gathered_place: np.ndarray, rank: int, size: int) -> LossRows:
    """Return the rank's part of the pairs and of the unpaired rows, and which hidden states travel for it."""
    per_rank = len(gathered_place) // size
    parts = {"pairs": _parts(len(rows.teacher_index), size), "unpaired rows": _parts(len(rows.index), size)}

    def shares(field: RowField, name: str) -> list[torch.Tensor]:
        return [getattr(rows, name)[part] for part in parts[field.of]]

    shared = {name: (field, shares(field, name)) for name, field in _ROW_FIELDS.items() if field.of != "the whole"}
    places = [by_rank for field, by_rank in shared.values() if field.is_place]
    # Sorted, which is the order in which they arrive: by sender.
    wanted = [np.unique(gathered_place[np.concatenate(of_rank)]) for of_rank in zip(*places, strict=True)]
    sent = [found[found // per_rank == rank] - rank * per_rank for found in wanted]

    def mine(field: RowField, by_rank: list[torch.Tensor]) -> torch.Tensor:
        if not field.is_place:
            return by_rank[rank]
        return torch.from_numpy(np.searchsorted(wanted[rank], gathered_place[by_rank[rank].numpy()]))

    unpaired = parts["unpaired rows"][rank]
    # Not ``replace``: a field of the whole that is not made anew here would silently keep its value.
    return LossRows(
        **{name: mine(field, by_rank) for name, (field, by_rank) in shared.items()},
        generation_rows=min(max(rows.generation_rows - unpaired.start, 0), unpaired.stop - unpaired.start),
        exchange=RowExchange(
            send_index=torch.from_numpy(np.concatenate(sent)),
            send_counts=tuple(len(found) for found in sent),
            receive_counts=tuple(np.bincount(wanted[rank] // per_rank, minlength=size).tolist()),
        ),
    )


def _parts(count: int, size: int) -> list[slice]:
    """Return ``count`` things in ``size`` parts, in order, that differ by one at most."""
    bounds = [count * rank // size for rank in range(size + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]
