"""The planner: published sizes, rates, samples, the search, every recipe. ``test_planned_memory.py`` weighs tensors."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from reflectron.engine.config import (
    BackendsConfig,
    BatchConfig,
    Config,
    DataConfig,
    LayersBackend,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
)
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture, read_hf_config
from reflectron.engine.model.inputs import read_model_inputs
from reflectron.tools import cli
from reflectron.tools.commands import plan
from reflectron.tools.load_config import load_config
from reflectron.tools.planner import memory
from reflectron.tools.planner.backends import (
    HOST_PARTS,
    LAYER_TRAFFIC,
    RATE_TABLES,
    STACKS,
    SUMMED,
    UPDATED,
    Arithmetic,
)
from reflectron.tools.planner.hardware import GPUS, OVERLAP, make_cluster
from reflectron.tools.planner.predict import Planner, predict_step
from reflectron.tools.planner.report import predicted_line, write_recipe
from reflectron.tools.planner.request import make_planner, planned_architecture
from reflectron.tools.planner.samples import (
    PHASES,
    SampleLengths,
    StepLoad,
    assumed_samples,
    over_phases,
    typical_batch,
)
from reflectron.tools.planner.speed import StepTime
from testkit.places import ROOT

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
# Parameters of the published safetensors.
PUBLISHED = {
    "codellama-7b": 6_738_546_688,
    "codellama-python-7b": 6_738_415_616,
    "codellama-34b": 33_743_970_304,
    "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-coder-33b": 33_342_991_360,
    "qwen2.5-coder-7b": 7_615_616_512,
    "qwen2.5-coder-32b": 32_763_876_352,
}
METHODS = {
    "reflectioncoder": {"learning_rate": 5e-5, "epochs": 2.0, "length": 4096, "optimizer": "adamw", "clip": 1.0},
    "magicoder": {"learning_rate": 5e-5, "epochs": 2.0, "length": 1216, "optimizer": "adafactor", "clip": 0.0},
    "magicoder-s": {"learning_rate": 5e-5, "epochs": 2.0, "length": 1024, "optimizer": "adafactor", "clip": 0.0},
}


def architecture(name: str) -> Architecture:
    return parse_architecture(read_hf_config(ROOT / "examples" / "recipes" / "models" / f"{name}.json"))


@functools.cache
def papers() -> SampleLengths:
    return assumed_samples("papers", Config())


def small_planner(name: str, gpu: str, gpus: int, **config: object) -> Planner:
    """With steps of 48 samples, whose packs are planned at once."""
    run = Config(batch=BatchConfig(global_batch_size=48), **config)  # type: ignore[arg-type]
    return Planner(architecture(name), run, papers(), make_cluster(gpu, gpus))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    arch, config = architecture(name), Config(model=ModelConfig(make_vocab_size_divisible_by=1))
    (stage,) = memory.stages_of(arch, config.parallel)
    assert memory.stage_parameters(arch, config, stage) == PUBLISHED[name]
    split = dataclasses.replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=4))
    stages = memory.stages_of(arch, split.parallel)
    assert sum(memory.stage_parameters(arch, split, stage) for stage in stages) == PUBLISHED[name]


def test_sizes_of_the_assumed_data() -> None:
    data = papers()
    instruction, reflection = ~data.reflection, data.reflection
    assert (instruction.sum(), reflection.sum()) == (156_500, 22_700)
    assert data.teacher[instruction].sum() == pytest.approx(371e6 * 0.95 / 3, rel=0.002)
    assert data.teacher[reflection].mean() == pytest.approx(92.7e6 * 0.95 / 3 / 12_400, rel=0.002)
    assert data.teacher.max() <= 4096
    assert data.steps(Config()) == -(-2 * (156_500 + 2 * 22_700) // 512)
    students = [(view * data.repeat).sum() for view in data.student]
    assert students == sorted(students, reverse=True)
    # The reference's 330 million tokens an epoch, and about 260 that are left.
    twice = (data.teacher * data.repeat * (1 + reflection)).sum()
    assert twice == pytest.approx(330e6, rel=0.02)
    assert (data.teacher * data.repeat).sum() + over_phases(students) == pytest.approx(260e6, rel=0.05)


def test_a_typical_batch_has_the_means_of_all_samples() -> None:
    data = papers()
    for phase in range(len(PHASES)):
        batch = typical_batch(data, phase, 512)
        for mine, everyones in ((batch.teacher, data.teacher), (batch.student, data.student[phase])):
            assert mine.mean() == pytest.approx((everyones * data.repeat).sum() / data.repeat.sum(), rel=0.02)


def test_rings_that_leave_a_machine_share_its_adapters() -> None:
    cluster = make_cluster("A800-80GB", 16)
    inside, adapter = cluster.node_bytes_per_second, cluster.network_bytes_per_second
    assert cluster.bus(8, 1) == cluster.bus(2, 4) == inside
    assert cluster.bus(2, 8) == adapter
    assert cluster.bus(4, 4) == 2 * adapter
    assert cluster.bus(16, 1) == min(inside, 8 * adapter)


LOAD = StepLoad(
    microbatches=2, sequence_length=128, pairs=8192, segment_length=128, rows=64, tokens=256, useful_flops=1.0
)


def calibration_file(path: Path, **changed: object) -> Path:
    """Write that of a machine with products at 1e12 and passes at 1e10 a second, tenfold at 100 times the size."""
    products = [[10, 1000], [10], [10]]
    axes = {"product": products, "head": products, "attention": [[100], [64]]}
    axes |= {"pass": [[1e4, 1e6]], "all": [[1e3, 1e5]]}
    tables = {}
    for name in (*RATE_TABLES, "all_reduce"):
        axis = axes[name.partition("_")[0]]
        rates = np.full([len(points) for points in axis], 1e12 if axis is products else 1e10)
        rates[-1] *= 10 if len(rates) > 1 else 1
        tables[name] = {"axes": axis, "rates": rates.tolist()}
    content = {"device": "some GPU", "dtype": "bfloat16", "backends": vars(STACKS["pip"]), "processes": 2}
    content |= {"memory_bytes": 1e9, "tables": tables}
    path.write_text(json.dumps(content | {"host_seconds": dict.fromkeys(HOST_PARTS, 1e-3)} | changed))
    return path


def test_rates_of_a_calibration_file(tmp_path: Path) -> None:
    cluster = make_cluster("A800-80GB", 16, calibration=calibration_file(tmp_path / "rates.json"))
    assert cluster.product("forward", 10, 10, 10) == pytest.approx(2 * 1000 / 1e12)
    # Halfway on a logarithmic scale, and the edges beyond the grid.
    assert cluster.product("weight", 100, 10, 10) == pytest.approx(2 * 10_000 / 10**12.5)
    assert cluster.product("input", 1e5, 1, 10) == pytest.approx(2 * 1e6 / 1e13)
    assert cluster.passes("norm", 1e6, 8) == pytest.approx(8e6 / 1e11)
    assert cluster.attention(1e10, 100, 64, "torch_varlen") == pytest.approx(1)
    assert cluster.attention(1e10, 100, 64, "sdpa") < 1e-3
    assert cluster.head("reference", 1000, 10, 10) == pytest.approx(6e5 / 1e13)
    assert cluster.head("triton", 1000, 10, 10) is None
    assert cluster.backends == STACKS["pip"]
    assert cluster.exposed(1e5) == pytest.approx(1 - OVERLAP)
    assert cluster.collective("all_reduce", 1e5, 2, 1) == pytest.approx(1e5 / 1e11)
    # Not measured: scattering, and what leaves the machine.
    datasheet = make_cluster("A800-80GB", 16)
    for kind, ranks in (("reduce_scatter", 2), ("all_reduce", 16)):
        assert cluster.collective(kind, 1e5, ranks, 1) == datasheet.collective(kind, 1e5, ranks, 1)  # type: ignore[arg-type]
    assert "measured on some GPU" in cluster.source


def test_what_was_not_measured_moves_its_bytes(tmp_path: Path) -> None:
    """Planned with other backends than those of the calibration: their bytes, at the rate of a copy or a sum."""
    cluster = make_cluster("A800-80GB", 2, calibration=calibration_file(tmp_path / "rates.json"))

    def time(**named: Any) -> StepTime:
        config = Config(backends=BackendsConfig(**named))
        return predict_step(config, architecture("codellama-7b"), cluster, LOAD).time

    measured = time()
    assert time(layers="torch").memory_passes > measured.memory_passes
    assert time(weight_gradient="torch").memory_passes > measured.memory_passes
    assert time(adamw="torch").optimizer > measured.optimizer
    assert time(attention="sdpa").attention < measured.attention / 100


def test_what_cannot_be_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rates\.json is no calibration \(KeyError: 'step_layer'\), expected a file"):
        make_cluster("A800-80GB", 8, calibration=calibration_file(tmp_path / "rates.json", host_seconds={"step": 1}))
    with pytest.raises(ValueError, match="--gpu is CPU with a calibration of 2 processes, expected one of --gpus 4"):
        make_cluster("CPU", 4, calibration=calibration_file(tmp_path / "rates.json"))
    with pytest.raises(ValueError, match="--gpu is 'B999', expected one of A100-80GB"):
        make_cluster("B999", 8)
    with pytest.raises(ValueError, match="--gpus is 12, expected a positive number, whole machines of 8"):
        make_cluster("A800-80GB", 12)


def test_host_and_device(tmp_path: Path) -> None:
    """A GPU waits for a slow host, and not for a fast one; on the CPU the times add up."""
    arch, config = architecture("codellama-7b"), Config()

    def time(name: str, seconds: float) -> StepTime:
        host = dict.fromkeys(HOST_PARTS, seconds)
        plain = vars(STACKS["plain"])
        file = calibration_file(tmp_path / "rates.json", processes=1, backends=plain, host_seconds=host)
        return predict_step(config, arch, make_cluster(name, 1, calibration=file), LOAD).time

    device = time("A800-80GB", 0.0)
    assert device.host == 0
    ones = (1 + 32) * 2 + 1 + 32
    assert time("CPU", 0.5).total == pytest.approx(time("CPU", 0.0).total + 0.5 * ones)
    assert time("A800-80GB", 1e-9).host == pytest.approx(1e-9 * (1 + 32))
    slow = time("A800-80GB", 10.0)
    # In a step, only the update's host time adds to the device's.
    assert slow.total == pytest.approx(10 * ones + slow.optimizer)


@pytest.mark.parametrize("gpu", ["A800-80GB", "H100-80GB"])
def test_fused_backends_take_less(gpu: str) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=8, sequence_parallel=True, pipeline_model_parallel_size=2, recompute="full"
    )
    run = Config(batch=BatchConfig(global_batch_size=48), parallel=parallel)
    planners = {
        stack: Planner(architecture("codellama-34b"), run, papers(), make_cluster(gpu, 16, stack=stack))
        for stack in ("plain", "pip", "te")
    }
    plain, pip, te = (planners[stack].predict(run) for stack in ("plain", "pip", "te"))
    assert te.step_seconds <= pip.step_seconds < plain.step_seconds
    assert plain.times[0].matmul == pip.times[0].matmul
    named = dataclasses.replace(run, backends=BackendsConfig(layers="torch", weight_gradient="torch", adamw="torch"))
    assert planners["pip"].predict(named).times[0].memory_passes > pip.times[0].memory_passes
    fp8 = dataclasses.replace(run, model=ModelConfig(fp8="delayed"))
    if gpu == "H100-80GB":
        assert planners["te"].predict(fp8).step_seconds < te.step_seconds
    for planner in (planners["pip"], planners["te"] if gpu == "A800-80GB" else planners["plain"]):
        with pytest.raises(ValueError, match=r"model\.fp8 is 'delayed', expected 'none'"):
            planner.predict(fp8)


def test_chunks_shorten_the_bubble_and_faster_gpus_the_step() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=4, recompute="full"
    )
    chunked = dataclasses.replace(parallel, virtual_pipeline_model_parallel_size=3)
    planner = small_planner("codellama-34b", "H100-80GB", 16)
    plain, interleaved = (
        planner.predict(dataclasses.replace(planner.config, parallel=one)).times[0] for one in (parallel, chunked)
    )
    assert interleaved.bubble < plain.bubble / 2
    slower = small_planner("codellama-34b", "A800-80GB", 16)
    assert slower.predict(dataclasses.replace(planner.config, parallel=parallel)).times[0].total > 2 * plain.total


def test_what_is_found_fits_and_loads(tmp_path: Path) -> None:
    """62 layers over 4 stages among them."""
    planner = small_planner("deepseek-coder-33b", "A800-80GB", 16)
    found = planner.search()
    assert {one.config.parallel.pipeline_model_parallel_size for one in found} >= {1, 2, 4}
    assert [one.gpu_hours for one in found] == sorted(one.gpu_hours for one in found)
    for one in found:
        assert one.fits
        assert 0 < one.mfu < 1
        write_recipe(tmp_path / "run.yaml", one, "reflectron plan")
        assert load_config(str(tmp_path / "run.yaml"), []) == one.config
        assert planner.predict(one.config).gpu_hours == one.gpu_hours


def test_a_model_that_fits_nowhere() -> None:
    planner = small_planner("codellama-34b", "A100-80GB", 2)
    with pytest.raises(ValueError, match=r"no layout fits: the smallest needs more than \d+ GiB on a GPU"):
        planner.search()


def test_options_that_save_memory() -> None:
    def optimizer(**keys: object) -> float:
        return memory.optimizer_bytes_of_parameter(OptimizerConfig(**keys), 2)  # type: ignore[arg-type]

    assert (optimizer(), optimizer(exp_avg_dtype="bfloat16"), optimizer(name="adafactor")) == (12, 10, 4)
    assert optimizer(cpu_offload_fraction=0.75) == 3
    arch = architecture("codellama-7b")
    kept = [
        memory.layer_activations(arch, Config(), STACKS["plain"], 8192).kept(ParallelConfig(**keys))
        for keys in (
            {"recompute": "full"},
            {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
            {"recompute": "selective", "recompute_modules": ("mlp",)},
            {},
        )
    ]
    assert kept == sorted(kept)
    assert kept[0] == 8192 * 4096 * 2


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if "34b" in path.stem else pytest.mark.slow, id=path.stem) for path in RECIPES],
)
def test_recipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads, has the paper's settings, fits, and says of itself what the planner says of it now."""
    monkeypatch.chdir(ROOT)
    text, config = path.read_text(encoding="utf-8"), load_config(str(path), [])
    model, method = path.stem.split("_")[:2]
    expected = METHODS[method]
    assert config.batch.global_batch_size == 512
    assert (config.optimizer.name, config.optimizer.learning_rate) == (expected["optimizer"], expected["learning_rate"])
    assert (config.train.epochs, config.data.max_length) == (expected["epochs"], expected["length"])
    assert config.optimizer.clip_grad_norm == expected["clip"]
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    (words,) = re.findall(r"^#   reflectron plan (.*)$", text, re.MULTILINE)
    command = parser.parse_intermixed_args(words.split())
    assert Path(command.model).stem == model
    command.words = [str(path)]
    prediction = make_planner(command).predict(config)
    assert prediction.fits
    (line,) = (line for line in text.splitlines() if line.startswith("# Predicted"))
    # Hours and memory; another numpy may draw other lengths.
    said, derived = ([float(n) for n in re.findall(r"\d+\.\d", one)] for one in (line, predicted_line(prediction)))
    assert said == pytest.approx(derived, rel=0.01, abs=0.11)


def test_the_models_of_the_papers_have_recipes() -> None:
    names = {tuple(path.stem.split("_")) for path in RECIPES}
    assert {("codellama-34b", "reflectioncoder", "16xH100", *more) for more in ((), ("te",), ("te", "fp8"))} <= names
    for model in ("codellama-7b", "codellama-34b", "deepseek-coder-6.7b", "deepseek-coder-33b"):
        assert {(model, "reflectioncoder", "16xA800")} <= names
    for model in ("codellama-python-7b", "deepseek-coder-6.7b"):
        for method in ("magicoder", "magicoder-s"):
            assert {(model, method, "16xA800"), (model, method, "8xH100")} <= names


def test_command_on_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = ROOT / "examples" / "quickstart"
    config = tmp_path / "run.yaml"
    files = [{"path": str(quickstart / "data" / f"{name}.jsonl")} for name in ("reflection", "instruction")]
    config.write_text(
        json.dumps(
            {
                "output_dir": str(tmp_path),
                "data": {"train": files, "max_length": 2048},
                "model": {"config": str(quickstart / "model" / "config.json")},
                "tokenizer": {"path": str(quickstart / "tokenizer")},
                "batch": {"global_batch_size": 16},
            }
        )
    )
    out = tmp_path / "best.yaml"
    words = [str(config), "--lengths", "data", "--gpu", "H200-141GB", "--gpus", "2", "--tokens", "--write", str(out)]
    assert cli.main(["plan", *words, "--price-per-gpu-hour", "2.5"]) == 0
    printed = capsys.readouterr().out
    for part in ("GPU hours", "price", "bubble", "mask rate", "297 samples of data.train", "nothing measured", "400"):
        assert part in printed
    assert load_config(str(out), []).data == load_config(str(config), []).data
    assert cli.main(["plan", str(out), "--as-is", "--gpus", "2", "--gpu", "H200-141GB"]) == 0
    assert cli.main(["plan", str(out), "--as-is", "--gpus", "2", "parallel.data_parallel_size=3"]) == 2
    assert "--gpus is 2, expected" in capsys.readouterr().err


@pytest.mark.parametrize("spare_rows", [0, 100])
def test_the_vocabulary_is_that_of_the_run_where_a_tokenizer_is_at_hand(spare_rows: int, tmp_path: Path) -> None:
    quickstart, source = ROOT / "examples" / "quickstart", str(tmp_path / "config.json")
    keys = json.loads((quickstart / "model" / "config.json").read_bytes())
    rows = keys["vocab_size"] + spare_rows
    Path(source).write_text(json.dumps(keys | {"vocab_size": rows}))
    assert planned_architecture(source, Config()).vocab_size == rows + 7
    assert planned_architecture(source, Config(data=DataConfig(template="magicoder"))).vocab_size == rows
    tokenizer = TokenizerConfig(path=str(quickstart / "tokenizer"))
    config = Config(model=ModelConfig(config=source), tokenizer=tokenizer)
    assert planned_architecture(source, config) == read_model_inputs(config).arch
    assert planned_architecture(source, config).vocab_size == rows + (0 if spare_rows else 7)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, reflectron.tools.planner.report, reflectron.tools.commands.plan; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_backend_has_its_bytes() -> None:
    assert set(LAYER_TRAFFIC) == set(get_args(LayersBackend))
    assert set(SUMMED) == set(UPDATED) == set(get_args(Arithmetic))


def test_every_gpu_is_named_as_it_is_listed() -> None:
    assert all(gpu.name == name and gpu.memory_bytes < 150 * memory.GIB for name, gpu in GPUS.items())


@pytest.mark.slow
def test_calibration_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates, model = tmp_path / "rates.json", str(ROOT / "examples" / "recipes" / "models" / "codellama-7b.json")
    assert cli.main(["bench", "calibrate", "--out", str(rates), "--processes", "1"]) == 0
    device = json.loads(rates.read_bytes())["device"]
    assert f"{device}, float32, 1 processes at once" in capsys.readouterr().out
    assert cli.main(["plan", "--model", model, "--gpus", "8", "--calibration", str(rates), "--top", "1"]) == 0
    assert f"measured on {device}" in capsys.readouterr().out
