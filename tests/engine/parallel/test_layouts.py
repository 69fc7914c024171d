"""The gradient of one global batch is the same for every parallel layout, token budget and packing.

The reference is one process that runs a sample a microbatch, without packing and padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testkit.layouts import (
    FULL,
    KINDS,
    OVERLAP,
    PLAIN,
    REFERENCE,
    SELECTIVE,
    TE_VARLEN,
    VARLEN,
    Layouts,
    compare,
    parallel,
)

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
# Layouts in which backends other than plain torch's are compared with it.
BACKENDS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {"tp2": parallel(2), "tp2_sp": parallel(2, sp=True), "pp2": parallel(1, 2), "dp2_overlap": parallel(**OVERLAP)},
}


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
