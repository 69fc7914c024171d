"""The distillation head inside what torch wraps around it: the same numbers, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import HeadLoss
from testkit.head_problem import DEVICE, assert_close, convert, leaves, make_problem, solve, solve_exactly

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]
BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.slow)]


def recomputed(head: Callable[..., HeadLoss], reentrant: bool) -> Callable[..., HeadLoss]:
    """``head`` inside an activation checkpoint."""

    def recomputing(weight: Tensor, pairs: object, rows: object, **options: object) -> HeadLoss:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            at = replace(pairs, teacher_hidden=tensors[1], student_hidden=tensors[2]), replace(rows, hidden=tensors[3])
            return tuple(vars(head(tensors[0], *at, **options)).values())

        return HeadLoss(*checkpoint(run, *leaves(weight, pairs, rows), use_reentrant=reentrant))

    return recomputing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["around both", "forward", "backward", "recomputed"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_autocast_changes_nothing(divergence: str, where: str, dtype: torch.dtype, backend: str) -> None:
    device = DEVICE if backend == "triton" else torch.device("cpu")
    problem = make_problem(dtype=torch.float32, distance=1e-2, device=device)
    options = {"divergence": divergence, "backend": backend}
    expected = solve(problem, **options)
    head = recomputed(distillation_head, reentrant=False) if where == "recomputed" else distillation_head
    with torch.autocast(device.type, dtype=dtype, enabled=where != "backward"):
        out = head(*problem, **options)
        if where == "around both":
            gradients = torch.autograd.grad(out.loss, leaves(*problem))
    if where != "around both":
        with torch.autocast(device.type, dtype=dtype, enabled=where == "backward"):
            gradients = torch.autograd.grad(out.loss, leaves(*problem))
    names = ("grad_weight", "grad_teacher", "grad_student", "grad_rows")
    found = {**{name: value.detach() for name, value in vars(out).items()}, **dict(zip(names, gradients, strict=True))}
    assert found["kl"] > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_activation_checkpoint_changes_nothing(reentrant: bool) -> None:
    problem = make_problem(dtype=torch.float32)
    expected = solve(problem)
    out = recomputed(distillation_head, reentrant)(*problem)
    out.loss.backward()
    for leaf, name in zip(leaves(*problem), ("weight", "teacher", "student", "rows"), strict=True):
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), name


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("to_main_grad", [False, True])
def test_compiled_code_around_it_computes_the_same(compiler: str, to_main_grad: bool) -> None:
    problem = make_problem(dtype=torch.float32)
    truth = solve_exactly(problem)

    def step(weight: Tensor, teacher: Tensor, student: Tensor, hidden: Tensor, main_grad: Tensor | None) -> Tensor:
        pairs = replace(problem[1], teacher_hidden=teacher * 1, student_hidden=student * 1)
        rows = replace(problem[2], hidden=hidden * 1)
        return distillation_head(weight, pairs, rows, backend="reference", main_grad=main_grad).loss * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=compiler)
    for _ in range(2):  # the second call runs what the first compiled
        main_grad = torch.zeros_like(problem[0]) if to_main_grad else None
        loss = compiled(*leaves(*problem), main_grad)
        gradients = torch.autograd.grad(loss, leaves(*problem))
        names = ("grad_weight", "grad_teacher", "grad_student", "grad_rows")
        found = {"loss": loss.detach() / 2, **{n: g / 2 for n, g in zip(names, gradients, strict=True)}}
        if main_grad is not None:
            found["grad_weight"] = main_grad / 2
        assert_close(found, {name: truth[name] for name in found}, 1e-6)


def test_a_second_derivative_is_refused_and_never_zero() -> None:
    problem = make_problem(dtype=torch.float32)
    out = distillation_head(*problem)
    (gradient,) = torch.autograd.grad(out.loss, problem[0], create_graph=True)
    assert torch.equal(gradient, solve(problem)["grad_weight"])
    with pytest.raises(RuntimeError, match="distillation_head has no second derivative"):
        (out.loss + gradient.square().sum()).backward()


def test_transforms_are_refused() -> None:
    weight, pairs, rows = make_problem(dtype=torch.float32)

    def loss(weight: Tensor) -> Tensor:
        return distillation_head(weight, pairs, rows).loss

    several = weight.detach().expand(2, *weight.shape)
    for transform, argument in ((torch.func.grad(loss), weight), (torch.vmap(loss), several)):
        with pytest.raises(RuntimeError, match=r"distillation_head works under no transform of torch\.func"):
            transform(argument.detach())
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="distillation_head has no forward-mode derivative"),
    ):
        loss(forward_ad.make_dual(weight.detach(), torch.ones_like(weight)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same(context: Callable[[], object]) -> None:
    problem = make_problem(dtype=torch.float32)
    expected = solve(problem)
    with context():
        out = distillation_head(*problem)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, expected["loss"])
    assert torch.equal(out.rows_ce, expected["rows_ce"])


def test_strides_and_inputs_without_gradient() -> None:
    weight, pairs, rows = convert(make_problem(), torch.float64)
    expected = solve((weight, pairs, rows))
    strided = weight.detach().T.contiguous().T.requires_grad_()
    student = torch.stack((pairs.student_hidden.detach(),) * 2, dim=2)[..., 0].requires_grad_()
    frozen = replace(pairs, teacher_hidden=pairs.teacher_hidden.detach(), student_hidden=student)
    out = distillation_head(strided, frozen, replace(rows, hidden=rows.hidden.detach()))
    gradients = torch.autograd.grad(out.loss, (strided, student))
    torch.testing.assert_close(gradients, (expected["grad_weight"], expected["grad_student"]), rtol=0, atol=1e-12)
