"""The gradient of one global batch is the same for every parallel layout, token budget and packing.

The reference is one process that runs a sample a microbatch, without packing and padding.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "llama_8_heads": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "codellama_vocabulary": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32016,
    },
    "qwen3_one_layer": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 1},
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 720,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}


def parallel(tp: int = 1, pp: int = 1, vpp: int = 1, *, sp: bool = False, **keys: Any) -> dict[str, Any]:
    """A layout; the processes that tensor and pipeline parallelism leave over are replicas."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "sequence_parallel": sp,
    }
    return {"parallel": sizes | keys}


FULL = {"recompute": "full"}
SELECTIVE = {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}
# Small buckets, so that several are on their way at a time.
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000}
REFERENCE: dict[str, Any] = {"unpacked": True}
# Attention by one call for all segments, as kernels for CUDA have it; ``varlen_kernel`` stands in for theirs.
VARLEN = {"attention": "flash_attention_2"}
# The same by transformer-engine's module, whose switches megatron-core would set with every model.
TE_VARLEN = {"attention": "transformer_engine"}

# Layouts by number of processes. Those that every kind of model runs:
COMMON: dict[int, dict[str, dict[str, Any]]] = {
    1: {"reference": REFERENCE},
    4: {
        "tp2_sp_pp2_vpp2": parallel(2, 2, 2, sp=True),
        "tp2_dp2": parallel(2),
        "pp4_uneven": parallel(1, 4, layers_per_stage=(1, 3, 4, 1)),
        "pp2_vpp3_dp2": parallel(1, 2, 3),
    },
}
# Those of Llama alone:
LLAMA: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "packed": {},
        "other_budget": {"tokens_per_microbatch": 768},
        "recompute_full": parallel(**FULL),
        "recompute_selective": parallel(**SELECTIVE),
        "varlen_recompute_attention": parallel(recompute="selective") | VARLEN,
        "vocabulary_without_padding": {"divisible_by": 1},
    },
    2: {
        "tp2": parallel(2),
        "tp2_sp": parallel(2, sp=True),
        "pp2": parallel(1, 2),
        "pp2_vpp2": parallel(1, 2, 2),
        "pp2_vpp3_uneven": parallel(1, 2, 3, layers_per_stage=(1, 2, 1, 1, 3, 1)),
        "dp2": {},
        "tp2_padded_vocabulary": parallel(2) | {"divisible_by": 512},
        "tp2_sp_recompute_full": parallel(2, sp=True, **FULL),
        "pp2_vpp2_recompute_full": parallel(1, 2, 2, **FULL),
        "tp2_sp_recompute_selective": parallel(2, sp=True, **SELECTIVE),
        "pp2_vpp2_recompute_attention": parallel(1, 2, 2, recompute="selective"),
        "tp2_sp_varlen": parallel(2, sp=True) | VARLEN,
        "pp2_vpp2_te_varlen": parallel(1, 2, 2) | TE_VARLEN,
    },
    4: {
        "tp4_sp": parallel(4, sp=True),
        "tp2_sp_pp2": parallel(2, 2, sp=True, layers_per_stage=(6, 3)),
        "tp2_pp2_vpp4": parallel(2, 2, 4),
        "pp2_dp2": parallel(1, 2),
        "pp4_vpp2": parallel(1, 4, 2),
        "pp2_vpp2_dp2": parallel(1, 2, 2),
        "dp4": {},
    },
    8: {
        "tp2_sp_pp2_vpp2_dp2": parallel(2, 2, 2, sp=True),
        "tp2_pp4_vpp2": parallel(2, 4, 2),
        "pp4_vpp2_dp2": parallel(1, 4, 2),
        "tp4_sp_pp2_vpp2": parallel(4, 2, 2, sp=True),
        "tp2_sp_pp2_dp2_recompute_full": parallel(2, 2, sp=True, **FULL),
        "tp2_sp_pp2_dp2_recompute_selective": parallel(2, 2, sp=True, **SELECTIVE),
        "dp8": {},
        "tp2_sp_pp2_vpp2_dp2_overlap": parallel(2, 2, 2, sp=True, **OVERLAP),
    },
}
# The first step of an overlapping layout is unlike the others, so that these take two.
OVERLAPPING: dict[int, dict[str, dict[str, Any]]] = {
    2: {"dp2_overlap": parallel(**OVERLAP), "dp2_overlap_reduce": parallel(**OVERLAP, overlap_param_gather=False)},
    4: {
        "tp2_sp_dp2_overlap": parallel(2, sp=True, **OVERLAP),
        "pp2_dp2_overlap": parallel(1, 2, **OVERLAP),
        "pp2_vpp2_dp2_overlap": parallel(1, 2, 2, **OVERLAP),
    },
}
PLAIN = {"backends": {"layers": "torch", "weight_gradient": "torch", "adamw": "torch"}}
# Layouts in which backends other than plain torch's are compared with it.
BACKENDS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {"tp2": parallel(2), "tp2_sp": parallel(2, sp=True), "pp2": parallel(1, 2), "dp2_overlap": parallel(**OVERLAP)},
}


def times_computed(
    recompute: str = "none", recompute_modules: tuple[str, ...] = ("core_attn",), **_: Any
) -> dict[str, int]:
    """Runs of a layer's parts in one microbatch."""
    again = {"none": (), "selective": recompute_modules, "full": ("core_attn", "mlp")}[recompute]
    return {part: 1 + (part in again) for part in ("core_attn", "mlp")}


class Layouts:
    """Layouts that run on one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[dict[str, Any]] = []

    def add(self, kind: str, layouts: dict[int, dict[str, dict[str, Any]]]) -> None:
        model = self.folder / f"{kind}.json"
        model.write_text(json.dumps(SIZES | KINDS[kind]), encoding="utf-8")
        self.jobs += [
            {
                "kind": kind,
                "name": name,
                "processes": processes,
                "model": str(model),
                "out": str(self.folder / kind / name),
                "layout": layout,
                "steps": 2 if name == "reference" or "overlap" in name else 1,
                "saves_every_step": name == "reference",
            }
            for processes, named in layouts.items()
            for name, layout in named.items()
        ]

    def run(self) -> None:
        """Run all of them and compare each with the reference of its kind."""
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(self.jobs), encoding="utf-8")
        script = str(Path(__file__).with_name("layout_ranks.py"))
        ranks = subprocess.run(
            [sys.executable, "-W", "ignore", script, str(plan)], capture_output=True, text=True, check=False
        )
        assert ranks.returncode == 0, ranks.stderr
        for job in self.jobs:
            compare(self.folder / job["kind"], job["name"], job["steps"])
            numbers = read_numbers(self.folder / job["kind"] / job["name"])
            assert numbers["computed"] == times_computed(**job["layout"].get("parallel", {})), job["name"]

    def microbatches(self, kind: str, name: str) -> int:
        return read_numbers(self.folder / kind / name)["microbatches"]


def compare(folder: Path, layout: str, steps: int, reference: str = "reference", tolerance: float = TOLERANCE) -> None:
    """Loss, gradient (relative L2 error of each tensor) and weights after ``steps`` against the reference's."""
    expected, found = folder / reference, folder / layout
    where = f"{folder.name} {layout}"
    gradients, weights = read_tensors(found, "gradient"), read_tensors(found, f"weights_{steps}")
    expected_weights = read_tensors(expected, f"weights_{steps}")
    expected_gradients = read_tensors(expected, "gradient")
    assert gradients.keys() == expected_gradients.keys(), where
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (where, name, error.item())
        moved = (weights[name] - expected_weights[name]).norm() / gradient.norm()
        # Weights near 1 are rounded to 6e-8, which is coarser than the gradient.
        assert moved < 10 * tolerance, (where, name, moved.item())
    numbers, expected_numbers = read_numbers(found), read_numbers(expected)
    for key in ("loss", "ce_teacher", "ce_student", "ce_generation", "kl"):
        assert math.isclose(numbers[key], expected_numbers[key], rel_tol=tolerance), (where, key)
    for norm, expected_norm in zip(numbers["grad_norms"], expected_numbers["grad_norms"], strict=False):
        assert math.isclose(norm, expected_norm, rel_tol=tolerance), (where, norm, expected_norm)


def read_tensors(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of all stages."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob(f"{kind}_?.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_kind_and_layout_has_the_same_gradient(tmp_path: Path) -> None:
    layouts = Layouts(tmp_path)
    for kind, keys in KINDS.items():
        if "num_hidden_layers" not in keys:
            layouts.add(kind, COMMON)
    layouts.add("llama", LLAMA)
    for kind in ("llama", "qwen2_tied"):
        layouts.add(kind, OVERLAPPING)
    layouts.run()
    microbatches = {layouts.microbatches("llama", name) for name in ("reference", "packed", "other_budget")}
    assert len(microbatches) == 3, microbatches


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_vocabulary_over_four_and_eight_ranks(tmp_path: Path, backend: str) -> None:
    """CodeLlama's vocabulary; a small one where the interpreter runs the kernels. The last of 8 ranks hold padding."""
    kind = "codellama_vocabulary" if backend == "reference" else "llama_8_heads"
    two = {"samples": 2}
    split = {tp: parallel(tp, sp=True) | two | {"divisible_by": 64, "backend": backend} for tp in (4, 8)}
    layouts = Layouts(tmp_path)
    layouts.add(kind, {1: {"reference": REFERENCE | two}, **{tp: {f"tp{tp}": layout} for tp, layout in split.items()}})
    layouts.run()


@pytest.mark.slow
def test_weight_gradients_by_addmm(tmp_path: Path) -> None:
    """With biases, a tied embedding and reduction on the way; megatron-core adds the head's and norms' gradients."""
    layouts = Layouts(tmp_path)
    plain = {
        count: {f"{name}_plain": layout | PLAIN for name, layout in named.items()} for count, named in BACKENDS.items()
    }
    layouts.add("qwen2_tied", {1: {"reference": REFERENCE | PLAIN}})
    layouts.add("qwen2_tied", plain)
    layouts.add("qwen2_tied", BACKENDS)
    layouts.run()
    for named in BACKENDS.values():
        for name in named:
            steps = 2 if "overlap" in name else 1
            compare(tmp_path / "qwen2_tied", name, steps, reference=f"{name}_plain", tolerance=1e-6)


@pytest.mark.slow
def test_ligers_layers(tmp_path: Path) -> None:
    """Norms of rows and heads, SwiGLU and rotation inside a model, the kernels in Triton's interpreter.

    It starts a program for each row of each kernel, so there is one layer, and one pack of two samples.
    """
    few = {"samples": 2, "tokens_per_microbatch": 224}
    liger = few | {"backends": {"layers": "liger"}}
    layouts = Layouts(tmp_path)
    layouts.add("qwen3_one_layer", {1: {"reference": few | REFERENCE | PLAIN, "liger": liger}})
    layouts.add("qwen3_one_layer", {2: {"tp2_sp_recompute": liger | parallel(2, sp=True, **SELECTIVE)}})
    layouts.run()
