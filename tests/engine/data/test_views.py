"""Rows, labels and weights: equal to the recorded ones, and to METHOD's definitions term by term."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from reflectron.engine.config import DataFile, LossConfig, MaskConfig
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import Draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import IGNORED, SampleViews, make_views, row_weights
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
GOLDEN: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))
KEPT = {sample["name"]: sample for sample in GOLDEN["samples"] if not sample["dropped"]}
PRIVILEGED = {"prompt": "Add two numbers.", "privileged_context": "Use +.", "completion": "a + b"}


@pytest.fixture(scope="module")
def samples() -> dict[str, TokenizedSample]:
    tokenizer = load_tokenizer(str(GOLDEN_DIR / "tokenizer_after"), "reflection")
    records = list(read_records(DataFile(path=str(GOLDEN_DIR / "samples.jsonl"))))
    return {
        name: tokenize(records[record["index"]].conversation(), tokenizer, "reflection", 448)
        for name, record in KEPT.items()
    }


@pytest.fixture(scope="module")
def privileged(tmp_path_factory: pytest.TempPathFactory) -> TokenizedSample:
    path = tmp_path_factory.mktemp("data") / "privileged.jsonl"
    path.write_text(json.dumps(PRIVILEGED) + "\n", encoding="utf-8")
    (record,) = read_records(DataFile(path=str(path)))
    tokenizer = load_tokenizer(str(GOLDEN_DIR / "tokenizer_after"), "reflection")
    return tokenize(record.conversation(), tokenizer, "reflection", 448)


def views_of(sample: TokenizedSample, rate: float = 0.33, strategy: str = "block") -> SampleViews:
    mask = MaskConfig(strategy=strategy)  # type: ignore[arg-type]
    return make_views(sample, visible_tokens(sample, mask, rate, Draws(0)))


def teacher_labels(views: SampleViews) -> np.ndarray:
    """The teacher's labels laid out as the reference has them: label of row i at i + 1."""
    labels = np.full(len(views.input_ids), IGNORED)
    labels[views.rows + 1] = views.input_ids[views.rows + 1]
    labels[views.pair_rows + 1] = views.pair_teacher_labels
    return labels


@pytest.mark.parametrize("name", KEPT)
def test_recorded_rows_and_labels(samples: dict[str, TokenizedSample], name: str) -> None:
    expected, views = KEPT[name], views_of(samples[name])
    assert views.input_ids.tolist() == expected["input_ids"]
    assert teacher_labels(views).tolist() == expected["labels"]
    assert views.ce_teacher_rows == expected["rows"]["ce_teacher"]
    if expected["type"] == "generation":
        assert views.is_generation
        assert (views.ce_student_rows, views.kl_rows, len(views.student_positions)) == (0, 0, 0)
        assert views.logit_rows == views.ce_teacher_rows
        return
    student_rows = views.pair_rows[views.pair_student_labels != IGNORED]
    assert views.ce_student_rows == len(student_rows) == expected["rows"]["ce_student"]
    assert views.kl_rows == expected["rows"]["kl"]
    assert [student_rows[0], student_rows[-1]] == expected["rows"]["ce_student_first_last"]
    # The divergence omits the first pair, the row that predicts <|assistant|>.
    assert [views.pair_rows[1], views.pair_rows[-1]] == expected["rows"]["kl_first_last"]
    assert len(views.pair_rows) == views.kl_rows + 1
    assert np.array_equal(views.pair_student_labels[:-1], views.input_ids[student_rows + 1])
    assert np.array_equal(np.diff(views.pair_rows), np.ones(views.kl_rows))
    assert np.intersect1d(views.rows, views.pair_rows).size == 0
    assert views.logit_rows == len(views.rows) + 2 * len(views.pair_rows)


def test_an_execution_block_in_the_answer_counts_for_the_student_alone(samples: dict[str, TokenizedSample]) -> None:
    views = views_of(samples["r_final_code_exec"])
    ignored = views.pair_teacher_labels == IGNORED
    assert 0 < ignored.sum() < len(ignored)
    assert (views.pair_student_labels[ignored] != IGNORED).all()


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_student_keeps_its_positions(samples: dict[str, TokenizedSample], rate: float) -> None:
    for name, record in KEPT.items():
        if record["type"] != "reflection":
            continue
        sample, views = samples[name], views_of(samples[name], rate)
        positions = views.student_positions
        assert 0 < len(positions) < len(sample.input_ids)
        assert positions[0] >= record["first_assistant_content_start"]
        assert (np.diff(positions) > 0).all()
        after = np.arange(record["first_endofmessage"] + 1, len(sample.input_ids))
        assert np.array_equal(positions[-len(after) :], after)
        assert np.isin(views.pair_rows, positions).all()
        if rate == 1.0:
            assert len(positions) == len(after)


def test_gaps_in_the_positions(samples: dict[str, TokenizedSample]) -> None:
    """r_tce_simple with its text hidden: code and execution, a gap, the second user turn."""
    positions = views_of(samples["r_tce_simple"], 0.0).student_positions
    assert positions.tolist() == [*range(50, 114), *range(126, 177)]


def test_none_shares_the_teachers_view(samples: dict[str, TokenizedSample]) -> None:
    views = views_of(samples["r_tce_simple"], strategy="none")
    assert not views.is_generation
    assert len(views.student_positions) == 0
    assert views.ce_student_rows == KEPT["r_tce_simple"]["rows"]["ce_student"]


def test_privileged_kind(privileged: TokenizedSample) -> None:
    tags = GOLDEN["tokenizer"]["llama"]["special"]
    ids = privileged.input_ids.tolist()
    second_user = [i for i, token in enumerate(ids) if token == tags["<|user|>"]][1]
    answer = ids.index(tags["<|assistant|>"])
    for rate in (0.0, 1.0):
        views = views_of(privileged, rate)
        assert views.student_positions.tolist() == list(range(second_user, len(ids)))
        assert views.pair_rows.tolist() == list(range(answer - 1, len(ids) - 1))
        assert views.pair_teacher_labels.tolist() == ids[answer:]
        assert views.pair_student_labels.tolist() == [*ids[answer:-1], IGNORED]
        assert len(views.rows) == 0
        assert views.kl_rows == views.ce_student_rows == len(ids) - answer - 1


def totals(views: list[SampleViews], loss: LossConfig) -> list[tuple[float, float, float]]:
    """Sum over the rows of each sample of the weights of each term."""
    return [
        (v.ce_teacher_rows * w.ce_teacher, v.ce_student_rows * w.ce_student, v.kl_rows * w.kl)
        for v, w in zip(views, row_weights(views, loss), strict=True)
    ]


def test_sample_weighting_is_the_mean_over_samples(samples: dict[str, TokenizedSample]) -> None:
    views = [views_of(samples[name]) for name in ("g_00", "r_tce_simple", "g_03", "r_two_repeats")]
    for v, (teacher, student, kl) in zip(views, totals(views, LossConfig()), strict=True):
        assert teacher + student == pytest.approx(1 / 4)
        assert kl == pytest.approx(0 if v.is_generation else 1 / 4)
        assert teacher / (teacher + student) == pytest.approx(
            v.ce_teacher_rows / (v.ce_teacher_rows + v.ce_student_rows)
        )


def test_token_weighting_is_the_mean_over_rows(samples: dict[str, TokenizedSample]) -> None:
    views = [views_of(samples[name]) for name in ("g_00", "r_tce_simple", "r_two_repeats")]
    weights = row_weights(views, LossConfig(weighting="token"))
    assert len(set(weights)) == 1
    assert weights[0].ce_teacher == weights[0].ce_student
    sums = np.sum(totals(views, LossConfig(weighting="token")), axis=0)
    assert sums[0] + sums[1] == pytest.approx(1)
    assert sums[2] == pytest.approx(1)


def test_weights_of_generation_samples_alone(samples: dict[str, TokenizedSample]) -> None:
    views = [views_of(samples["g_00"]), views_of(samples["g_01"])]
    for weighting in ("sample", "token"):
        sums = np.sum(totals(views, LossConfig(weighting=weighting)), axis=0)
        assert sums.tolist() == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_factors_of_the_terms(samples: dict[str, TokenizedSample], weighting: str) -> None:
    views = [views_of(samples["g_00"]), views_of(samples["r_tce_simple"])]
    plain = row_weights(views, LossConfig(weighting=weighting))  # type: ignore[arg-type]
    factors = {"ce_teacher_weight": 0.5, "ce_student_weight": 2.0, "kl_weight": 0.0}
    scaled = row_weights(views, LossConfig(weighting=weighting, **factors))  # type: ignore[arg-type]
    for before, after in zip(plain, scaled, strict=True):
        assert after.ce_teacher == before.ce_teacher * 0.5
        assert after.ce_student == before.ce_student * 2
        assert after.kl == 0


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_without_the_students_terms_a_reflection_sample_is_plain_text(
    samples: dict[str, TokenizedSample], weighting: str
) -> None:
    views = [views_of(samples[name]) for name in ("g_00", "r_tce_simple", "r_two_repeats")]
    loss = LossConfig(weighting=weighting, ce_student_weight=0.0, kl_weight=0.0)  # type: ignore[arg-type]
    weights = row_weights(views, loss)
    assert all(w.ce_student == w.kl == 0 for w in weights)
    rows = [v.ce_teacher_rows for v in views]
    of_text = [1 / (3 * n) for n in rows] if weighting == "sample" else [1 / sum(rows)] * 3
    assert [w.ce_teacher for w in weights] == pytest.approx(of_text)
