"""The distillation head's kernels on this device -> rows of errors against float64, beside those of the plain backend.

All of it on purpose in one problem: pairs and unpaired rows, ignored labels, rows of weight zero, sizes that divide no
tile. Without CUDA the kernels run in Triton's interpreter on small sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reflectron.kernels.distill_head import PairRows, Rows, distillation_head
from reflectron.tools.bench.parity import MOST_OF_PLAIN

# Beside ``MOST_OF_PLAIN``, in units of the type's rounding: sums in another order differ by that; on the CPU the plain
# backend rounds the logits' gradient less than kernels do before its products.
_TINY = {"cuda": 0.1, "cpu": 0.25}
# Of the loss and its terms, relative: the codes of a pair's logits have 16 bits.
_MOST_OF_LOSS = 1e-4
# d, V, pairs, unpaired rows
SIZES = {
    "cuda": ((1024, 32016, 513, 130), (200, 4099, 129, 1), (4096, 8004, 1024, 2048)),
    "cpu": ((72, 132, 9, 5),),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "forward KL": {"divergence": "forward_kl"},
    "forward KL, T 2": {"divergence": "forward_kl", "temperature": 2.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD 0.3": {"divergence": "jsd", "jsd_beta": 0.3},
}
DTYPES = (torch.bfloat16, torch.float32)
Problem = tuple[Tensor, PairRows, Rows]


def kernel_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each result of each problem; ``passed`` where its error is about that of the plain backend or less."""
    for sizes in SIZES[device.type]:
        for dtype in DTYPES:
            problem = make_problem(*sizes, dtype=dtype, device=device)
            for name, options in OPTIONS.items():
                d, vocab, pairs, rows = sizes
                case = f"d {d}, V {vocab}, {pairs} pairs, {rows} rows, {name}"
                yield from _compared(case, problem, options)


def make_problem(d: int, vocab: int, pairs: int, rows: int, *, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random numbers, the same at every call; logits have standard deviation 3, a student is near its teacher."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def labels(count: int) -> Tensor:
        values = torch.randint(vocab, (count,), generator=random)
        values[::4] = -100
        return values.to(device)

    def weights(count: int, skip: int) -> Tensor:
        values = torch.rand(count, generator=random)
        values[skip::5] = 0
        return values.to(device)

    def leaf(values: Tensor) -> Tensor:
        return values.to(device, dtype).requires_grad_()

    teacher = 3 * normal(pairs, d)
    return (
        leaf(normal(vocab, d) * d**-0.5),
        PairRows(
            leaf(teacher),
            leaf(teacher + 0.2 * normal(pairs, d)),
            labels(pairs),
            labels(pairs),
            weights(pairs, 1),
            weights(pairs, 2),
            weights(pairs, 3),
        ),
        Rows(leaf(3 * normal(rows, d)), labels(rows), weights(rows, 0)),
    )


def _compared(case: str, problem: Problem, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    dtype = problem[0].dtype
    ours, again = (solve(problem, "triton", options) for _ in range(2))
    plain, truth = solve(problem, "reference", options), solve(_in_float64(problem), "reference", options)
    row = {"part": "distillation head", "case": case, "backend": "triton", "dtype": str(dtype).removeprefix("torch.")}
    for name, exact in truth.items():
        error, plain_error = _distance(ours[name], exact), _distance(plain[name], exact)
        limit = MOST_OF_PLAIN * plain_error + _TINY[exact.device.type] * torch.finfo(dtype).eps + 1e-6
        if exact.dim() == 0:
            limit = _MOST_OF_LOSS
        yield row | {"tensor": name, "error": error, "plain_error": plain_error, "passed": error <= limit}
    same = all(torch.equal(ours[name], again[name]) for name in truth)
    yield row | {"tensor": "same bits when repeated", "error": 0.0, "plain_error": 0.0, "passed": same}


def solve(problem: Problem, backend: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, terms and gradients by name; that of the matrix is added to an accumulator that is not empty."""
    weight, pairs, rows = problem
    main_grad = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
    out = distillation_head(weight, pairs, rows, backend=backend, main_grad=main_grad, **options)
    hidden = (pairs.teacher_hidden, pairs.student_hidden, rows.hidden)
    _, *gradients = torch.autograd.grad(out.loss, (weight, *hidden))
    terms = {name: getattr(out, name).detach() for name in ("loss", "ce_teacher", "ce_student", "ce_rows", "kl")}
    names = ("grad teacher", "grad student", "grad rows")
    return terms | dict(zip(names, gradients, strict=True)) | {"grad matrix": main_grad.detach() - 1}


def _in_float64(problem: Problem) -> Problem:
    weight, pairs, rows = problem

    def leaf(values: Tensor) -> Tensor:
        return values.detach().double().requires_grad_()

    wide = replace(pairs, teacher_hidden=leaf(pairs.teacher_hidden), student_hidden=leaf(pairs.student_hidden))
    return leaf(weight), wide, replace(rows, hidden=leaf(rows.hidden))


def _distance(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()
