"""The Triton kernels: tiles that divide nothing evenly, precision of the codes, recomputed codes, and their limits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import Divergence
from testkit.head_problem import (
    DEVICE,
    HIDDEN,
    VOCAB,
    assert_close,
    autograd_head,
    make_problem,
    relative_error,
    solve,
    solve_exactly,
)

triton_passes = pytest.importorskip("reflectron.kernels.triton_passes")
from reflectron.kernels import tuning  # noqa: E402

interpreted_only = pytest.mark.skipif(DEVICE.type == "cuda", reason="needs the small tiles of the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # columns beyond the vocabulary are -inf
BM, BN, BK = tuning.INTERPRETER.rows, tuning.INTERPRETER.columns, tuning.INTERPRETER.depth


@interpreted_only
@pytest.mark.parametrize("hidden", [BK, BK + 3])
@pytest.mark.parametrize("vocab", [1, BN - 1, BN + 1])
@pytest.mark.parametrize("n", [1, BM - 1, BM + 1])
def test_tiles_that_divide_nothing(n: int, vocab: int, hidden: int) -> None:
    problem = make_problem(n, n, dtype=torch.float32, vocab=vocab, hidden=hidden)
    ours = solve(problem, backend="triton", divergence="jsd", temperature=0.7)
    assert_close(ours, solve_exactly(problem, divergence="jsd", temperature=0.7), 1e-5)


@interpreted_only
@pytest.mark.parametrize(("n", "m"), [(7 * BM + 2, 0), (0, 9 * BM + 3)])
def test_more_row_blocks_than_a_group(n: int, m: int) -> None:
    problem = make_problem(n, m, dtype=torch.float32, vocab=2 * BN + 5)
    assert_close(solve(problem, backend="triton"), solve_exactly(problem), 1e-5)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensor_descriptors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results to the bit as with pointers, also where rows are not aligned to 16 bytes and must use those."""
    with_descriptors = replace(tuning.INTERPRETER, descriptors=True)
    for hidden in (24, 25):
        problem = make_problem(BM + 1, 3, dtype=dtype, vocab=BN + 1, hidden=hidden)
        pointers = solve(problem, backend="triton")
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "INTERPRETER", with_descriptors)
            descriptors = solve(problem, backend="triton")
        assert all(torch.equal(pointers[name], descriptors[name]) for name in pointers)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("distance", [1.0, 0.1])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (torch.float16, torch.float32))]
)
@pytest.mark.usefixtures("large_tiles")
def test_error_is_that_of_torch_from_fp32_logits(
    dtype: torch.dtype, distance: float, divergence: str, temperature: float
) -> None:
    problem = make_problem(48, 16, dtype=dtype, vocab=300, distance=distance, device=DEVICE)
    options = {"divergence": divergence, "temperature": temperature}
    truth = solve_exactly(problem, **options)
    ours, theirs = solve(problem, backend="triton", **options), solve(problem, autograd_head, **options)
    for name in ("grad_weight", "grad_teacher", "grad_student", "grad_rows"):
        limit = 1.2 * relative_error(theirs[name], truth[name]) + 1e-7  # torch is exact to a unit in fp32
        assert relative_error(ours[name], truth[name]) <= limit, name


def test_confident_rows_keep_their_gradient() -> None:
    """p close to 1 at the label: the gradient is the small p - 1, which a rounded code of p would lose."""
    weight, pairs, rows = make_problem(0, 40, dtype=torch.bfloat16, vocab=80, hidden=64, device=DEVICE)
    with torch.no_grad():
        rows.hidden.copy_(weight[:40])  # a row's own logit is its squared length, about 16; the others are about 2
    labels = torch.arange(40, device=DEVICE)
    problem = weight, pairs, replace(rows, labels=labels, ce_weight=torch.ones_like(rows.ce_weight))
    truth = solve_exactly(problem)
    assert truth["rows_ce"].median() < 1e-4
    assert relative_error(solve(problem, backend="triton")["grad_rows"], truth["grad_rows"]) < 4e-3


def test_codes_live_from_forward_to_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk keeps its codes, within the limit and in aligned rows; the backward consumes them."""
    stride = triton_passes.CODE_ALIGNMENT
    assert stride > VOCAB
    monkeypatch.setattr(triton_passes, "MAX_CODE_BYTES", 12 * stride * 2)
    problem = make_problem(20, 10, dtype=torch.bfloat16, device=DEVICE)
    loss = distillation_head(*problem, backend="triton").loss
    kept = loss.grad_fn.kept
    (planes,) = (codes.planes for codes in kept.values())
    assert planes.shape == (12, stride)
    assert planes.dtype == torch.int16
    loss.backward()
    assert not kept


@pytest.mark.parametrize(
    ("environment", "dtype", "message"),
    [
        (
            {},
            "float32",
            "backend is 'triton', but weight is on cpu, expected a CUDA device, or the CPU with TRITON_INT",
        ),
        ({"TRITON_INTERPRET": "1"}, "float64", "backend is 'triton', but weight has dtype torch.float64, expected"),
    ],
)
def test_triton_that_cannot_run_is_an_error(
    environment: dict[str, str], dtype: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    weight = torch.zeros(VOCAB, HIDDEN, dtype=getattr(torch, dtype))
    with pytest.raises(ValueError, match=message):
        distillation_head(weight, backend="triton")
    assert distillation_head(weight, backend="auto").loss.item() == 0


@pytest.mark.slow
def test_machine_without_triton() -> None:
    """The head works, says what is missing when asked for it, and never imports Triton by itself."""
    program = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
from reflectron.kernels.distill_head import distillation_head
assert distillation_head(torch.zeros(3, 4)).loss.item() == 0
try:
    distillation_head(torch.zeros(3, 4), backend="triton")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "backend is 'triton', but triton is not installed; use 'reference' or 'auto'\n"
