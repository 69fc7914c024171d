"""A checkpoint continues as the run that wrote it: to the bit in its own layout, within rounding in any other.

Three steps, a save, three more steps; then the checkpoint is loaded into models full of NaN and trained three steps. A
mistake in the moments shows in the second of them, one in the step count in the first two, one in a stale copy of the
weights at once.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from testkit.checkpoint_cases import BFLOAT16, EXACT, FLOAT32, SAVE, Case, Results, assert_follows, run_cases

TP2 = {"parallel": {"tensor_model_parallel_size": 2}}
PP2 = {"parallel": {"pipeline_model_parallel_size": 2}}
PP2_VPP2 = {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}}
# Only a replica's own share of the parameters is up to date when it saves.
OVERLAP = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000}}
NOT_SHARDED = {"parallel": {"distributed_optimizer": False}}
TP2_NOT_SHARDED = {"parallel": TP2["parallel"] | NOT_SHARDED["parallel"]}


# (model, settings of all jobs, processes of the job that saves, its settings, {processes: jobs that load}).
CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any], dict[int, list[dict[str, Any]]]]] = {
    "tp2": ("llama", {}, 2, TP2, {1: [{}, NOT_SHARDED], 2: [PP2_VPP2]}),
    "one-rank": ("qwen3", {}, 1, {}, {2: [PP2_VPP2]}),
    "interleaved-tied": ("llama_tied", {"divisible_by": 256}, 2, PP2_VPP2, {1: [{}], 2: [TP2, PP2]}),
    "adafactor-interleaved": ("llama_tied", {"optimizer": "adafactor"}, 2, PP2_VPP2, {1: [{}], 2: [TP2]}),
    "bfloat16-dp2-overlap": ("llama", {"dtype": "bfloat16"}, 2, OVERLAP, {2: [PP2_VPP2, {}], 1: [{}]}),
    # A vocabulary that is padded to 768 rows by the one and 1024 by the others.
    "tied-pp2": ("llama_tied", {"divisible_by": 256}, 2, PP2, {2: [TP2, {}], 1: [NOT_SHARDED]}),
    "bfloat16-dp2": ("qwen2", {"dtype": "bfloat16"}, 2, {}, {2: [{}, TP2], 1: [NOT_SHARDED]}),
    "not-sharded": (
        "qwen3",
        {"dtype": "bfloat16"},
        2,
        TP2_NOT_SHARDED,
        {2: [TP2, {}], 1: [NOT_SHARDED]},
    ),
    "adafactor-tp2": ("qwen2", {"optimizer": "adafactor", "divisible_by": 512}, 2, TP2, {2: [TP2, PP2, {}], 1: [{}]}),
    "adafactor-bfloat16-tied-pp2": (
        "llama_tied",
        {"optimizer": "adafactor", "dtype": "bfloat16"},
        2,
        PP2,
        {2: [PP2, TP2], 1: [{}]},
    ),
    # megatron-core gives parameters that it takes for experts' an optimizer and buffers of their own.
    "two-optimizers": ("llama", {"as_experts": True}, 2, {}, {2: [TP2, {"as_experts": False}], 1: [NOT_SHARDED]}),
    "two-optimizers-not-sharded": ("qwen3", {"as_experts": True}, 2, TP2_NOT_SHARDED, {2: [{}], 1: [NOT_SHARDED]}),
    "tp2-pp2": (
        "llama",
        {},
        4,
        {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}},
        {
            4: [{"parallel": {"tensor_model_parallel_size": 4}}, TP2, PP2, {}],
            1: [{"divisible_by": 1}],
        },
    ),
}


# Saved after three steps of which none made an update: there are no moments yet.
BEFORE: dict[str, dict[str, Any]] = {
    "sharded": {"parallel": {}},
    "not-sharded": NOT_SHARDED | {"dtype": "bfloat16"},
    "adafactor": {"optimizer": "adafactor"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Run all cases in one process: importing takes longer than one of them."""
    cases = {
        "layouts": Case(
            "llama", [(2, {"saved": SAVE | TP2, "tp2": TP2, "pp2": PP2, "dp2": {}, "not_sharded": NOT_SHARDED})]
        ),
        "while_saving": Case(
            "llama", [(2, {"saved": SAVE | PP2 | {"steps_while_saving": 2}, "loaded": PP2, "tp2": TP2})]
        ),
    }
    for name, (model, common, processes, saving, loading) in CASES.items():
        others = [(size, {f"{size}_{i}": layout for i, layout in enumerate(loading[size])}) for size in loading]
        cases[name] = Case(model, [(processes, {"saved": SAVE | saving, "same": saving}), *others], common)
    for name, common in BEFORE.items():
        jobs = {"never_saved": {"do": "train"}, "saved": SAVE, "loaded": {}}
        cases[f"before-{name}"] = Case("llama", [(2, jobs)], common | {"updates": 0})
    return run_cases(tmp_path_factory.mktemp("checkpoint"), cases)


@pytest.mark.slow
def test_layouts(results: dict[str, Results]) -> None:
    found = results["layouts"]
    (line,) = found["saved"]["lines"]
    assert re.match(r"checkpoint  \S+/layouts/checkpoints/step_00000003 \(", line)
    assert_follows(found["tp2"], found["saved"], EXACT)
    for name in ("pp2", "dp2", "not_sharded"):
        assert_follows(found[name], found["saved"], FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_models_optimizers_and_layouts(case: str, results: dict[str, Results]) -> None:
    other = BFLOAT16 if CASES[case][1].get("dtype") == "bfloat16" else FLOAT32
    found = dict(results[case])
    saved = found.pop("saved")
    assert_follows(found.pop("same"), saved, EXACT)
    for result in found.values():
        assert_follows(result, saved, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE)
def test_a_save_before_the_first_update(name: str, results: dict[str, Results]) -> None:
    """It changes nothing of the steps that follow, and they follow from it."""
    found = results[f"before-{name}"]
    (line,) = found["saved"]["lines"]
    assert line.startswith("checkpoint  ")
    assert found["saved"]["steps"] == found["never_saved"]["steps"]
    assert_follows(found["loaded"], found["saved"], EXACT)


@pytest.mark.slow
def test_training_continues_while_a_checkpoint_is_written(results: dict[str, Results]) -> None:
    """Steps between the copy and the first written byte are not in the checkpoint."""
    found = results["while_saving"]
    assert len(found["saved"]["while_saving"]) == 2
    assert_follows(found["loaded"], found["saved"], EXACT)
    assert_follows(found["tp2"], found["saved"], FLOAT32)
