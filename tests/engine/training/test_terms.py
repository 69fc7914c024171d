"""The loss terms: one order everywhere, means where there are loss tokens, a label for each."""

from __future__ import annotations

from dataclasses import fields

from reflectron.engine.data.global_batch import TermWeights
from reflectron.engine.training.metrics import StepMetrics
from reflectron.engine.training.terms import TERMS, LossSums, LossTerms, mean_terms
from reflectron.tools.run_log import describe_terms


def test_vectors_and_fields_have_one_order() -> None:
    sums = LossSums.of([5.0, 4.0, 3.0, 2.0, 1.0])
    assert sums == LossTerms(loss=5.0, ce_teacher=4.0, ce_student=3.0, ce_generation=2.0, kl=1.0)
    assert sums.values() == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert list(TERMS) == [field.name for field in fields(LossTerms)]
    assert [field.name for field in fields(StepMetrics)][: len(TERMS)] == list(TERMS)


def test_means_divide_by_the_weights_and_the_loss_stays() -> None:
    weights = TermWeights(ce_teacher=2.0, ce_student=4.0, ce_generation=0.0, kl=0.5)
    means = mean_terms(LossSums.of([7.0, 1.0, 1.0, 0.0, 1.0]), weights)
    assert means == LossTerms(loss=7.0, ce_teacher=0.5, ce_student=0.25, ce_generation=None, kl=2.0)


def test_a_line_shows_the_terms_that_have_loss_tokens() -> None:
    terms = LossTerms(loss=1.5, ce_teacher=0.25, ce_student=None, ce_generation=None, kl=0.0125)
    assert describe_terms(terms) == "loss 1.500 (teacher 0.250 kl 0.0125)"
    assert len({label.name for label in TERMS.values()}) == len({label.title for label in TERMS.values()}) == len(TERMS)
