"""Makes of the views of the samples in one pack the tensors of one forward.

The segments lie one behind the other: each sample's teacher view, then its student view when it has one. The tail up to
the common length T is padding: it belongs to no segment and no token of it is a loss token.

T tokens of a pack, P pairs of rows, M unpaired rows. Context parallelism (``context_split``) leaves a rank a share of
each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import numpy as np
import torch

from reflectron.engine.data.views import IGNORED, SampleViews, SampleWeights


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """Hidden states that context-parallel ranks send each other, so that the two rows of a pair meet."""

    send_index: torch.Tensor
    """int64, tokens of this rank, first those for rank 0."""
    send_counts: tuple[int, ...]
    """How many of them each rank gets."""
    receive_counts: tuple[int, ...]
    """How many each rank sends here."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which queries of a rank's tokens attend to which keys; made once a microbatch and used by every layer.

    Without context parallelism the queries and keys of a segment are the same tokens. With it a rank has chunks of
    segments, and the last of a chunk's keys is its own last token: the causal mask is aligned there.

    In the cumulative lengths, which are those of kernels for packed rows, the padding counts as segments of its own, so
    that no kernel leaves memory unwritten; of so few tokens each that they cost next to nothing.
    """

    query_lengths: tuple[int, ...]
    """Tokens of each segment or chunk, in this rank's order, on the host, without padding."""
    key_lengths: tuple[int, ...]
    """Tokens of each segment up to the end of the chunk, likewise."""
    cu_seqlens_q: torch.Tensor
    """int32 [segments + 1], padding included: from 0 to this rank's tokens."""
    cu_seqlens_k: torch.Tensor
    """int32 [segments + 1], likewise, from 0 to the number of keys."""
    max_seqlen_q: int
    """Longest difference in ``cu_seqlens_q``, on the host."""
    max_seqlen_k: int
    """Longest difference in ``cu_seqlens_k``, on the host."""


# The queries that kernels treat together, so that no shorter segment is cheaper.
_PADDING_SEGMENT = 128


def segments_of(query_lengths: Sequence[int], key_lengths: Sequence[int], tokens: int) -> Segments:
    """Build segments or chunks of a rank with ``tokens``; those beyond the sum of ``query_lengths`` are padding."""
    padding = tokens - sum(query_lengths)
    fill = [min(_PADDING_SEGMENT, padding - start) for start in range(0, padding, _PADDING_SEGMENT)]

    def cumulative(lengths: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths, *fill], dtype=np.int32))

    return Segments(
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        cu_seqlens_q=cumulative(query_lengths),
        cu_seqlens_k=cumulative(key_lengths),
        max_seqlen_q=max([*query_lengths, *fill]),
        max_seqlen_k=max([*key_lengths, *fill]),
    )


@dataclass(frozen=True)
class RowField:
    """What a field of ``LossRows`` describes; ranks that share the rows split it accordingly.

    A field of the pairs or of the unpaired rows has one entry for each; one of the whole has no entries to share.
    """

    of: Literal["pairs", "unpaired rows", "the whole"]
    is_place: bool = False
    """The entries are places among the T tokens, or among the rows that come out of ``exchange``."""


PairPlaces = Annotated[torch.Tensor, RowField("pairs", is_place=True)]
PairValues = Annotated[torch.Tensor, RowField("pairs")]
UnpairedPlaces = Annotated[torch.Tensor, RowField("unpaired rows", is_place=True)]
UnpairedValues = Annotated[torch.Tensor, RowField("unpaired rows")]


@dataclass(frozen=True, kw_only=True)
class LossRows:
    """The loss tokens of a pack: places int64, labels int64 (-100 = none), weights float32."""

    teacher_index: PairPlaces
    """[P] the teacher's row of each pair."""
    student_index: PairPlaces
    """[P] the student's row of each pair."""
    teacher_labels: PairValues
    """[P]"""
    student_labels: PairValues
    """[P]"""
    ce_teacher_weight: PairValues
    """[P]"""
    ce_student_weight: PairValues
    """[P]"""
    kl_weight: PairValues
    """[P] 0 on the row before the answer, which has no divergence."""
    index: UnpairedPlaces
    """[M] unpaired rows; those of generation samples come first."""
    labels: UnpairedValues
    """[M]"""
    ce_weight: UnpairedValues
    """[M]"""
    generation_rows: Annotated[int, RowField("the whole")]
    """How many of the M rows belong to generation samples."""
    exchange: Annotated[RowExchange | None, RowField("the whole")] = None
    """With context parallelism."""


def row_fields(cls: type = LossRows) -> dict[str, RowField]:
    """Return the fields of ``LossRows`` by name, each with what it describes.

    Raises:
        TypeError: naming a field whose annotation does not say it.
    """
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        kinds = [kind for kind in getattr(hints[field.name], "__metadata__", ()) if isinstance(kind, RowField)]
        if len(kinds) != 1:
            raise TypeError(f"{cls.__name__}.{field.name} is annotated with {len(kinds)} RowField, expected one")
        found[field.name] = kinds[0]
    return found


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What one forward of one rank needs."""

    tokens: torch.Tensor
    """[T] int64"""
    position_ids: torch.Tensor
    """[T] int64, positions in the original sequences"""
    segment_lengths: tuple[int, ...]
    """Tokens of each segment of the whole pack, on the host."""
    segments: Segments
    loss_rows: LossRows
    key_index: torch.Tensor | None = None
    """With context parallelism, under which tokens, positions, segments and loss rows are this rank's alone: int64, the
    place of each key among the tokens of all ranks one behind the other. About T (1 + 1 / 2 C) of them: a chunk early
    in a segment needs few keys and its counterpart late in it the more."""


Record = TypeVar("Record", bound=Microbatch | LossRows | Segments | RowExchange)


def to_device(record: Record, device: torch.device) -> Record:
    """Return a copy whose tensors, and those of the records in it, are on ``device``; from page-locked memory the host
    does not wait for it."""
    return _converted(record, lambda tensor: tensor.to(device, non_blocking=True))


def page_locked(record: Record) -> Record:
    """Return a copy in memory that a CUDA device fetches from by itself; made on the thread that has the device set."""
    return _converted(record, torch.Tensor.pin_memory)


def _converted(record: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of a dataclass with its tensors converted, at any depth."""

    def converted(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return convert(value)
        return _converted(value, convert) if is_dataclass(value) else value

    return replace(record, **{field.name: converted(getattr(record, field.name)) for field in fields(record)})


def pack(views: Sequence[SampleViews], weights: Sequence[SampleWeights], sequence_length: int) -> Microbatch:
    """Lay the samples of one microbatch out as one row of ``sequence_length`` tokens, on the CPU."""
    tokens = np.zeros(sequence_length, dtype=np.int64)
    positions = np.zeros(sequence_length, dtype=np.int64)
    lengths: list[int] = []
    placed: list[_Placed] = []
    for view, weight in zip(views, weights, strict=True):
        start = _append(tokens, positions, lengths, view.input_ids, np.arange(len(view.input_ids)))
        student_rows = start + view.pair_rows
        if len(view.student_positions):
            seen = view.student_positions
            student_start = _append(tokens, positions, lengths, view.input_ids[seen], seen)
            student_rows = student_start + np.searchsorted(seen, view.pair_rows)
        placed.append(_Placed(view, weight, start, student_rows))
    # A microbatch without samples still runs: its padding becomes a segment, so that every layer has a gradient.
    lengths = lengths or [sequence_length]
    return Microbatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(positions),
        segment_lengths=tuple(lengths),
        segments=segments_of(lengths, lengths, sequence_length),
        loss_rows=_loss_rows(placed),
    )


@dataclass(frozen=True)
class _Placed:
    """A sample in its pack."""

    view: SampleViews
    weight: SampleWeights
    start: int
    """Place of its first token."""
    student_rows: np.ndarray
    """Places of the student's rows of its pairs."""


def _append(tokens: np.ndarray, positions: np.ndarray, lengths: list[int], ids: np.ndarray, places: np.ndarray) -> int:
    """Put a segment behind the others; returns where it starts."""
    start = sum(lengths)
    tokens[start : start + len(ids)] = ids
    positions[start : start + len(ids)] = places
    lengths.append(len(ids))
    return start


def _loss_rows(placed: list[_Placed]) -> LossRows:
    teacher_labels = [p.view.pair_teacher_labels for p in placed]
    student_labels = [p.view.pair_student_labels for p in placed]
    unpaired = sorted(placed, key=lambda p: not p.view.is_generation)
    return LossRows(
        teacher_index=_indices([p.start + p.view.pair_rows for p in placed]),
        student_index=_indices([p.student_rows for p in placed]),
        teacher_labels=_indices(teacher_labels),
        student_labels=_indices(student_labels),
        ce_teacher_weight=_weights(
            [(x != IGNORED) * p.weight.ce_teacher for x, p in zip(teacher_labels, placed, strict=True)]
        ),
        ce_student_weight=_weights(
            [(x != IGNORED) * p.weight.ce_student for x, p in zip(student_labels, placed, strict=True)]
        ),
        kl_weight=_weights([(np.arange(len(p.view.pair_rows)) > 0) * p.weight.kl for p in placed]),
        index=_indices([p.start + p.view.rows for p in unpaired]),
        labels=_indices([p.view.input_ids[p.view.rows + 1] for p in unpaired]),
        ce_weight=_weights([np.full(len(p.view.rows), p.weight.ce_teacher) for p in unpaired]),
        generation_rows=sum(len(p.view.rows) for p in unpaired if p.view.is_generation),
    )


def _indices(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64))


def _weights(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0), *parts]).astype(np.float32))
