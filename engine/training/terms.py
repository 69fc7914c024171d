"""The terms of the loss, named here once; all that sums, averages, records, prints or draws them walks ``TERMS``.

A new term is a field of ``LossTerms`` with its label, a line of ``mean_terms``, and the code that computes it: its sum
in ``PackLoss`` and its weight in ``TermWeights``. A place that is forgotten is a type error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

from typing_extensions import Self

from reflectron.engine.data.global_batch import TermWeights

LossT = TypeVar("LossT")
TermT = TypeVar("TermT")


@dataclass(frozen=True)
class TermLabel:
    """How a term is shown to a person."""

    name: str
    """Word for it in a line of the log."""
    title: str
    """Its name in a plot."""
    decimals: int = 3
    """Digits after the point in a line of the log."""
    own_axis: bool = False
    """It is drawn on an axis of its own, for its size differs from the loss's."""


@dataclass(frozen=True, kw_only=True)
class LossTerms(Generic[LossT, TermT]):
    """A value for the loss and for each of its terms, in nats."""

    loss: Annotated[LossT, TermLabel("loss", "loss")]
    """Loss of the global batch, before the update; null when it is not finite, as any number here."""
    ce_teacher: Annotated[TermT, TermLabel("teacher", "CE teacher")]
    """Mean cross entropy of the teacher's loss tokens, by their weights; null when there are none."""
    ce_student: Annotated[TermT, TermLabel("student", "CE student")]
    """Mean cross entropy of the student's loss tokens."""
    ce_generation: Annotated[TermT, TermLabel("gen", "CE generation")]
    """Mean cross entropy of generation samples' loss tokens."""
    kl: Annotated[TermT, TermLabel("kl", "KL teacher to student", decimals=4, own_axis=True)]
    """Mean divergence of the student from the teacher, times temperature squared."""

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """Return the terms whose values stand in the order of ``TERMS``."""
        return cls(**dict(zip(TERMS, values, strict=True)))

    def values(self) -> list[LossT | TermT]:
        """Return the values in the order of ``TERMS``."""
        return [getattr(self, term) for term in TERMS]


def _labels() -> dict[str, TermLabel]:
    hints = get_type_hints(LossTerms, include_extras=True)
    return {term: hint.__metadata__[0] for term, hint in hints.items()}


TERMS = _labels()
"""The loss and its terms by name, in the order of every vector and row that holds them."""

LossSums = LossTerms[float, float]
"""Weighted sums over loss tokens."""
MeanTerms = LossTerms[float, float | None]
"""Means over loss tokens by their weights; a term without any in the batch is None."""


def mean_terms(sums: LossSums, weights: TermWeights) -> MeanTerms:
    """Divide the sums of a global batch by the sums of their weights; the loss is a weighted sum and stays."""

    def mean(total: float, weight: float) -> float | None:
        return total / weight if weight else None

    return MeanTerms(
        loss=sums.loss,
        ce_teacher=mean(sums.ce_teacher, weights.ce_teacher),
        ce_student=mean(sums.ce_student, weights.ce_student),
        ce_generation=mean(sums.ce_generation, weights.ce_generation),
        kl=mean(sums.kl, weights.kl),
    )
