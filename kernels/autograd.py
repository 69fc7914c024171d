"""The distillation head as one differentiable operation, whatever computes its logits.

A backend brings the three passes over the logits; here they become the loss, its terms and its gradients. The forward
leaves ``main_grad`` alone, the upstream scale enters the row weights before anything is rounded, and a backward may be
skipped or repeated.

Legend: N pairs, M unpaired rows, R = 2N + M rows; d hidden width; V columns of this shard without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reflectron.kernels.products import without_autocast
from reflectron.kernels.softmax_statistics import (
    BackwardRows,
    Statistics,
    divergences,
    gather_shards,
    merge_statistics,
    weighted,
)
from reflectron.kernels.types import (
    IGNORE_INDEX,
    GradientBuffers,
    HeadLoss,
    HeadOperands,
    HeadOptions,
    PairRows,
    RowData,
    Rows,
)

_INSTEAD = "expected one backward through it, or a loss of torch's own operations"


class HeadPasses(Protocol):
    """The passes over the logits of one shard; all results are of its own columns only."""

    def __init__(self, inputs: HeadOperands, rows: RowData, options: HeadOptions, kept: dict[Any, Any]) -> None:
        """``kept`` is empty in the forward and comes back in the backward with what the forward left in it."""

    def statistics(self, training: bool) -> Tensor:
        """Return [5, R] in the order of ``Statistics``, ``empty_statistics`` on a shard without columns."""

    def jsd_sums(self, stats: Statistics) -> Tensor:
        """Return [2, N] sum p_t log(p_t / m) and sum p_s log(p_s / m), m the mixture."""

    def add_gradients(self, at: BackwardRows, gradients: GradientBuffers) -> None:
        """Fill and add to ``gradients``."""


@dataclass(frozen=True)
class _HeadCall:
    """The constants of a call."""

    passes: type[HeadPasses]
    rows: RowData
    options: HeadOptions
    training: bool


def apply_head(
    passes: type[HeadPasses],
    weight: Tensor,
    teacher_weight: Tensor | None,
    pairs: PairRows,
    rows: Rows,
    options: HeadOptions,
) -> HeadLoss:
    """Return the loss and its terms; shapes, gradients and errors: ``distillation_head``."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"distillation_head works under no transform of torch.func (vmap, grad, jvp); {_INSTEAD}")
    inputs = HeadOperands(weight, teacher_weight, pairs.teacher_hidden, pairs.student_hidden, rows.hidden)
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    call = _HeadCall(passes, _row_data(pairs, rows, options, weight.dtype), options, training)
    loss, terms, rows_ce = _DistillationHead.apply(*inputs, call)
    ce_teacher, ce_student, ce_rows, kl = terms.unbind()
    return HeadLoss(loss, ce_teacher, ce_student, ce_rows, kl, rows_ce)


def _row_data(pairs: PairRows, rows: Rows, options: HeadOptions, dtype: torch.dtype) -> RowData:
    compute = torch.promote_types(dtype, torch.float32)
    label = torch.cat([pairs.teacher_labels, pairs.student_labels, rows.labels])
    kl_weight = pairs.kl_weight.detach().to(compute)
    ce_teacher = pairs.ce_teacher_weight
    ce_weights = (
        torch.zeros_like(pairs.kl_weight) if ce_teacher is None else ce_teacher,
        pairs.ce_student_weight,
        rows.ce_weight,
    )
    ce_weight = torch.cat(ce_weights).detach().to(compute).masked_fill(label == IGNORE_INDEX, 0)
    needs_kl = torch.cat([kl_weight != 0, kl_weight != 0, torch.zeros_like(rows.labels, dtype=torch.bool)])
    return RowData(label - options.first_column, ce_weight, kl_weight, needs_kl | (ce_weight != 0))


class _DistillationHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        teacher_weight: Tensor | None,
        teacher: Tensor,
        student: Tensor,
        unpaired: Tensor,
        call: _HeadCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Autocast would round the factors of fp32 products, and differently in the two directions.
        with without_autocast(weight.device):
            return _forward(ctx, HeadOperands(weight, teacher_weight, teacher, student, unpaired), call)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = HeadOperands(*ctx.saved_tensors)
        with torch.no_grad(), without_autocast(inputs.weight.device):
            gradients = _backward(ctx, grad_loss, inputs)
        if torch.is_grad_enabled():
            # create_graph=True: a second derivative may follow, which would be zero if these were constants.
            gradients = [g if g is None else _NoSecondDerivative.apply(g, grad_loss, *inputs) for g in gradients]
        return *gradients, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"distillation_head has no forward-mode derivative; {_INSTEAD}")


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is; whoever differentiates it again is told that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"distillation_head has no second derivative; {_INSTEAD}")


def _forward(ctx: Any, inputs: HeadOperands, call: _HeadCall) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, its terms [4] by group and divergence, and the cross entropy [M] of the unpaired rows."""
    rows, options, kept = call.rows, call.options, dict[Any, Any]()
    shard = call.passes(inputs, rows, options, kept)
    stats = merge_statistics(gather_shards(shard.statistics(call.training), options.tp_group), options.temperature)
    # A weighted label that no shard owns lies outside the vocabulary. NaN stops the step, where reading the labels
    # back to raise an error would make every step wait for the device.
    lost = (rows.ce_weight != 0) & (stats.label_logit == -torch.inf)
    ce_weight = rows.ce_weight.masked_fill(lost, torch.nan)
    divergence, student_mean = divergences(stats, len(inputs.teacher), options, shard.jsd_sums)

    cross_entropy = weighted(ce_weight, stats.sum_exp.log() + (stats.max - stats.label_logit))
    by_group = cross_entropy.split([len(hidden) for hidden in inputs.hidden])
    kl = weighted(rows.kl_weight, options.temperature**2 * divergence).sum()
    terms = torch.stack([*(part.sum() for part in by_group), kl])
    rows_ce = by_group[2].clone()
    ctx.save_for_backward(*inputs)
    ctx.call, ctx.kept = call, kept
    ctx.at = BackwardRows(stats, student_mean, ce_weight, rows.kl_weight)
    ctx.mark_non_differentiable(terms, rows_ce)
    return terms.sum(), terms, rows_ce


def _backward(ctx: Any, grad_loss: Tensor, inputs: HeadOperands) -> list[Tensor | None]:
    """Return the gradients of ``inputs`` in their order; None where none is wanted."""
    call, at, main_grad = ctx.call, ctx.at, ctx.call.options.main_grad
    needs_weight, needs_teacher_weight, *needs_hidden = ctx.needs_input_grad[: len(inputs)]
    teacher, student, unpaired = (
        torch.zeros_like(hidden) if needed else None for hidden, needed in zip(inputs.hidden, needs_hidden, strict=True)
    )
    compute = at.ce_weight.dtype
    own = main_grad if needs_weight and main_grad is not None else _zero_sum(inputs.weight, needs_weight, compute)
    teachers = _zero_sum(inputs.teacher_weight, needs_teacher_weight, compute)
    own_sum, teachers_sum = (total if total is None else total[: call.options.columns] for total in (own, teachers))
    by_group = (own_sum if inputs.teacher_weight is None else teachers_sum, own_sum, own_sum)
    scaled = BackwardRows(at.stats, at.student_mean, at.ce_weight * grad_loss, at.kl_weight * grad_loss)
    shard = call.passes(inputs, call.rows, call.options, ctx.kept)
    shard.add_gradients(scaled, GradientBuffers((teacher, student, unpaired), by_group))

    matrices = _matrix_gradient(inputs.weight, own, main_grad), _matrix_gradient(inputs.weight, teachers, None)
    return [*matrices, teacher, student, unpaired]


def _zero_sum(matrix: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor | None:
    """Return zeros to which the gradient of the matrix is added, None where there is or needs to be none."""
    return torch.zeros_like(matrix, dtype=dtype) if matrix is not None and needed else None


def _matrix_gradient(weight: Tensor, total: Tensor | None, main_grad: Tensor | None) -> Tensor | None:
    if total is not None and total is main_grad:
        return weight.new_zeros(()).expand_as(weight)  # zeros fire the hooks of weight
    return total if total is None else total.to(weight.dtype)
