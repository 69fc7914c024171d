"""Each attention back end against float64, where it runs: on a GPU those for CUDA, anywhere scaled dot product."""

from __future__ import annotations

import pytest
import torch

from reflectron.engine.model.backends.choose import CANDIDATES
from reflectron.tools.bench.parity import ATTENTION_CASES, attention_parity


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ATTENTION_CASES)
@pytest.mark.parametrize("backend", CANDIDATES["attention"])
def test_attention_is_as_exact_as_the_plain_one(backend: str, case: str, dtype: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = attention_parity(device, dtype, [case], [backend])
    if reason := rows[0].get("reason"):
        pytest.skip(f"{backend}: {reason}")
    assert [row["tensor"] for row in rows] == ["output", "query", "key", "value"]
    assert all(row["passed"] for row in rows), rows
