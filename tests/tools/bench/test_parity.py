"""Each backend of attention, layers, weight gradients and AdamW against float64, where it runs.

On the CPU scaled dot product is the only attention, and Liger's kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from reflectron.engine.model.backends.choose import CANDIDATES
from reflectron.tools.bench.checks import PARITY_CASES, parity_rows

PAIRS = [(name, backend) for name, case in PARITY_CASES.items() for backend in CANDIDATES[case.part]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_a_backend_is_as_exact_as_the_plain_one(case: str, backend: str, dtype: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(parity_rows(device, dtype, [case], [backend]))
    if reason := rows[0].get("reason"):
        pytest.skip(f"{backend}: {reason}")
    if PARITY_CASES[case].part == "attention":
        assert [row["tensor"] for row in rows] == ["output", "query", "key", "value"]
    assert all(row["passed"] for row in rows), rows
