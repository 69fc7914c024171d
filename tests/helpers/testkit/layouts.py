"""Parallel layouts of one global batch: how they are run, and how each is compared with the reference of its kind."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from testkit.places import program_path

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


PLAIN = {"backends": {"layers": "torch", "weight_gradient": "torch", "adamw": "torch"}}


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
        script = program_path("layout_ranks")
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
