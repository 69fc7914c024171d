"""The distillation head as one differentiable operation, whatever computes its logits.

A backend brings the three passes over the logits; here they become the loss, its terms and its gradients. The forward
leaves ``main_grad`` alone, the upstream scale enters the row weights before anything is rounded, and a backward may be
skipped or repeated.

Legend: N pairs, M unpaired rows, R = 2N + M rows; d hidden width; V columns of this shard without padding.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from reflectron.kernels.products import without_autocast
from reflectron.kernels.softmax_statistics import (
    IGNORE_INDEX,
    Groups,
    HeadOptions,
    RowData,
    Statistics,
    divergences,
    gather_shards,
    merge_statistics,
    weighted,
)

Codes = dict[Any, Any]


_INSTEAD = "expected one backward through it, or a loss of torch's own operations"


class Passes(Protocol):
    """The passes over the logits of one shard; all results are of its own columns only."""

    def __init__(self, weight: Tensor, hidden: Groups, rows: RowData, options: HeadOptions, kept: Codes) -> None:
        """``kept`` is empty in the forward and comes back in the backward with what the forward left in it."""

    def statistics(self, training: bool) -> Tensor:
        """[5, R] in the order of ``Statistics``; max and label logit -inf, sums 0 on a shard without columns."""

    def jsd_sums(self, stats: Statistics) -> Tensor:
        """[2, N] sum p_t log(p_t / m) and sum p_s log(p_s / m), m the mixture."""

    def add_gradients(
        self,
        stats: Statistics,
        student_mean: Tensor,
        ce_weight: Tensor,
        kl_weight: Tensor,
        grad_hidden: list[Tensor | None],
        grad_weight: Tensor | None,
    ) -> None:
        """Fill the zeros of ``grad_hidden`` and add to ``grad_weight`` [V, d]; None is not wanted."""


def apply_head(
    passes: type[Passes],
    weight: Tensor,
    hidden: Groups,
    labels: Groups,
    ce_weights: Groups,
    kl_weight: Tensor,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-dim, differentiable), its detached terms [4] CE teacher, CE student, CE unpaired, divergence, and the
    weighted cross entropy [M] of each unpaired row, detached.

    Triples hold teacher [N], student [N] and unpaired [M] rows. Shapes, gradients and errors: ``distillation_head``.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"distillation_head works under no transform of torch.func (vmap, grad, jvp); {_INSTEAD}")
    compute = torch.promote_types(weight.dtype, torch.float32)
    label, kl_weight = torch.cat(labels), kl_weight.detach().to(compute)
    ce_weight = torch.cat(ce_weights).detach().to(compute).masked_fill(label == IGNORE_INDEX, 0)
    needs_kl = torch.cat([kl_weight != 0, kl_weight != 0, torch.zeros_like(labels[2], dtype=torch.bool)])
    rows = RowData(label - options.first_column, ce_weight, kl_weight, needs_kl | (ce_weight != 0))
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *hidden))
    loss, terms, unpaired = _DistillationHead.apply(weight, *hidden, rows, options, passes, training)
    return loss, terms, unpaired


class _DistillationHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        teacher: Tensor,
        student: Tensor,
        unpaired: Tensor,
        rows: RowData,
        options: HeadOptions,
        passes: type[Passes],
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Autocast would round the factors of fp32 products, and differently in the two directions.
        with without_autocast(weight.device):
            return _forward(ctx, weight, (teacher, student, unpaired), rows, options, passes, training)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with torch.no_grad(), without_autocast(inputs[0].device):
            gradients = _backward(ctx, grad_loss, *inputs)
        if torch.is_grad_enabled():
            # create_graph=True: a second derivative may follow, which would be zero if these were constants.
            gradients = [g if g is None else _NoSecondDerivative.apply(g, grad_loss, *inputs) for g in gradients]
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"distillation_head has no forward-mode derivative; {_INSTEAD}")


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient as it is; whoever differentiates it again is told that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"distillation_head has no second derivative; {_INSTEAD}")


def _forward(
    ctx: Any,
    weight: Tensor,
    hidden: Groups,
    rows: RowData,
    options: HeadOptions,
    passes: type[Passes],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = Codes()
    shard = passes(weight, hidden, rows, options, kept)
    stats = merge_statistics(gather_shards(shard.statistics(training), options.tp_group), options.temperature)
    # A weighted label that no shard owns lies outside the vocabulary. NaN stops the step, where reading the labels
    # back to raise an error would make every step wait for the device.
    lost = (rows.ce_weight != 0) & (stats.label_logit == -torch.inf)
    ce_weight = rows.ce_weight.masked_fill(lost, torch.nan)
    divergence, student_mean = divergences(stats, len(hidden[0]), options, shard.jsd_sums)

    cross_entropy = weighted(ce_weight, stats.sum_exp.log() + (stats.max - stats.label_logit))
    by_group = cross_entropy.split([len(h) for h in hidden])
    terms = [part.sum() for part in by_group]
    terms.append(weighted(rows.kl_weight, options.temperature**2 * divergence).sum())
    values = torch.stack(terms)
    ctx.save_for_backward(weight, *hidden)
    ctx.rows, ctx.options, ctx.passes, ctx.stats, ctx.kept = rows, options, passes, stats, kept
    ctx.ce_weight, ctx.student_mean = ce_weight, student_mean
    row_values = by_group[2].clone()
    ctx.mark_non_differentiable(values, row_values)
    return values.sum(), values, row_values


def _backward(ctx: Any, grad_loss: Tensor, weight: Tensor, *hidden: Tensor) -> list[Tensor | None]:
    """Gradients of ``weight`` and of the three groups of hidden rows; None where none is wanted."""
    rows, options = ctx.rows, ctx.options
    ce_weight, kl_weight = ctx.ce_weight * grad_loss, rows.kl_weight * grad_loss
    needs_weight, *needs_hidden = ctx.needs_input_grad[:4]
    grad_hidden = [torch.zeros_like(h) if need else None for h, need in zip(hidden, needs_hidden, strict=True)]
    grad_weight = options.main_grad if needs_weight else None
    if needs_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight, dtype=ce_weight.dtype)
    own_columns = None if grad_weight is None else grad_weight[: options.columns]
    shard = ctx.passes(weight, hidden, rows, options, ctx.kept)
    shard.add_gradients(ctx.stats, ctx.student_mean, ce_weight, kl_weight, grad_hidden, own_columns)

    if grad_weight is not None and grad_weight is options.main_grad:
        grad_weight = weight.new_zeros(()).expand_as(weight)  # zeros fire the hooks of weight
    elif grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return [grad_weight, *grad_hidden]
