"""The layout of a pack: where segments lie, which rows point at which tokens, and what pads it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from reflectron.engine.config import DataFile, LossConfig, MaskConfig
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.microbatch import Microbatch, pack, to_device
from reflectron.engine.data.sampler import Draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import IGNORED, SampleViews, SampleWeights, make_views, row_weights
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
GOLDEN: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))
INDEX = {sample["name"]: sample["index"] for sample in GOLDEN["samples"]}
NAMES = ["r_tce_simple", "g_00", "r_final_code_exec", "g_03", "r_code_first"]
LENGTH = 1280


@pytest.fixture(scope="module", params=["block", "none", "random_token", "all"])
def views(request: pytest.FixtureRequest) -> list[SampleViews]:
    """Reflection and generation samples in turn, for each way in which a student may see."""
    tokenizer = load_tokenizer(str(GOLDEN_DIR / "tokenizer_after"), "reflection")
    records = list(read_records(DataFile(path=str(GOLDEN_DIR / "samples.jsonl"))))
    samples = [tokenize(records[INDEX[name]].conversation(), tokenizer, "reflection", 448) for name in NAMES]
    mask = MaskConfig(strategy=request.param)
    return [make_views(s, visible_tokens(s, mask, 0.5, Draws(1, i))) for i, s in enumerate(samples)]


@pytest.fixture
def weights(views: list[SampleViews]) -> list[SampleWeights]:
    return row_weights(views, LossConfig())


@pytest.fixture
def microbatch(views: list[SampleViews], weights: list[SampleWeights]) -> Microbatch:
    return pack(views, weights, LENGTH)


def segments_of(view: SampleViews) -> list[np.ndarray]:
    """Positions of the teacher's view, and of the student's when it has its own."""
    teacher = np.arange(len(view.input_ids))
    return [teacher, view.student_positions] if len(view.student_positions) else [teacher]


def test_segments_hold_the_views_in_order(views: list[SampleViews], microbatch: Microbatch) -> None:
    expected = [(view.input_ids[places], places) for view in views for places in segments_of(view)]
    assert microbatch.segment_lengths == tuple(len(places) for _, places in expected)
    real = sum(microbatch.segment_lengths)
    tokens, positions = (np.concatenate(parts) for parts in zip(*expected, strict=True))
    assert np.array_equal(microbatch.tokens[:real], tokens)
    assert np.array_equal(microbatch.position_ids[:real], positions)


def test_the_tail_is_padding(microbatch: Microbatch) -> None:
    real = sum(microbatch.segment_lengths)
    assert microbatch.tokens.shape == microbatch.position_ids.shape == (LENGTH,)
    assert real < LENGTH
    assert not microbatch.tokens[real:].any()
    rows = microbatch.loss_rows
    assert max(int(index.max()) for index in (rows.teacher_index, rows.student_index, rows.index)) < real


def test_every_row_is_followed_by_its_label(microbatch: Microbatch) -> None:
    """Rows of a teacher, and of a student up to EOS, stand before the token that they predict."""
    tokens, rows = microbatch.tokens, microbatch.loss_rows
    assert torch.equal(tokens[rows.index + 1], rows.labels)
    for index, labels in ((rows.teacher_index, rows.teacher_labels), (rows.student_index, rows.student_labels)):
        counted = labels != IGNORED
        assert torch.equal(tokens[index + 1][counted], labels[counted])
    eos = GOLDEN["tokenizer"]["llama"]["eos"]
    assert torch.equal(tokens[rows.student_index + 1] == eos, rows.student_labels == IGNORED)


def test_rows_of_a_pair_are_the_same_token_of_the_same_sample(views: list[SampleViews], microbatch: Microbatch) -> None:
    rows = microbatch.loss_rows
    for values in (microbatch.tokens, microbatch.position_ids):
        assert torch.equal(values[rows.teacher_index], values[rows.student_index])
    segment = np.repeat(np.arange(len(microbatch.segment_lengths)), microbatch.segment_lengths)
    own_student = any(len(view.student_positions) for view in views)
    assert np.array_equal(
        segment[rows.student_index.numpy()], segment[rows.teacher_index.numpy()] + (1 if own_student else 0)
    )
    assert len(rows.teacher_index) == sum(len(view.pair_rows) for view in views)


def test_rows_of_generation_samples_come_first(views: list[SampleViews], microbatch: Microbatch) -> None:
    rows = microbatch.loss_rows
    generation = sum(view.ce_teacher_rows for view in views if view.is_generation)
    assert rows.generation_rows == generation
    starts = np.cumsum([0, *microbatch.segment_lengths])
    first_of_segment = np.searchsorted(starts, rows.index.numpy(), side="right") - 1
    number = [i for i, view in enumerate(views) for _ in segments_of(view)]
    kinds = [views[number[segment]].is_generation for segment in first_of_segment]
    assert all(kinds[:generation])
    assert not any(kinds[generation:])


def test_weights_sum_to_those_of_the_samples(
    views: list[SampleViews], weights: list[SampleWeights], microbatch: Microbatch
) -> None:
    rows, pairs = microbatch.loss_rows, list(zip(views, weights, strict=True))
    teacher = rows.ce_teacher_weight.sum() + rows.ce_weight.sum()
    assert teacher.item() == pytest.approx(sum(v.ce_teacher_rows * w.ce_teacher for v, w in pairs))
    assert rows.ce_student_weight.sum().item() == pytest.approx(sum(v.ce_student_rows * w.ce_student for v, w in pairs))
    assert rows.kl_weight.sum().item() == pytest.approx(sum(v.kl_rows * w.kl for v, w in pairs))
    assert torch.equal(rows.ce_teacher_weight == 0, rows.teacher_labels == IGNORED)
    assert torch.equal(rows.ce_student_weight == 0, rows.student_labels == IGNORED)
    # Only the row before each answer has no divergence.
    assert int((rows.kl_weight == 0).sum()) == sum(not view.is_generation for view in views)


def test_types(microbatch: Microbatch) -> None:
    for record in (microbatch, microbatch.loss_rows):
        for name, value in vars(record).items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == (torch.float32 if name.endswith("weight") else torch.int64), name


def test_an_empty_microbatch_is_one_segment_without_a_loss() -> None:
    empty = pack([], [], 64)
    assert empty.segment_lengths == (64,)
    assert not empty.tokens.any()
    rows = vars(empty.loss_rows)
    assert rows.pop("generation_rows") == 0
    assert rows.pop("exchange") is None
    assert all(value.shape == (0,) for value in rows.values())


def test_a_full_pack_has_no_padding(views: list[SampleViews], weights: list[SampleWeights]) -> None:
    length = sum(len(places) for view in views for places in segments_of(view))
    assert sum(pack(views, weights, length).segment_lengths) == length


def test_to_device_moves_every_tensor(microbatch: Microbatch) -> None:
    moved = to_device(microbatch, torch.device("meta"))
    assert moved.segment_lengths == microbatch.segment_lengths
    for before, after in ((microbatch, moved), (microbatch.loss_rows, moved.loss_rows)):
        for name, value in vars(before).items():
            if isinstance(value, torch.Tensor):
                assert getattr(after, name).device.type == "meta"
                assert getattr(after, name).shape == value.shape
