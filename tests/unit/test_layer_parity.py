"""Each back end of layers, weight gradients and AdamW against float64, where it runs: on a GPU those for CUDA as well.

On the CPU Liger's kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reflectron.engine.model.backends.choose import CANDIDATES
from reflectron.tools.bench.layer_parity import LAYER_CASES, layer_parity

PAIRS = [(case, backend) for case, (part, _) in LAYER_CASES.items() for backend in CANDIDATES[part]]


@pytest.fixture(scope="module", autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """On the CPU megatron-core's layers need torch redirected, with which transformers 5 loads rotations unset."""
    places = (torch, torch.cuda, torch.cuda.nvtx, torch.nn.Module, torch.Tensor)
    before = [(place, dict(vars(place))) for place in places]
    yield
    for place, values in before:
        for name in [name for name, value in vars(place).items() if values.get(name) is not value]:
            if name in values:
                setattr(place, name, values[name])
            else:
                delattr(place, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_a_back_end_is_as_exact_as_the_plain_one(case: str, backend: str, dtype: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = layer_parity(device, dtype, [case], [backend])
    if reason := rows[0].get("reason"):
        pytest.skip(f"{backend}: {reason}")
    assert all(row["passed"] for row in rows), rows
