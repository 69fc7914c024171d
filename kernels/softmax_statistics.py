"""Softmax statistics of rows, their merge over shards of the vocabulary, and the divergences that follow from them.

Every backend shares them. Statistics are a few numbers a row, merged in rank order from one collective, so all ranks
hold the same bits.

Legend
  N pairs, M unpaired rows, R = 2N + M rows in the order teacher, student, unpaired; tp shards of the vocabulary
  z logits; T temperature; p softmax(z), in the divergence softmax(z / T); suffix t teacher, s student
  x = (z_t - z_s) / T; u = log p_t - log p_s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import assert_never

from reflectron.kernels.types import HeadOptions


class Statistics(NamedTuple):
    """Softmax statistics; each field [R], or [tp, R] before the merge."""

    max: Tensor  # m = max z
    sum_exp: Tensor  # sum e^(z - m)
    sum_exp_t: Tensor  # sum e^((z - m) / T)
    label_logit: Tensor  # -inf where no shard so far owns the label
    sum_x: Tensor  # sum e^((z - m) / T) x; 0 for unpaired rows

    def at(self, rows: slice) -> Statistics:
        return Statistics(*(field[rows] for field in self))


@dataclass(frozen=True)
class BackwardRows:
    """What is known of the rows before the backward."""

    stats: Statistics  # of the whole vocabulary
    student_mean: Tensor  # [N] E_s[score], see ``divergences``
    ce_weight: Tensor  # [R] with the upstream scale inside
    kl_weight: Tensor  # [N] likewise


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight x value, exactly 0 where the weight is 0 even if the value is not finite."""
    return (weight * value).masked_fill_(weight == 0, 0)


def empty_statistics(ce_weight: Tensor) -> Tensor:
    """Return [5, R] statistics of a shard without columns, in the order of ``Statistics``."""
    local = ce_weight.new_zeros(5, len(ce_weight))
    local[0] = local[3] = -torch.inf
    return local


def gather_shards(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return [tp, ...] from every rank's [...]: all of them reduce the same numbers in rank order, to the same bits."""
    if group is None:
        return local[None]
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    return torch.stack(gathered)


def merge_statistics(shards: Tensor, temperature: float) -> Statistics:
    """Return statistics of the whole vocabulary from [tp, 5, R]; ``empty_statistics`` add nothing."""
    part = Statistics(*shards.unbind(1))
    peak = part.max.amax(0)
    scale, scale_t = (part.max - peak).exp(), ((part.max - peak) / temperature).exp()
    return Statistics(
        max=peak,
        sum_exp=(part.sum_exp * scale).sum(0),
        sum_exp_t=(part.sum_exp_t * scale_t).sum(0),
        label_logit=part.label_logit.amax(0),
        sum_x=(part.sum_x * scale_t).sum(0),
    )


def divergences(
    stats: Statistics, pairs: int, options: HeadOptions, jsd_sums: Callable[[Statistics], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the divergence [N], without T^2, and the student's mean score E_s[score] [N] that its gradient needs.

    ``score`` is the derivative in log p_s: -u for the reverse KL, -log(m / p_s) for the JSD; the forward KL needs none.
    ``jsd_sums`` gives this shard's [2, N] of sum p_t log(p_t / m) and sum p_s log(p_s / m).
    """
    t, s = stats.at(slice(0, pairs)), stats.at(slice(pairs, 2 * pairs))
    if options.divergence == "forward_kl":
        forward = t.sum_x / t.sum_exp_t - log_partition_ratio(t, s, options.temperature)
        return forward, forward
    if options.divergence == "reverse_kl":
        reverse = log_partition_ratio(t, s, options.temperature) - s.sum_x / s.sum_exp_t
        return reverse, reverse
    if options.divergence == "jsd":
        # A second collective: u needs the partition functions of the whole vocabulary.
        teacher_kl, student_kl = gather_shards(jsd_sums(stats), options.tp_group).sum(0)
        return options.jsd_beta * teacher_kl + (1 - options.jsd_beta) * student_kl, student_kl
    assert_never(options.divergence)


def log_partition_ratio(t: Statistics, s: Statistics, temperature: float) -> Tensor:
    """Return log Z_t - log Z_s [n] at temperature T, as a ratio: at small divergence the logarithms nearly cancel."""
    return (t.max - s.max) / temperature + (t.sum_exp_t / s.sum_exp_t).log()
