"""A teacher with an output matrix of its own, in the head against plain autograd on full logits."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reflectron.kernels import reference
from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import Divergence, HeadTerms
from testkit.head_problem import (
    DEVICE,
    HIDDEN,
    VOCAB,
    Problem,
    assert_close,
    autograd_head,
    convert,
    leaves,
    make_problem,
    relative_error,
    solve,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", get_args(Divergence))
WIDER = HIDDEN + 7
GRADIENTS = ("grad_weight", "grad_teacher", "grad_student", "grad_rows", "grad_teacher_weight")


def exact_type(backend: str) -> torch.dtype:
    return torch.float64 if backend == "reference" else torch.float32


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")


def make_teacher(problem: Problem, width: int = WIDER) -> tuple[Problem, Tensor]:
    """The problem with teacher rows of another width, and the teacher's matrix."""
    weight, pairs, rows = problem
    rng = torch.Generator().manual_seed(3)
    shapes = ((len(pairs.kl_weight), width), (len(weight), width))
    hidden, matrix = (torch.randn(*shape, generator=rng, dtype=torch.float64).to(weight) for shape in shapes)
    pairs = replace(pairs, teacher_hidden=hidden.requires_grad_())
    return (weight, pairs, rows), (matrix / 2).detach().requires_grad_()


def solve_apart(problem: Problem, matrix: Tensor, head: Any = distillation_head, **options: Any) -> dict[str, Tensor]:
    """Loss, terms and gradients by name, that of the teacher's matrix among them."""
    out = head(*problem, teacher_weight=matrix, **options)
    gradients = torch.autograd.grad(out.loss, [*leaves(*problem), matrix])
    return {
        **{name: value.detach() for name, value in vars(out).items()},
        **dict(zip(GRADIENTS, gradients, strict=True)),
    }


def solve_apart_exactly(problem: Problem, matrix: Tensor, **options: Any) -> dict[str, Tensor]:
    wide = matrix.detach().double().requires_grad_()
    return solve_apart(convert(problem, torch.float64), wide, autograd_head, **options)


@BACKENDS
@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("width", [HIDDEN, WIDER])
def test_matches_autograd_on_full_logits(
    width: int, temperature: float, divergence: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, on a vocabulary with padding."""
    monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", 4 * VOCAB)
    if backend == "triton":
        from reflectron.kernels import triton_passes

        monkeypatch.setattr(triton_passes, "MAX_CODE_BYTES", 12 * 64 * 4)
    problem, matrix = make_teacher(make_problem(dtype=exact_type(backend), device=device_of(backend)), width)
    options = {"divergence": divergence, "jsd_beta": 0.3, "temperature": temperature, "vocab_size": VOCAB - 2}
    for rows in (problem[1].teacher_labels, problem[1].student_labels, problem[2].labels):
        rows.clamp_(max=VOCAB - 3)
    ours = solve_apart(problem, matrix, backend=backend, **options)
    truth = solve_apart_exactly(problem, matrix, **options)
    assert truth["grad_teacher_weight"].any()
    assert_close(ours, truth, 1e-11 if backend == "reference" else 1e-5)


@BACKENDS
@EVERY_DIVERGENCE
def test_triton_and_plain_torch_agree(divergence: str, backend: str) -> None:
    """In bf16, where a gradient may err by its rounding and by that of the logits' gradient."""
    problem, matrix = make_teacher(make_problem(20, 9, dtype=torch.bfloat16, device=device_of(backend)))
    truth = solve_apart_exactly(problem, matrix, divergence=divergence)
    ours = solve_apart(problem, matrix, divergence=divergence, backend=backend)
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-4, atol=0)
    for name in GRADIENTS:
        assert ours[name].dtype == torch.bfloat16
        assert relative_error(ours[name], truth[name]) < torch.finfo(torch.bfloat16).eps, name


@BACKENDS
@EVERY_DIVERGENCE
def test_equal_matrices_are_as_one(divergence: str, backend: str) -> None:
    """The same bits but for the gradient of the matrix, which comes in two parts."""
    problem = make_problem(dtype=torch.float32, device=device_of(backend))
    options = {"divergence": divergence, "backend": backend}
    shared = solve(problem, **options)
    apart = solve_apart(problem, problem[0].detach().clone().requires_grad_(), **options)
    total = apart.pop("grad_weight") + apart.pop("grad_teacher_weight")
    torch.testing.assert_close(total, shared["grad_weight"], rtol=1e-5, atol=1e-6)
    for name, value in apart.items():
        torch.testing.assert_close(value, shared[name], rtol=0, atol=0 if backend == "triton" else 1e-6)
    same = distillation_head(*problem, teacher_weight=problem[0], **options)
    assert torch.equal(torch.autograd.grad(same.loss, problem[0])[0], shared["grad_weight"])


@BACKENDS
def test_a_frozen_teacher_costs_no_backward(backend: str) -> None:
    problem, matrix = make_teacher(make_problem(dtype=torch.float32, device=device_of(backend)))
    expected = solve_apart(problem, matrix, backend=backend)
    weight, pairs, rows = problem
    frozen = replace(pairs, teacher_hidden=pairs.teacher_hidden.detach())
    products = []
    for teacher, its_matrix in ((pairs, matrix), (frozen, matrix.detach())):
        with FlopCounterMode(display=False) as counter:
            loss = distillation_head(weight, teacher, rows, teacher_weight=its_matrix, backend=backend).loss
            loss.backward()
        products.append(counter.get_total_flops())
    assert torch.equal(loss.detach(), expected["loss"])
    torch.testing.assert_close(weight.grad, 2 * expected["grad_weight"])
    # The teacher's dH; torch does not count products that are added in place, such as the matrix's gradient.
    assert products[0] - products[1] == 2 * len(pairs.kl_weight) * VOCAB * WIDER


@BACKENDS
def test_main_grad_is_the_students(backend: str) -> None:
    problem, matrix = make_teacher(make_problem(dtype=torch.float32, device=device_of(backend)))
    expected = solve_apart(problem, matrix, backend=backend)
    main_grad = torch.ones_like(problem[0])
    distillation_head(*problem, teacher_weight=matrix, main_grad=main_grad, backend=backend).loss.backward()
    torch.testing.assert_close(main_grad, 1 + expected["grad_weight"])
    torch.testing.assert_close(matrix.grad, expected["grad_teacher_weight"])
    assert not problem[0].grad.any()


@BACKENDS
def test_without_pairs_the_teachers_matrix_has_zero_gradient(backend: str) -> None:
    weight, _, rows = make_problem(dtype=torch.float32, device=device_of(backend))
    matrix = torch.ones(len(weight), WIDER, device=weight.device, requires_grad=True)
    out = distillation_head(weight, rows=rows, teacher_weight=matrix, backend=backend)
    grad, teachers = torch.autograd.grad(out.loss, (weight, matrix))
    assert torch.equal(grad, torch.autograd.grad(distillation_head(weight, rows=rows, backend=backend).loss, weight)[0])
    assert not teachers.any()


def test_bits_do_not_depend_on_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with one matrix: one factor that is not aligned to 16 bytes is enough to need pointers."""
    pytest.importorskip("triton")
    if DEVICE.type == "cuda":
        pytest.skip("needs the small tiles of the interpreter")
    from reflectron.kernels import tuning

    for width in (16, 17):
        problem, matrix = make_teacher(make_problem(17, 3, dtype=torch.float32, vocab=33), width)
        pointers = solve_apart(problem, matrix, backend="triton")
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "INTERPRETER", replace(tuning.INTERPRETER, descriptors=True))
            descriptors = solve_apart(problem, matrix, backend="triton")
        assert all(torch.equal(pointers[name], descriptors[name]) for name in pointers)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(36, 12), r"teacher_weight is \[36, 12\] .*, expected \[37, 12\]"),
        (torch.zeros(37), r"teacher_weight has shape \[37\], expected \[37, d_t\]"),
        (torch.zeros(37, 12).double(), r"teacher_weight is \[37, 12\] torch.float64 .*, expected .* torch.float32"),
        (torch.zeros(37, 11), r"pairs.teacher_hidden is \[9, 12\] .*, expected \[9, 11\]"),
    ],
)
def test_a_matrix_that_does_not_fit_is_named(matrix: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        distillation_head(*make_problem(dtype=torch.float32), teacher_weight=matrix)


def test_terms_are_the_fields_of_the_result() -> None:
    out = distillation_head(*make_problem(dtype=torch.float32))
    loss, *terms = (getattr(out, field.name) for field in fields(HeadTerms))
    torch.testing.assert_close(loss, torch.stack(terms).sum())
