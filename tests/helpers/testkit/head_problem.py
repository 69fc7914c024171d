"""Problems for the tests of the distillation head, and their solution by plain autograd on full logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import Divergence, HeadLoss, PairRows, Rows

VOCAB, HIDDEN = 37, 12
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0))]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the Triton kernels

Problem = tuple[Tensor, PairRows, Rows]


def make_problem(
    n: int = 9,
    m: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
    distance: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """Output matrix and rows with every kind of weight: zero, one ignored label of a pair, KL alone, none at all."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def labels(count: int) -> Tensor:
        values = torch.randint(vocab, (count,), generator=rng)
        values[::4] = -100
        return values

    def weights(count: int, skip: int) -> Tensor:
        values = torch.rand(count, generator=rng)
        values[skip::5] = 0
        return values

    weight = normal(vocab, hidden) / 2
    teacher = normal(n, hidden)
    student = teacher + distance * normal(n, hidden)
    pairs = PairRows(
        teacher_hidden=teacher,
        student_hidden=student,
        teacher_labels=labels(n),
        student_labels=labels(n).roll(1),
        ce_teacher_weight=weights(n, 1),
        ce_student_weight=weights(n, 2),
        kl_weight=weights(n, 2),
    )
    rows = Rows(normal(m, hidden), labels(m), weights(m, 0))
    return convert((weight, pairs, rows), dtype, device)


def convert(problem: Problem, dtype: torch.dtype, device: torch.device | str | None = None) -> Problem:
    """The same problem with new leaves of another type, on another device."""
    weight, pairs, rows = problem
    new = [x.detach().to(device, dtype).requires_grad_() for x in leaves(weight, pairs, rows)]
    pairs, rows = (type(group)(*(x.to(device) for x in vars(group).values())) for group in (pairs, rows))
    return new[0], replace(pairs, teacher_hidden=new[1], student_hidden=new[2]), replace(rows, hidden=new[3])


def leaves(weight: Tensor, pairs: PairRows, rows: Rows) -> list[Tensor]:
    return [weight, pairs.teacher_hidden, pairs.student_hidden, rows.hidden]


class _LogitProduct(torch.autograd.Function):
    """fp32 logits whose gradient is rounded to ``dtype`` before its products, as tensor cores take it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        dz = dz.to(ctx.dtype).to(hidden.dtype)
        return dz @ weight, dz.T @ hidden, None


def autograd_head(
    weight: Tensor,
    pairs: PairRows,
    rows: Rows,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    teacher_weight: Tensor | None = None,
) -> HeadLoss:
    """The same loss from full logits (fp32 for half types, else the type of the inputs) by torch's own functions."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    gradient = weight.dtype if weight.dtype == torch.bfloat16 else compute

    teachers = weight if teacher_weight is None else teacher_weight

    def logits(hidden: Tensor, matrix: Tensor = weight) -> Tensor:
        return _LogitProduct.apply(hidden.to(compute), matrix[:vocab_size].to(compute), gradient)

    def cross_entropy(z: Tensor, labels: Tensor, ce_weight: Tensor) -> Tensor:
        return ce_weight * F.cross_entropy(z, labels, reduction="none")

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(1)

    teacher = logits(pairs.teacher_hidden, teachers)
    log_t = (teacher.detach() / temperature).log_softmax(1)
    student = logits(pairs.student_hidden)
    log_s = (student / temperature).log_softmax(1)
    if divergence == "forward_kl" or (divergence == "jsd" and jsd_beta == 0):
        values = kl(log_t, log_s)
    elif divergence == "reverse_kl" or (divergence == "jsd" and jsd_beta == 1):
        values = kl(log_s, log_t)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_t + math.log(jsd_beta), log_s + math.log(1 - jsd_beta))
        values = jsd_beta * kl(log_t, log_m) + (1 - jsd_beta) * kl(log_s, log_m)
    else:
        assert_never(divergence)
    rows_ce = cross_entropy(logits(rows.hidden), rows.labels, rows.ce_weight)
    terms = (
        cross_entropy(teacher, pairs.teacher_labels, pairs.ce_teacher_weight).sum(),
        cross_entropy(student, pairs.student_labels, pairs.ce_student_weight).sum(),
        rows_ce.sum(),
        temperature**2 * (pairs.kl_weight * values).sum(),
    )
    return HeadLoss(sum(terms), *terms, rows_ce)


def solve(problem: Problem, head: Any = distillation_head, **options: Any) -> dict[str, Tensor]:
    """Loss, terms and gradients by name."""
    out = head(*problem, **options)
    names = ("grad_weight", "grad_teacher", "grad_student", "grad_rows")
    gradients = torch.autograd.grad(out.loss, leaves(*problem))
    return {**{name: value.detach() for name, value in vars(out).items()}, **dict(zip(names, gradients, strict=True))}


def solve_exactly(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """The truth: autograd on full logits in fp64."""
    return solve(convert(problem, torch.float64), autograd_head, **options)


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Every result within ``tolerance``, relative to the largest number of its tensor."""
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        scale = value.abs().max().item() if value.numel() else 0.0
        message = f"{name} differs"
        found = ours[name].to(value)
        torch.testing.assert_close(
            found, value, rtol=0, atol=tolerance * max(scale, 1e-3), msg=lambda m, s=message: f"{s}: {m}"
        )


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()
