"""The samples of a step become the microbatches that this data-parallel rank runs for it.

Every rank plans the packs of the whole global batch, alike, and lays out only its own microbatches. Where the source of
the samples knows them ahead, the next step is prepared in the background while one trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import BatchSource
from reflectron.engine.data.context_split import share_of_pack
from reflectron.engine.data.microbatch import Microbatch, pack, page_locked
from reflectron.engine.data.packing import CostModel, microbatch_multiple, packing_sizes, plan_packs
from reflectron.engine.data.views import SampleViews, SampleWeights, row_weights


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a global batch that enter the model, over all ranks, without padding."""

    teacher: int
    """Tokens of the teacher views of reflection samples."""
    student: int
    """Tokens of their student views."""
    generation: int
    """Tokens of generation samples."""
    saved: int
    """Tokens of reflection samples that the students did not cost: hidden, or shared with the teacher's view where the
    student sees everything."""

    @property
    def total(self) -> int:
        """All tokens that enter the model."""
        return self.teacher + self.student + self.generation


@dataclass(frozen=True)
class TermWeights:
    """Sum of the rows' weights of each term over the global batch; a weighted sum divided by it is a mean a row."""

    ce_teacher: float
    ce_student: float
    ce_generation: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One optimizer step's data."""

    microbatches: tuple[Microbatch, ...]
    """Those of this data-parallel rank, on the CPU; with context parallelism this rank's share of each."""
    members: tuple[tuple[int, ...], ...]
    """The samples of each, as positions in the global batch."""
    sequence_length: int
    """Tokens that every microbatch is padded to."""
    fill: float
    """Real tokens / padded tokens, over all ranks."""
    mask_rate: float
    """Rate of the dynamic mask."""
    tokens: TokenCounts
    """What enters the model."""
    term_weights: TermWeights
    """Weights by term."""


def assemble(
    views: Sequence[SampleViews],
    config: Config,
    cost: CostModel,
    rate: float,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> GlobalBatch:
    """Weigh and pack the samples of one global batch; ``rate`` is recorded, not used.

    Raises:
        ValueError: when a sample alone exceeds the budget of a microbatch.
    """
    return lay_out(views, row_weights(views, config.loss), config, cost, rate, data_parallel_rank, data_parallel_size)


def lay_out(
    views: Sequence[SampleViews],
    weights: Sequence[SampleWeights],
    config: Config,
    cost: CostModel,
    rate: float,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> GlobalBatch:
    """Pack samples that have been weighed; see ``assemble``."""
    budget, multiple = packing_sizes(config)
    plan = plan_packs(
        np.array([len(v.input_ids) for v in views]),
        np.array([len(v.student_positions) for v in views]),
        np.array([v.logit_rows for v in views]),
        tokens_per_microbatch=budget,
        data_parallel_size=data_parallel_size,
        cost=cost,
        microbatch_multiple=microbatch_multiple(config.parallel),
        pad_to_multiple=multiple,
    )
    own = plan.microbatches[data_parallel_rank]
    return GlobalBatch(
        microbatches=tuple(
            pack([views[i] for i in members], [weights[i] for i in members], plan.sequence_length) for members in own
        ),
        members=own,
        sequence_length=plan.sequence_length,
        fill=plan.fill,
        mask_rate=rate,
        tokens=count_tokens(views),
        term_weights=_term_weights(views, weights),
    )


def share_of_batch(batch: GlobalBatch, context_parallel_rank: int, context_parallel_size: int) -> GlobalBatch:
    """Return ``batch`` with what one context-parallel rank computes of its microbatches."""
    if context_parallel_size == 1:
        return batch
    shares = (share_of_pack(whole, context_parallel_rank, context_parallel_size) for whole in batch.microbatches)
    return replace(batch, microbatches=tuple(shares))


def count_tokens(views: Sequence[SampleViews]) -> TokenCounts:
    """Return the tokens of ``views`` by kind."""
    reflection = [v for v in views if not v.is_generation]
    teacher = sum(len(v.input_ids) for v in reflection)
    student = sum(len(v.student_positions) for v in reflection)
    generation = sum(len(v.input_ids) for v in views) - teacher
    return TokenCounts(teacher, student, generation, saved=teacher - student)


def _term_weights(views: Sequence[SampleViews], weights: Sequence[SampleWeights]) -> TermWeights:
    pairs = list(zip(views, weights, strict=True))
    return TermWeights(
        ce_teacher=sum(v.ce_teacher_rows * w.ce_teacher for v, w in pairs if not v.is_generation),
        ce_student=sum(v.ce_student_rows * w.ce_student for v, w in pairs),
        ce_generation=sum(v.ce_teacher_rows * w.ce_teacher for v, w in pairs if v.is_generation),
        kl=sum(v.kl_rows * w.kl for v, w in pairs),
    )


class GlobalBatches:
    """The global batches of a run, by step, as this rank computes them.

    Args:
        source: the samples of each step.
        config: loss weighting and batch sizes.
        cost: FLOPs that the packs are balanced by.
    """

    def __init__(
        self,
        source: BatchSource,
        config: Config,
        cost: CostModel,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        context_parallel_rank: int = 0,
        context_parallel_size: int = 1,
    ) -> None:
        self.source, self.config, self.cost = source, config, cost
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.context_parallel_rank, self.context_parallel_size = context_parallel_rank, context_parallel_size

    def batch(self, step: int) -> GlobalBatch:
        """Return the batch of 0-based ``step``.

        Raises:
            ValueError: when the source cannot give its samples.
        """
        samples = self.source.samples(step)
        whole = assemble(
            samples.views,
            self.config,
            self.cost,
            samples.mask_rate,
            self.data_parallel_rank,
            self.data_parallel_size,
        )
        return share_of_batch(whole, self.context_parallel_rank, self.context_parallel_size)

    def from_step(self, first: int, device: torch.device | None = None) -> Iterator[GlobalBatch]:
        """Yield the batches from step ``first`` to the end, each prepared while the one before it is in use, where the
        source knows steps ahead.

        For a CUDA ``device`` they lie in page-locked memory, so that the host need not wait while they are copied.
        """
        cuda = device is not None and device.type == "cuda"
        total_steps = self.source.total_steps
        if first >= total_steps:
            return

        def prepare(step: int) -> GlobalBatch:
            batch = self.batch(step)
            return replace(batch, microbatches=tuple(map(page_locked, batch.microbatches))) if cuda else batch

        if not self.source.knows_steps_ahead:
            yield from map(prepare, range(first, total_steps))
            return
        with ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="batches",
            # A thread starts on the first device, where page-locking memory would take some of that one's.
            initializer=(lambda: torch.cuda.set_device(device)) if cuda else None,
        ) as executor:
            following = executor.submit(prepare, first)
            for step in range(first, total_steps):
                current = following.result()
                if step + 1 < total_steps:
                    following = executor.submit(prepare, step + 1)
                yield current
