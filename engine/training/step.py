"""One optimizer step: forward and backward over the microbatches, reduction, clipping, update; and validation.

The loss of a step is a weighted sum over loss tokens whose weights the batch brings along, so nothing here divides by
tokens, microbatches or replicas. The host waits for the device once, in ``_outcome``, between backward and update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import StepSamples
from reflectron.engine.data.global_batch import GlobalBatch, assemble, share_of_batch
from reflectron.engine.data.microbatch import Microbatch, to_device
from reflectron.engine.data.packing import CostModel
from reflectron.engine.model.attention import PackedRows
from reflectron.engine.optim.optimizer import set_learning_rate, squared_gradient_norm, update
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.terms import TERMS, LossSums, MeanTerms, mean_terms


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The numbers of one step, the same on all ranks."""

    terms: MeanTerms
    """Loss and its terms before the update."""
    grad_norm: float
    """L2 norm of the whole gradient before clipping."""
    skipped: bool
    """Loss or gradient were not finite, so weights and optimizer are as before."""


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    batch: GlobalBatch,
    learning_rate: float,
) -> StepResult:
    """Train on one global batch; skip the update where loss or gradient are not finite. Every rank calls it."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = forward_backward(chunks, groups, batch)
    result = _outcome(sums, squared_gradient_norm(optimizer), batch, groups)
    if not result.skipped:
        set_learning_rate(optimizer, learning_rate)
        update(optimizer, result.grad_norm)
    return result


def _outcome(sums: torch.Tensor, squared_norm: torch.Tensor, batch: GlobalBatch, groups: ParallelGroups) -> StepResult:
    """Read loss and gradient norm from the device together, and decide for all ranks whether the update is skipped."""
    # Each replica may have measured the norm for itself; one must never update while another does not.
    not_finite = squared_norm.isfinite().logical_not().double()
    summed = torch.cat((_sums_of_this_rank(sums, groups), not_finite))
    dist.all_reduce(summed)
    *totals, ranks_not_finite, square = torch.cat((summed, squared_norm.double())).tolist()
    terms = mean_terms(LossSums.of(totals), batch.term_weights)
    skipped = ranks_not_finite > 0 or not math.isfinite(terms.loss)
    return StepResult(terms=terms, grad_norm=math.sqrt(square), skipped=skipped)


def forward_backward(
    chunks: Sequence[torch.nn.Module], groups: ParallelGroups, batch: GlobalBatch, forward_only: bool = False
) -> torch.Tensor:
    """Run this rank's microbatches through the pipeline; gradients accumulate in the model, reduced over all ranks.

    Args:
        chunks: this rank's part of the model.
        groups: process groups.
        batch: its microbatches.
        forward_only: compute no gradients.

    Returns:
        Weighted sums of the loss terms of each of this rank's microbatches, [microbatches, terms] float32 in the order
        of ``TERMS``; empty on pipeline stages other than the last.
    """
    microbatches = [to_device(microbatch, groups.device) for microbatch in batch.microbatches]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every chunk runs all of them.
        data_iterator=[_ticking(microbatches, groups) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=batch.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not results:
        return torch.empty(0, len(TERMS), device=groups.device)
    return torch.stack([result["terms"] for result in results])


def _ticking(microbatches: Sequence[Microbatch], groups: ParallelGroups) -> Iterator[Microbatch]:
    for microbatch in microbatches:
        groups.progress.tick()
        yield microbatch


def forward_step(
    data_iterator: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]]:
    """Return this stage's output and the function that takes the loss from it: megatron-core's forward step."""
    return run_model(model, next(data_iterator)), _take_loss


def run_model(model: torch.nn.Module, microbatch: Microbatch) -> torch.Tensor:
    """Return this rank's stage's output for one microbatch on its device."""
    output: torch.Tensor = model(
        input_ids=microbatch.tokens[None],
        position_ids=microbatch.position_ids[None],
        attention_mask=None,
        labels=microbatch.loss_rows,
        packed_seq_params=PackedRows(
            segments=microbatch.segments, position_ids=microbatch.position_ids, key_index=microbatch.key_index
        ),
    )
    return output


def _take_loss(terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    # Three results keep megatron-core from dividing by the number of microbatches. The token count is not used:
    # it must be an integer tensor that can be summed. On CUDA a pipeline frees its outputs, which a view must not be.
    return terms[0].clone(), torch.zeros((), dtype=torch.int, device=terms.device), {"terms": terms.detach()}


def reduce_terms(sums: torch.Tensor, batch: GlobalBatch, groups: ParallelGroups) -> MeanTerms:
    """Return loss and mean terms of the global batch from every rank's weighted sums; the same on all ranks."""
    mine = _sums_of_this_rank(sums, groups)
    dist.all_reduce(mine)
    return mean_terms(LossSums.of(mine.tolist()), batch.term_weights)


def _sums_of_this_rank(sums: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Return what this rank adds to the terms of the global batch, [terms] float64."""
    mine = sums.sum(dim=0).double()
    # All tensor-parallel ranks of a last stage hold the same sums, so one of them speaks; context-parallel ranks hold
    # those of their own rows.
    if not groups.is_last_stage or groups.tp.rank() != 0:
        mine = torch.zeros_like(mine)
    return mine


def validate(
    chunks: Sequence[torch.nn.Module], samples: StepSamples, config: Config, cost: CostModel, groups: ParallelGroups
) -> MeanTerms:
    """Return the loss terms over ``samples`` as one global batch; every rank calls it and gets the same."""
    whole = assemble(samples.views, config, cost, samples.mask_rate, groups.dp.rank(), groups.dp.size())
    batch = share_of_batch(whole, groups.cp.rank(), groups.cp.size())
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        sums = forward_backward(chunks, groups, batch, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return reduce_terms(sums, batch, groups)
