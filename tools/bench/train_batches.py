"""Views of the measured samples -> the global batch that a variant of the engine runs.

All layouts have the same loss and gradient: they differ in what is computed beside what is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from reflectron.engine.config import Config
from reflectron.engine.data.global_batch import GlobalBatch, lay_out, share_of_batch
from reflectron.engine.data.microbatch import pack, page_locked
from reflectron.engine.data.packing import CostModel, packing_sizes
from reflectron.engine.data.views import SampleViews, SampleWeights, row_weights
from reflectron.engine.parallel.process_groups import ParallelGroups

Layout = Literal["packed", "one_by_one", "hidden_kept"]
"""``packed``: as the engine trains. ``one_by_one``: a microbatch a sample, padded to a multiple of 64 tokens at most.
``hidden_kept``: every student's view costs as many tokens as the teacher's. What the student does not see lies beside
it as a segment of its own without a loss: the linear layers pay for it as in the reference, attention a little less,
since a hidden token then attends to hidden ones only."""


@dataclass(frozen=True)
class Work:
    """What a layout makes the model do, over all ranks."""

    tokens: int
    """Padding included."""
    microbatches: int
    sequence_length: int
    """Of the longest microbatch."""


def make_batch(
    views: Sequence[SampleViews], layout: Layout, rate: float, config: Config, cost: CostModel, groups: ParallelGroups
) -> tuple[GlobalBatch, Work]:
    """This rank's microbatches, page-locked for CUDA, and the work of all ranks."""
    rank, replicas = groups.dp.rank(), groups.dp.size()
    weights = row_weights(views, config.loss)
    listed = list(views)
    if layout == "hidden_kept":
        hidden = [_hidden_tokens(v) for v in views if len(v.student_positions)]
        listed, weights = listed + hidden, weights + [SampleWeights(0.0, 0.0, 0.0)] * len(hidden)
    batch = lay_out(listed, weights, config, cost, rate, rank, replicas)
    microbatches = len(batch.microbatches) * replicas
    work = Work(microbatches * batch.sequence_length, microbatches, batch.sequence_length)
    if layout == "one_by_one":
        lengths = _padded_lengths(views, config)
        order = np.argsort([-length for length in lengths], kind="stable")
        mine = tuple(pack([listed[i]], [weights[i]], lengths[i]) for i in order[rank::replicas])
        batch = replace(batch, microbatches=mine, sequence_length=max(lengths))
        work = Work(sum(lengths), len(lengths), max(lengths))
    batch = share_of_batch(batch, groups.cp.rank(), groups.cp.size())
    if groups.device.type == "cuda":
        batch = replace(batch, microbatches=tuple(map(page_locked, batch.microbatches)))
    return batch, work


def _hidden_tokens(view: SampleViews) -> SampleViews:
    """What the student does not see, as a view without a loss."""
    none = np.empty(0, np.int64)
    return SampleViews(
        input_ids=np.delete(view.input_ids, view.student_positions),
        student_positions=none,
        rows=none,
        pair_rows=none,
        pair_teacher_labels=none,
        pair_student_labels=none,
    )


def _padded_lengths(views: Sequence[SampleViews], config: Config) -> list[int]:
    """Tokens of each sample's microbatch; pipeline stages exchange equal ones only."""
    _, multiple = packing_sizes(config)
    tokens = [len(v.input_ids) + len(v.student_positions) for v in views]
    lengths = [-(-count // multiple) * multiple for count in tokens]
    return lengths if config.parallel.pipeline_model_parallel_size == 1 else [max(lengths)] * len(lengths)
