"""``reflectron bench train`` on a tiny shape: every variant and the reference's way compute the same mathematics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import BatchConfig, Config, DataConfig
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.training.flops import decoder_shape, training_cost, training_flops
from reflectron.tools.bench.report import BASELINE, SCHEDULE
from reflectron.tools.bench.train import VARIANTS, hf_config_of
from reflectron.tools.planner.samples import synthetic_samples, views_at
from testkit.places import TESTS_DIR

SAMPLES, BUDGET, LONGEST = 6, 512, 256
SIZES = ["--samples", str(SAMPLES), "--budget", str(BUDGET), "--max-length", str(LONGEST), "--rounds", "1"]
# Rounding of float32 sums that are added up in another order.
TOLERANCE = 1e-4


def bench(folder: Path, *words: str, **environment: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "reflectron.tools.cli", "bench", "train", "--device", "cpu", "--out", str(folder)]
    # Other tests turn Triton's interpreter on, in which the head takes its time.
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"} | environment
    result = subprocess.run([*command, *SIZES, *words], capture_output=True, text=True, env=env, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "are no results" in result.stdout
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All variants over the mask schedule, and a build that recomputes."""
    folder = tmp_path_factory.mktemp("bench_train")
    found = bench(folder, "--build", "again:parallel.recompute=full")
    for name in ("train.md", "train.png"):
        assert (folder / name).stat().st_size > 1000
    return found


@pytest.mark.slow
def test_all_variants_have_the_loss_and_gradient_of_the_reference(rows: list[dict[str, Any]]) -> None:
    names = {BASELINE, *VARIANTS, "engine[again]"}
    for rate in SCHEDULE:
        found = {row["variant"]: row for row in rows if row["mask_rate"] == rate}
        assert found.keys() == names
        assert {name: row["reason"] for name, row in found.items()} == dict.fromkeys(names)
        truth = found[BASELINE]
        for name, row in found.items():
            assert row["loss"] == pytest.approx(truth["loss"], rel=TOLERANCE), name
            assert row["grad_norm"] == pytest.approx(truth["grad_norm"], rel=TOLERANCE), name
    # The dynamic mask changes the loss, so equality above is not of a constant.
    assert len({round(row["loss"], 4) for row in rows if row["variant"] == BASELINE}) == len(SCHEDULE)


@pytest.mark.slow
def test_rows_count_tokens_and_operations(rows: list[dict[str, Any]]) -> None:
    config = Config(data=DataConfig(max_length=LONGEST), batch=BatchConfig(tokens_per_microbatch=BUDGET))
    arch = parse_architecture(hf_config_of("tiny"))
    cost = training_cost(decoder_shape(arch, config), "none")
    samples = synthetic_samples(SAMPLES, config, arch.vocab_size)
    for row in rows:
        views = views_at(samples, row["mask_rate"], config)
        reflection = [v for v in views if not v.is_generation]
        assert row["tokens_teacher"] == sum(len(v.input_ids) for v in reflection)
        assert row["tokens_student"] == sum(len(v.student_positions) for v in reflection)
        assert row["tokens_generation"] == sum(len(v.input_ids) for v in views if v.is_generation)
        lengths = [len(v.input_ids) for v in views] + [len(v.student_positions) for v in views]
        assert row["useful_flops"] == training_flops(cost, lengths, sum(v.logit_rows for v in views))
        useful = row["tokens_teacher"] + row["tokens_student"] + row["tokens_generation"]
        assert row["model_tokens"] >= useful
        if row["variant"] == BASELINE:
            assert row["model_tokens"] == 2 * row["tokens_teacher"] + row["tokens_generation"]
        assert row["useful_tokens_per_second"] == pytest.approx(useful / row["p50"] * 1e3)
        assert row["samples_per_second"] == pytest.approx(SAMPLES / row["p50"] * 1e3)
        assert sum(row["time_ms_by_group"].values()) > 0
        assert row["time_ms_by_group"]["matmul"] > 0
        assert row["time_ms_by_group"]["head"] > 0
        assert {row["mfu"], row["peak_memory_gib"]} == {None}
        assert {"versions", "commit", "device", "parallel", "backends"} <= row.keys()


@pytest.mark.slow
def test_the_fused_head_has_the_loss_of_the_plain_one(tmp_path: Path) -> None:
    """In Triton's interpreter, on two samples."""
    words = ["--mask-rates", "0.5", "--samples", "2", "--variants", "engine,engine_plain_head"]
    found = {row["variant"]: row for row in bench(tmp_path, *words, TRITON_INTERPRET="1")}
    assert {name: row["backends"]["head"] for name, row in found.items()} == {
        "engine": "triton",
        "engine_plain_head": "reference",
    }
    fused, plain = found["engine"], found["engine_plain_head"]
    assert fused["loss"] == pytest.approx(plain["loss"], rel=TOLERANCE)
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=TOLERANCE)


@pytest.mark.slow
def test_two_ranks_have_the_loss_of_one(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    one = {row["variant"]: row for row in rows if row["mask_rate"] == SCHEDULE[1]}
    two = bench(tmp_path, "--gpus", "2", "--mask-rates", str(SCHEDULE[1]), "--variants", f"{BASELINE},engine")
    assert [row["devices"] for row in two] == [2, 2]
    for row in two:
        assert row["loss"] == pytest.approx(one[row["variant"]]["loss"], rel=TOLERANCE)
        assert row["grad_norm"] == pytest.approx(one[row["variant"]]["grad_norm"], rel=TOLERANCE)


@pytest.mark.slow
def test_data_of_ones_own_and_what_cannot_run_is_a_row(tmp_path: Path) -> None:
    golden = TESTS_DIR / "golden"
    own = ["--data", str(golden / "samples.jsonl"), "--tokenizer", str(golden / "tokenizer_before")]
    words = ["--mask-rates", "0.5", "--variants", f"{BASELINE},engine", "loss.kl_weight=0.5"]
    found = {row["variant"]: row for row in bench(tmp_path, *own, *words)}
    assert found[BASELINE]["reason"] == "ValueError: the baseline computes the published loss only"
    assert found["engine"]["loss"] > 0
    assert found["engine"]["data"].endswith("samples.jsonl")
