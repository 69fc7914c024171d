"""``reflectron bench train``: samples, layouts, counts, groups of time and verdicts; the whole command is in e2e."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reflectron.engine.config import BatchConfig, Config, DataConfig
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.training.diagnostics import _group, time_by_group
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.tools import cli
from reflectron.tools.bench.harness import ASSETS
from reflectron.tools.bench.models import attention_implementation
from reflectron.tools.bench.report import SCHEDULE, over_schedule, train_goals, write_train_report
from reflectron.tools.bench.train import (
    SHAPES,
    TrainPlan,
    hf_config_of,
    make_batch,
)
from reflectron.tools.bench.train_ranks import useful_flops
from reflectron.tools.commands.bench import parse_build
from reflectron.tools.planner.hardware import GPUS, gpu_of, make_cluster
from reflectron.tools.planner.predict import batch_of_views, fitting_layers
from reflectron.tools.planner.samples import synthetic_samples, views_at
from testkit.places import ROOT

CONFIG = Config(data=DataConfig(max_length=256), batch=BatchConfig(tokens_per_microbatch=512))
ARCH = parse_architecture(hf_config_of("tiny"))
COST = training_cost(decoder_shape(ARCH, CONFIG), "none")


class Place:
    """Stands for a group of ``ranks`` processes, of which this is ``number``."""

    def __init__(self, number: int = 0, ranks: int = 1) -> None:
        self.number, self.ranks = number, ranks

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.ranks


def groups(rank: int = 0, replicas: int = 1) -> Any:
    return SimpleNamespace(dp=Place(rank, replicas), cp=Place(), device=torch.device("cpu"))


def tensors(rows: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(rows).items() if isinstance(value, torch.Tensor)}


# ---- samples ----


def test_samples_have_the_structure_of_real_ones() -> None:
    samples = synthetic_samples(24, CONFIG, 100)
    reflection = [s for s in samples if s.kind == "reflection"]
    assert 0 < len(reflection) < 24
    for sample in reflection:
        starts, ends = sample.blocks[:, 1], sample.blocks[:, 2]
        assert (starts[1:] == ends[:-1]).all()
        assert sample.prefix_end == ends[-1] + 1 < sample.final_start
        kinds = np.repeat(sample.blocks[:, 0], ends - starts)
        assert (sample.supervised[starts[0] : ends[-1]] == (kinds != 2)).all()
        assert sample.supervised[sample.final_start :].all()
        assert not sample.supervised[0]
    again = synthetic_samples(24, CONFIG, 100)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(samples, again, strict=True))


def test_students_see_less_as_the_mask_rate_rises() -> None:
    samples = synthetic_samples(24, CONFIG, 100)
    seen = [sum(len(v.student_positions) for v in views_at(samples, rate, CONFIG)) for rate in SCHEDULE]
    assert seen[0] > seen[1] > seen[2] > 0


# ---- layouts ----


def test_layouts_do_more_work_for_the_same_loss_rows() -> None:
    views = views_at(synthetic_samples(24, CONFIG, 100), 0.5, CONFIG)
    found = {n: make_batch(views, n, 0.5, CONFIG, COST, groups()) for n in ("packed", "one_by_one", "hidden_kept")}
    needed = sum(len(v.input_ids) + len(v.student_positions) for v in views)
    hidden = sum(len(v.input_ids) - len(v.student_positions) for v in views if len(v.student_positions))
    assert found["packed"][1].model_tokens >= needed
    segments = [sum(sum(m.segment_lengths) for m in batch.microbatches) for batch, _ in found.values()]
    assert segments == [needed, needed, needed + hidden]
    assert found["one_by_one"][1].microbatches == len(views)
    for batch, _ in found.values():
        rows = [m.loss_rows for m in batch.microbatches]
        assert sum(len(r.index) + 2 * len(r.teacher_index) for r in rows) == sum(v.logit_rows for v in views)
        weights = [torch.cat([tensors(r)[name] for r in rows]).sum() for name in ("ce_weight", "kl_weight")]
        assert weights[1] == pytest.approx(sum(not v.is_generation for v in views) / len(views), rel=1e-5)


def test_replicas_share_the_samples() -> None:
    views = views_at(synthetic_samples(9, CONFIG, 100), 0.5, CONFIG)
    shares = [make_batch(views, "one_by_one", 0.5, CONFIG, COST, groups(rank, 2))[0] for rank in range(2)]
    assert [len(share.microbatches) for share in shares] == [5, 4]


# ---- counts ----


def test_useful_flops_count_each_view_as_long_as_it_is_seen() -> None:
    view = next(v for v in views_at(synthetic_samples(24, CONFIG, 100), 0.5, CONFIG) if len(v.student_positions))
    n, s = len(view.input_ids), len(view.student_positions)
    expected = COST.per_token * (n + s) + COST.per_token_squared * (n**2 + s**2) + COST.per_row * view.logit_rows
    assert useful_flops([view], COST) == pytest.approx(expected)


def test_shapes_are_those_of_the_recipes_with_the_tags() -> None:
    assert [hf_config_of(shape)["hidden_size"] for shape in SHAPES] == [4096, 8192, 7168]
    assert hf_config_of("codellama-7b")["vocab_size"] == 32016 + 7
    recipes = ROOT / "examples" / "recipes" / "models"
    for shape in SHAPES:
        assert (ASSETS / "models" / f"{shape}.json").read_bytes() == (recipes / f"{shape}.json").read_bytes()
    with pytest.raises(ValueError, match="--shapes names 'gpt', expected codellama-7b"):
        hf_config_of("gpt")


def test_layers_fit_beside_the_baseline() -> None:
    config = Config()
    cluster, memory = make_cluster("H200-141GB", 1, 1), GPUS["H200-141GB"].memory_bytes
    batch = batch_of_views(views_at(synthetic_samples(32, config, 1000), 0.165, config))

    arch = parse_architecture(hf_config_of("codellama-34b"))

    def layers(device_bytes: float, beside: bool) -> int:
        return fitting_layers(arch, config, cluster, batch, device_bytes, beside)

    assert 1 <= layers(memory, True) < layers(memory, False) < 48
    with pytest.raises(ValueError, match="do not fit"):
        layers(2**30, False)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("CPU AMD EPYC", None),
    ],
)
def test_devices_by_their_names(name: str, gpu: str | None) -> None:
    found = gpu_of(name)
    assert (found.name if found else None) == gpu


# ---- where the time goes ----


def op(name: str, parent: Any = None, milliseconds: float = 1.0) -> Any:
    kind = torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=milliseconds * 1e3, device_type=kind)


def test_time_goes_to_what_launched_it_and_else_to_the_kernels_name() -> None:
    head = op("_DistillationHeadBackward")
    attention = op("aten::scaled_dot_product_attention")
    update = op("Optimizer.step#AdamW.step")
    assert _group("sm90_xmma_gemm_bf16", op("aten::mm", head)) == "head"
    assert _group("nvjet_tst_128x256", op("aten::mm")) == "matmul"
    assert _group("elementwise", op("aten::mul", update)) == "optimizer"
    assert _group("gemm", op("aten::bmm", attention)) == "attention"
    assert _group("ncclDevKernel_AllReduce", None) == "communication"
    assert _group("flash_bwd_kernel", None) == "attention"
    assert _group("Memcpy HtoD (Pinned -> Device)", None) == "copies"
    assert _group("vectorized_elementwise_kernel", op("aten::add")) == "norm and elementwise"
    spent = time_by_group([op("aten::mm", milliseconds=3), op("aten::mm", head, 2), op("aten::add")], cuda=False)
    assert spent == {"matmul": 3.0, "head": 2.0, "norm and elementwise": 1.0}


# ---- goals ----


def row(variant: str, ms: float, rate: float, **keys: Any) -> dict[str, Any]:
    return {
        "shape": "codellama-7b",
        "variant": variant,
        "mask_rate": rate,
        "p50": ms,
        "reason": None,
        "device": "NVIDIA H200",
        "dtype": "bfloat16",
        "tokens_per_microbatch": 8192,
        "build": [],
        "mfu": None,
    } | keys


def test_goals_are_judged_over_the_mask_schedule() -> None:
    rows = [row("hf_reference", ms, rate) for ms, rate in zip((300, 300, 300), SCHEDULE, strict=True)]
    rows += [
        row("engine", ms, rate, mfu=0.5 + ms / 1000, predicted_step_time_ms=1.1 * ms)
        for ms, rate in zip((120, 100, 80), SCHEDULE, strict=True)
    ]
    rows += [row("engine[fp8]", 60, rate, build=["model.fp8=tensorwise"]) for rate in SCHEDULE]
    found = {goal.text: (goal.met, goal.figure) for goal in train_goals(rows)}
    verdicts = [met for met, _ in found.values()]
    assert verdicts == [True, True, True, True, None, True]
    assert found["at least 2.5x the samples/s of the reference's way in bf16"][1] == "3 (codellama-7b)"
    assert [goal.met for goal in train_goals([r | {"device": "CPU"} for r in rows])] == [None] * 6
    slower = [r | {"p50": 150} if r["variant"] == "engine" else r for r in rows]
    assert next(goal.met for goal in train_goals(slower)) is False


def test_schedule_is_weighed_by_its_phases() -> None:
    assert over_schedule(list(zip(SCHEDULE, (1.0, 2.0, 3.0), strict=True))) == pytest.approx(0.33 + 0.68 + 0.99)
    assert over_schedule([(0.1, 1.0), (0.9, 3.0)]) == 2
    assert over_schedule([]) is None


def test_a_report_without_rows_claims_nothing() -> None:
    assert write_train_report([], None) == "no rows\n"


# ---- the command ----


def test_a_plan_survives_its_journey_to_the_ranks() -> None:
    plan = TrainPlan(
        shape="tiny",
        config="c",
        overrides=["loss.backend=reference"],
        layers=None,
        samples=3,
        data=None,
        tokenizer=None,
        mask_rates=[0.5],
        variants=["engine"],
        builds=dict([parse_build("te:a=b,c=d")]),
        rounds=1,
        deadline=1.0,
        calibration=None,
        rows="r",
    )
    assert plan.builds == {"te": ["a=b", "c=d"]}
    assert TrainPlan(**json.loads(json.dumps(asdict(plan)))) == plan


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--device", "cpu", "--variants", "fast"], "--variants names fast, expected some of hf_reference, engine"),
        (["--device", "cpu", "--build", "te"], "--build is 'te', expected name:key=value"),
        (["--device", "cpu", "--layers", "0"], "--layers is '0', expected auto or a number above 0"),
        (["--device", "cpu", "--mask-rates", "1.5"], "--mask-rates is '1.5', expected schedule or numbers from 0 to 1"),
        (["--device", "cpu", "--data", "x.jsonl"], "--data and --tokenizer come together"),
        (["--device", "cpu", "loss.backnd=triton"], "loss.backnd"),
        ([], "no CUDA device is visible; --device cpu tests the harness"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "train", "--out", str(tmp_path), *words]) == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == 1


def test_rows_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({}))
    if not torch.cuda.is_available():
        assert cli.main(["bench", "train", "--out", str(tmp_path), "--device", "cpu"]) == 2
        assert "rows are never overwritten" in capsys.readouterr().err


def test_flash_attention_4_alone_is_not_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are imported as ``flash_attn``; the baseline's transformers takes version 2 by its distribution."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_implementation(torch.device("cuda")) == "sdpa"
