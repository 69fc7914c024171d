"""The distillation head in plain torch: the specification of its mathematics, as passes over full logits.

Hidden rows come in three groups (teacher, student, unpaired), and logits exist for one chunk of rows at a time. The
forward keeps nothing; the backward recomputes the logits. Against gradients made in the forward this costs one matrix
product in four, and buys that a forward alone does no extra work and no gradient waits in memory between the two.

Legend
  N pairs, M unpaired rows, R = 2N + M rows in the order teacher, student, unpaired; n rows of a chunk
  d hidden width, the teacher's may differ; V columns of this shard without padding, V_local with
  z [n, V] logits; T temperature; p softmax(z), in the divergence softmax(z / T); suffix t teacher, s student
  x [n, V] = (z_t - z_s) / T; u [n, V] = log p_t - log p_s; dz [n, V] gradient of the loss in z
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import assert_never

from reflectron.kernels.products import add_product, as_factor, product, store_product
from reflectron.kernels.softmax_statistics import (
    BackwardRows,
    Statistics,
    empty_statistics,
    log_partition_ratio,
    weighted,
)
from reflectron.kernels.types import GradientBuffers, Groups, HeadOperands, HeadOptions, RowData

# Elements of one logits buffer: 64 MiB in fp32, of which the backward holds about fourteen. A chunk also reads and
# writes the fp32 sum of the weight's gradient, which this size keeps cheap beside the passes over the logits.
MAX_CHUNK_LOGITS = 2**24


class GroupPart(NamedTuple):
    """The rows of one group that a chunk takes."""

    group: int  # 0 teacher, 1 student, 2 unpaired
    local: slice  # in the group
    flat: slice  # among all R


class ReferencePasses:
    """``HeadPasses`` in plain torch, for every type; keeps nothing from the forward to the backward."""

    def __init__(self, inputs: HeadOperands, rows: RowData, options: HeadOptions, kept: dict[Any, Any]) -> None:
        self.hidden, self.rows, self.options = inputs.hidden, rows, options
        own = teachers = as_factor(inputs.weight[: options.columns])
        if inputs.teacher_weight is not None:
            teachers = as_factor(inputs.teacher_weight[: options.columns])
        self.matrices = (teachers, own, own)

    def statistics(self, training: bool) -> Tensor:
        local = empty_statistics(self.rows.ce_weight)
        for parts in self._chunks():
            self._fill_statistics(parts, local)
        return local

    def jsd_sums(self, stats: Statistics) -> Tensor:
        local = stats.max.new_zeros(2, len(self.rows.kl_weight))
        for parts in self._chunks():
            if len(parts) == 2:
                self._fill_jsd_sums(parts, stats, local)
        return local

    def add_gradients(self, at: BackwardRows, gradients: GradientBuffers) -> None:
        for parts in self._chunks():
            h, dz = self._logit_gradients(parts, at)
            for part, chunk, gradient in zip(parts, h, dz, strict=True):
                if part.group == 0 and not self.options.teacher_learns:
                    continue
                gradient = gradient.to(chunk.dtype)
                if (hidden := gradients.hidden[part.group]) is not None:
                    store_product(gradient, self.matrices[part.group], hidden[part.local])
                if (total := gradients.matrix[part.group]) is not None:
                    add_product(total, gradient.T, chunk)

    def _chunks(self) -> Iterator[tuple[GroupPart, ...]]:
        return chunks(len(self.hidden[0]), len(self.hidden[2]), self.options.columns)

    # The passes over one chunk are functions of their own, so that its logits are freed before the next one's come.

    def _logits(self, parts: tuple[GroupPart, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden rows as factors, and their logits."""
        h = [chunk_rows(self.hidden, self.rows, part) for part in parts]
        return h, [product(chunk, self.matrices[part.group].T) for part, chunk in zip(parts, h, strict=True)]

    def _fill_statistics(self, parts: tuple[GroupPart, ...], local: Tensor) -> None:
        temperature, (_, z) = self.options.temperature, self._logits(parts)
        x = (z[0] - z[1]) / temperature if len(parts) == 2 else None
        for part, logits in zip(parts, z, strict=True):
            local[:, part.flat] = row_statistics(logits, self.rows.column[part.flat], x, temperature)

    def _fill_jsd_sums(self, parts: tuple[GroupPart, ...], stats: Statistics, local: Tensor) -> None:
        _, (z_t, z_s) = self._logits(parts)
        t, s = (stats.at(part.flat) for part in parts)
        p_t, p_s, u = pair_softmax(z_t, z_s, t, s, self.options.temperature)
        g = log_mixture_ratio(u, self.options.jsd_beta)
        local[:, parts[0].local] = torch.stack([(p_t * (u - g)).sum(1), -(p_s * g).sum(1)])

    def _logit_gradients(self, parts: tuple[GroupPart, ...], at: BackwardRows) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden rows as factors, and dz."""
        h, z = self._logits(parts)
        stats = [at.stats.at(part.flat) for part in parts]
        dz = [ce_gradient(z[i], self.rows.column[p.flat], at.ce_weight[p.flat], stats[i]) for i, p in enumerate(parts)]
        if len(parts) == 2:
            pairs = parts[0].local
            slope = divergence_slope(z[0], z[1], stats[0], stats[1], at.student_mean[pairs], self.options)
            dz[1] += weighted((at.kl_weight[pairs] * self.options.temperature)[:, None], slope)
        return h, dz


# ---- rows ----


def chunks(pairs: int, unpaired: int, columns: int) -> Iterator[tuple[GroupPart, ...]]:
    """Yield (teacher, student) parts of the pairs, then (unpaired,) parts; none for a shard that is all padding."""
    step = max(1, MAX_CHUNK_LOGITS // max(columns, 1))
    for start in range(0, pairs if columns else 0, step):
        end = min(start + step, pairs)
        local = slice(start, end)
        yield GroupPart(0, local, local), GroupPart(1, local, slice(pairs + start, pairs + end))
    for start in range(0, unpaired if columns else 0, step):
        end = min(start + step, unpaired)
        yield (GroupPart(2, slice(start, end), slice(2 * pairs + start, 2 * pairs + end)),)


def chunk_rows(hidden: Groups, rows: RowData, part: GroupPart) -> Tensor:
    """Return a part's rows as a factor, inactive ones zero: 0 times infinity must not reach the matrix's gradient.

    The copy is fresh, so equal teacher and student rows have equal alignment and give bitwise equal logits.
    """
    return as_factor(hidden[part.group][part.local].masked_fill(~rows.active[part.flat, None], 0))


# ---- statistics ----


def row_statistics(z: Tensor, column: Tensor, x: Tensor | None, temperature: float) -> Tensor:
    """Return [5, n] statistics of logits [n, V]; ``x`` is None for unpaired rows, which have no divergence."""
    peak = z.amax(1)
    centred = z - peak[:, None]
    exp = centred.exp()
    owned, index = ownership(column, z)
    label_logit = z.gather(1, index[:, None])[:, 0].masked_fill(~owned, -torch.inf)
    sum_exp = exp.sum(1)
    if x is None:
        return torch.stack([peak, sum_exp, sum_exp, label_logit, torch.zeros_like(peak)])
    if temperature != 1:
        exp = (centred / temperature).exp()
    return torch.stack([peak, sum_exp, exp.sum(1), label_logit, (exp * x).sum(1)])


def ownership(column: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels [n] lie in the shard, and their column, 0 for the others."""
    owned = (column >= 0) & (column < z.shape[1])
    return owned, column.masked_fill(~owned, 0)


# ---- divergence ----


def pair_softmax(
    z_t: Tensor, z_s: Tensor, t: Statistics, s: Statistics, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p_t, p_s and u = log p_t - log p_s, all [n, V], at temperature T."""
    p_t, p_s = (
        ((z - stat.max[:, None]) / temperature).exp() / stat.sum_exp_t[:, None] for z, stat in ((z_t, t), (z_s, s))
    )
    return p_t, p_s, (z_t - z_s) / temperature - log_partition_ratio(t, s, temperature)[:, None]


def log_mixture_ratio(u: Tensor, beta: float) -> Tensor:
    """Return g = log(m / p_s) = log(1 - beta + beta e^u), exact at u = 0 and without overflow."""
    shrink = torch.expm1(-u.abs())
    return torch.where(u > 0, u + torch.log1p((1 - beta) * shrink), torch.log1p(beta * shrink))


# ---- gradients ----


def ce_gradient(z: Tensor, column: Tensor, weight: Tensor, stats: Statistics) -> Tensor:
    """Return dz = weight (p - 1_label)."""
    owned, index = ownership(column, z)
    dz = (z - stats.max[:, None]).exp() * (weight / stats.sum_exp)[:, None]
    dz.scatter_add_(1, index[:, None], weight.neg().masked_fill(~owned, 0)[:, None])
    return dz.masked_fill_(weight[:, None] == 0, 0)


def divergence_slope(
    z_t: Tensor, z_s: Tensor, t: Statistics, s: Statistics, student_mean: Tensor, options: HeadOptions
) -> Tensor:
    """Return T x the divergence's derivative in z_s: p_s - p_t, or factor p_s (score - E_s[score])."""
    p_t, p_s, u = pair_softmax(z_t, z_s, t, s, options.temperature)
    if options.divergence == "forward_kl":
        # p_s - p_t without cancellation where the two are close.
        return u.sign() * torch.maximum(p_t, p_s) * torch.expm1(-u.abs())
    if options.divergence == "reverse_kl":
        return p_s * (-u - student_mean[:, None])
    if options.divergence == "jsd":
        g = log_mixture_ratio(u, options.jsd_beta)
        return (1 - options.jsd_beta) * p_s * (-g - student_mean[:, None])
    assert_never(options.divergence)
