"""The planner's bytes against those of real tensors: every rank of several layouts, within 10 %."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testkit.places import program_path

TOLERANCE = 0.10

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 720,
    "initializer_range": 0.02,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def parallel(tp: int = 1, pp: int = 1, vpp: int = 1, **keys: Any) -> dict[str, Any]:
    sizes = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
    }
    return {"parallel": sizes | keys}


MLP = {"recompute": "selective", "recompute_modules": ("mlp",)}
BOTH = {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}
# name: processes, model, type, layout, optimizer
JOBS: dict[str, tuple[int, str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": (1, "llama", "bfloat16", {}, {}),
    "llama_float32": (1, "llama", "float32", {}, {}),
    "llama_unsharded": (1, "llama", "bfloat16", parallel(distributed_optimizer=False), {}),
    "llama_adafactor": (1, "llama", "bfloat16", {}, {"name": "adafactor"}),
    "qwen2_tied": (1, "qwen2_tied", "bfloat16", {}, {}),
    "qwen3": (1, "qwen3", "bfloat16", {}, {}),
    "recompute_full": (1, "llama", "bfloat16", parallel(recompute="full"), {}),
    "recompute_attention": (1, "llama", "bfloat16", parallel(recompute="selective"), {}),
    "qwen3_recompute_attention": (1, "qwen3", "bfloat16", parallel(recompute="selective"), {}),
    "recompute_mlp": (1, "llama", "bfloat16", parallel(**MLP), {}),
    "recompute_both": (1, "llama", "bfloat16", parallel(**BOTH), {}),
    "tp2": (2, "llama", "bfloat16", parallel(2), {}),
    "tp2_without_sp": (2, "llama", "bfloat16", parallel(2, sequence_parallel=False), {}),
    "tp2_recompute_full": (2, "llama", "bfloat16", parallel(2, recompute="full"), {}),
    "dp2": (2, "llama", "bfloat16", {}, {}),
    "cp2": (2, "llama", "bfloat16", parallel(context_parallel_size=2), {}),
    "cp2_recompute_attention": (
        2,
        "llama",
        "bfloat16",
        parallel(context_parallel_size=2, recompute="selective"),
        {},
    ),
    "pp2": (2, "llama", "bfloat16", parallel(1, 2), {}),
    "pp2_tied": (2, "qwen2_tied", "bfloat16", parallel(1, 2), {}),
    "pp2_vpp3": (2, "llama", "bfloat16", parallel(1, 2, 3), {}),
    "tp2_pp2": (4, "llama", "bfloat16", parallel(2, 2), {}),
    "pp2_dp2_recompute_mlp": (4, "llama", "bfloat16", parallel(1, 2, **MLP), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks' numbers of all jobs."""
    folder = tmp_path_factory.mktemp("planned_memory")
    for name, keys in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(SIZES | keys))
    jobs = [
        {
            "processes": processes,
            "model": str(folder / f"{model}.json"),
            "dtype": dtype,
            "layout": layout,
            "optimizer": optimizer,
            "out": str(folder / name),
        }
        for name, (processes, model, dtype, layout, optimizer) in JOBS.items()
    ]
    plan = folder / "plan.json"
    plan.write_text(json.dumps(jobs))
    command = [sys.executable, program_path("memory_ranks"), str(plan)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_bytes_of_every_rank(folder: Path, name: str) -> None:
    files = sorted((folder / name).glob("*.json"))
    assert len(files) == JOBS[name][0]
    for file in files:
        result = json.loads(file.read_bytes())
        for part, measured in result["measured"].items():
            assert result["planned"][part] == pytest.approx(measured, rel=TOLERANCE), f"{part} of rank {file.stem}"
