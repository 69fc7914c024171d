"""What the distillation head takes and returns: rows, options and results, each named here once.

``distill_head.distillation_head`` explains the options. Legend: N pairs, M unpaired rows, R = 2N + M rows in the order
teacher, student, unpaired; d hidden width, d_t the teacher's; V_local columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple, get_type_hints

import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
HeadBackend = Literal["auto", "reference", "triton"]
FieldKind = Literal["teacher_hidden", "hidden", "label", "weight"]

Groups = tuple[Tensor, Tensor, Tensor]  # one tensor each for teacher [N, ...], student [N, ...], unpaired [M, ...]
OptionalGroups = tuple[Tensor | None, Tensor | None, Tensor | None]


# ---- rows ----


@dataclass(frozen=True)
class PairRows:
    """N aligned rows of teacher and student. Labels are vocabulary ids; -100 means no cross entropy on that side."""

    teacher_hidden: Annotated[Tensor, "teacher_hidden"]  # [N, d_t], dtype of the output matrix
    student_hidden: Annotated[Tensor, "hidden"]  # [N, d]
    teacher_labels: Annotated[Tensor, "label"]  # [N] int64
    student_labels: Annotated[Tensor, "label"]  # [N] int64
    ce_teacher_weight: Annotated[Tensor | None, "weight"]  # [N] float32; None: the teacher only teaches, no backward
    ce_student_weight: Annotated[Tensor, "weight"]  # [N] float32
    kl_weight: Annotated[Tensor, "weight"]  # [N] float32


@dataclass(frozen=True)
class Rows:
    """M rows with a cross entropy only. Labels are vocabulary ids; -100 means none."""

    hidden: Annotated[Tensor, "hidden"]  # [M, d], dtype of the output matrix
    labels: Annotated[Tensor, "label"]  # [M] int64
    ce_weight: Annotated[Tensor, "weight"]  # [M] float32


def field_kinds(rows: type[PairRows] | type[Rows]) -> dict[str, FieldKind]:
    """Return the kind of every field, as its annotation states it."""
    hints = get_type_hints(rows, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in fields(rows)}


class HeadOperands(NamedTuple):
    """What the head is differentiated in, in the order of its gradients."""

    weight: Tensor  # [V_local, d]
    teacher_weight: Tensor | None  # [V_local, d_t]; None: the teacher shares ``weight``
    teacher: Tensor  # [N, d_t]
    student: Tensor  # [N, d]
    unpaired: Tensor  # [M, d]

    @property
    def hidden(self) -> Groups:
        return self.teacher, self.student, self.unpaired


@dataclass(frozen=True)
class RowData:
    """What is known of the rows before the forward."""

    column: Tensor  # [R] the label's column in this shard; outside 0..V-1 it is another shard's
    ce_weight: Tensor  # [R], 0 for ignored labels
    kl_weight: Tensor  # [N]
    active: Tensor  # [R] bool: some weight of the row is not 0


# ---- options ----


@dataclass(frozen=True)
class HeadOptions:
    """What a call fixes besides its rows."""

    divergence: Divergence  # where it is "jsd", jsd_beta is strictly between 0 and 1
    jsd_beta: float
    temperature: float
    first_column: int  # vocabulary id of the shard's column 0
    columns: int  # V; the columns of the shard behind them are padding
    teacher_learns: bool  # its rows have a cross entropy, and thus a gradient
    tp_group: dist.ProcessGroup | None
    main_grad: Tensor | None


# ---- results ----


@dataclass(frozen=True)
class HeadTerms:
    """The loss and its terms, each 0-dim; float32 (float64 for float64 inputs), alike to the bit on all ranks."""

    loss: Tensor
    """Sum of the four terms below; differentiable."""
    ce_teacher: Tensor
    """Sum of ce_teacher_weight x cross entropy; detached, as are the next three."""
    ce_student: Tensor
    """Sum of ce_student_weight x cross entropy."""
    ce_rows: Tensor
    """Sum of ce_weight x cross entropy over the unpaired rows."""
    kl: Tensor
    """Sum of kl_weight x temperature^2 x divergence."""


@dataclass(frozen=True)
class HeadLoss(HeadTerms):
    """The loss, its terms, and the cross entropy of every unpaired row."""

    rows_ce: Tensor
    """[M] ce_weight x cross entropy of each unpaired row, detached; their sum is ``ce_rows``."""


@dataclass(frozen=True)
class GradientBuffers:
    """Where the backward writes, by group of rows; None is not wanted."""

    hidden: OptionalGroups  # zeros, to be filled
    matrix: OptionalGroups  # [V, d] sums, to be added to; one tensor for all groups that share a matrix
