"""Makes of a tokenised sample and a mask what the teacher and the student see, and the loss of each row.

Teacher and student are one model in one forward. The student's view is the visible tokens alone, with the positions
they have in the whole sequence, which equals masking the others and costs only what is seen. Row i of a view predicts
token i + 1. A row's weight is known before the forward, so the loss of a step is a plain weighted sum over rows:
independent of packing, of the number of microbatches and of the data-parallel size.

N tokens of a sample, a = index of its last ``<|assistant|>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reflectron.engine.config import LossConfig
from reflectron.engine.data.tokenization import TokenizedSample

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class SampleViews:
    """One sample as the model sees it; every array indexes the whole sequence of N tokens."""

    input_ids: np.ndarray
    """int32 [N], the teacher's view."""
    student_positions: np.ndarray
    """int64, ascending: positions of the tokens of the student's view; empty for a generation sample, and when the
    student sees everything, so that the teacher's view serves both."""
    rows: np.ndarray
    """int64: rows with the teacher's cross entropy alone (all rows of a generation sample)."""
    pair_rows: np.ndarray
    """int64: rows a-1 .. N-2, where teacher and student predict the same token; empty for a generation sample."""
    pair_teacher_labels: np.ndarray
    """int64, aligned with ``pair_rows``; -100 where the teacher's cross entropy skips the row."""
    pair_student_labels: np.ndarray
    """int64, aligned with ``pair_rows``; -100 on the row that predicts EOS."""

    @property
    def is_generation(self) -> bool:
        """True when there is no student."""
        return len(self.pair_rows) == 0

    @property
    def ce_teacher_rows(self) -> int:
        """Rows of the teacher's cross entropy."""
        return len(self.rows) + int((self.pair_teacher_labels != IGNORED).sum())

    @property
    def ce_student_rows(self) -> int:
        """Rows of the student's cross entropy: a-1 .. N-3."""
        return max(len(self.pair_rows) - 1, 0)

    @property
    def kl_rows(self) -> int:
        """Rows of the divergence: a .. N-2."""
        return max(len(self.pair_rows) - 1, 0)

    @property
    def logit_rows(self) -> int:
        """Rows of both views that need logits."""
        return len(self.rows) + 2 * len(self.pair_rows)


def make_views(sample: TokenizedSample, visible: np.ndarray | None) -> SampleViews:
    """Return the views of one sample.

    Args:
        sample: the tokens.
        visible: bool [N], what the student sees; None for a generation sample.
    """
    labels = np.where(sample.supervised, sample.input_ids, IGNORED).astype(np.int64)[1:]
    supervised_rows = np.flatnonzero(labels != IGNORED)
    if visible is None:
        pair_rows = np.empty(0, dtype=np.int64)
    else:
        pair_rows = np.arange(sample.final_start - 1, len(sample.input_ids) - 1, dtype=np.int64)
    student_labels = sample.input_ids[pair_rows + 1].astype(np.int64)
    student_labels[-1:] = IGNORED
    return SampleViews(
        input_ids=sample.input_ids,
        student_positions=np.empty(0, dtype=np.int64) if visible is None or visible.all() else np.flatnonzero(visible),
        rows=supervised_rows if visible is None else supervised_rows[supervised_rows < sample.final_start - 1],
        pair_rows=pair_rows,
        pair_teacher_labels=labels[pair_rows],
        pair_student_labels=student_labels,
    )


@dataclass(frozen=True)
class SampleWeights:
    """Weight of each row of a sample in the loss of the step, by term."""

    ce_teacher: float
    ce_student: float
    kl: float


def row_weights(views: Sequence[SampleViews], loss: LossConfig) -> list[SampleWeights]:
    """Return the weights under which the sum over all rows of a global batch is its loss.

    ``sample``: the mean over samples of (sum of both cross entropies / their rows + divergence / its rows), as
    ReflectionCoder trains with one sample per device. ``token``: each term's mean over all its rows in the batch. Rows
    of a cross entropy with factor 0 do not count: without the student's, what is left is plain next-token prediction.
    """
    ce_rows = [
        v.ce_teacher_rows * bool(loss.ce_teacher_weight) + v.ce_student_rows * bool(loss.ce_student_weight)
        for v in views
    ]
    kl_rows = [v.kl_rows for v in views]
    if loss.weighting == "token":
        return [_scaled(loss, 1 / max(sum(ce_rows), 1), 1 / max(sum(kl_rows), 1))] * len(views)
    samples = len(views)
    return [
        _scaled(loss, 1 / (samples * max(ce, 1)), 1 / (samples * max(kl, 1)))
        for ce, kl in zip(ce_rows, kl_rows, strict=True)
    ]


def _scaled(loss: LossConfig, ce: float, kl: float) -> SampleWeights:
    return SampleWeights(loss.ce_teacher_weight * ce, loss.ce_student_weight * ce, loss.kl_weight * kl)
