"""The ways to compute the distillation loss that ``bench head`` compares, what each is given, and the exact gradients.

All rows weigh 1 / N, so that peers without row weights compute the same loss: mean CE(teacher) + mean CE(student) +
mean KL(teacher || student), teacher and student rows with the same label. Logits are normal with standard deviation 3;
those of a teacher differ by 0.14 (KL 0.01) or 2 (KL 2). The truth is the head's reference in float64 on the same bf16
numbers, of which ``SAMPLES`` rows of each gradient are kept, evenly spread. A provider keeps nothing from call to call
but what it compiled. The head and the compiled torch add the gradient of the matrix to an fp32 buffer that exists
anyway, as in a training run with Megatron's ``main_grad``; all others return it in bf16.

Legend: N pairs, R = 2N rows, d hidden width, V columns of the shard; z logits, dz gradient of the loss in them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from reflectron.engine.model.backends.checks import relative_error
from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.products import add_product, as_factor, product
from reflectron.kernels.types import HeadBackend, PairRows

Terms = Literal["full", "ce", "kl"]
"""The loss: all three terms, the two cross entropies, or the divergence alone."""
Mode = Literal["full", "forward"]
"""What is timed: forward and backward, or the loss alone."""

FLOOR, OURS = "cublas", "triton"
LOGIT_STD = 3.0
TEACHER_STD = {"near": 0.14, "far": 2.0}
SAMPLES = 512
COMPILED_CHUNK_LOGITS = 2**28  # of one side, 1 GiB in fp32: long chunks make the sum of the matrix gradient cheap


@dataclass(frozen=True)
class HeadCase:
    """One problem: ``pairs`` teacher and student rows on one shard of an output matrix."""

    d: int
    vocab: int
    """Whole vocabulary; a shard holds 1 / tp of it."""
    pairs: int
    tp: int = 1
    """Shards of the vocabulary, of which one is measured alone: no communication is in its time."""
    teacher: Literal["near", "far"] = "near"
    timed: bool = True

    @property
    def columns(self) -> int:
        """Columns of the measured shard."""
        return self.vocab // self.tp

    def flop(self, mode: Mode) -> int:
        """Count the matrix products that nobody can avoid: logits, and behind them the gradients of rows and matrix."""
        products: dict[Mode, int] = {"forward": 1, "full": 3}
        return products[mode] * 2 * 2 * self.pairs * self.columns * self.d


@dataclass(frozen=True)
class ProviderInputs:
    """Leaves require a gradient. ``both`` holds the teacher's rows above the student's, for who takes them as one."""

    weight: Tensor  # [V, d] bf16
    teacher: Tensor  # [N, d] bf16
    student: Tensor  # [N, d] bf16
    both: Tensor  # [2N, d] bf16
    labels: Tensor  # [N] int64
    labels_both: Tensor  # [2N] int64
    row_weight: Tensor  # [N] float32, 1 / N
    no_weight: Tensor  # [N] float32, 0
    main_grad: Tensor  # [V, d] float32, where a training run keeps the gradient of the matrix anyway


@dataclass(frozen=True)
class ProviderGradients:
    """What one call gives. A gradient that the loss does not have is None."""

    loss: Tensor
    teacher: Tensor | None  # [N, d]
    student: Tensor | None  # [N, d]
    weight: Tensor  # [V, d]


@dataclass(frozen=True)
class ProviderTruth:
    """The losses in float64, and the sampled rows of their gradients."""

    terms: dict[Terms, ProviderGradients]
    rows: Tensor
    columns: Tensor


ProviderStep = Callable[[ProviderInputs, Terms], ProviderGradients]


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss and its gradients."""

    name: str
    step: ProviderStep
    """Forward and backward."""
    forward: Callable[[ProviderInputs], object] | None = None
    """The loss alone, without anything kept for a backward; None is not offered."""
    terms: Terms | None = "full"
    """The largest loss it can compute; None for the floor, whose numbers mean nothing."""
    sharded: bool = False
    """Whether it can work on one shard of a vocabulary."""
    note: str = ""
    """What it cannot do, or does otherwise than the head."""
    configuration: Mapping[str, Any] = field(default_factory=dict)


# ---- inputs and truth ----


def make_inputs(case: HeadCase, device: torch.device) -> ProviderInputs:
    """Return the same numbers for a case on every run of one torch version and kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, std: float) -> Tensor:
        return torch.randn(rows, case.d, generator=generator, device=device, dtype=torch.bfloat16) * std

    student = normal(case.pairs, LOGIT_STD)
    teacher = student + normal(case.pairs, TEACHER_STD[case.teacher])
    labels = torch.randint(case.columns, (case.pairs,), generator=generator, device=device)
    weight = normal(case.columns, case.d**-0.5)
    return ProviderInputs(
        weight=weight.requires_grad_(),
        both=torch.cat([teacher, student]).requires_grad_(),
        teacher=teacher.requires_grad_(),
        student=student.requires_grad_(),
        labels=labels,
        labels_both=labels.repeat(2),
        row_weight=torch.full((case.pairs,), 1 / case.pairs, device=device),
        no_weight=torch.zeros(case.pairs, device=device),
        main_grad=torch.zeros(case.columns, case.d, device=device),
    )


def in_float64(tensor: Tensor) -> Tensor:
    """Return a leaf with the same numbers."""
    return tensor.detach().double().requires_grad_()


def exact(x: ProviderInputs) -> ProviderTruth:
    """Return the truth of a case."""
    rows, columns = _evenly(x.labels, len(x.labels)), _evenly(x.labels, len(x.weight))
    wide = replace(x, **{name: in_float64(getattr(x, name)) for name in ("weight", "teacher", "student")})
    terms: dict[Terms, ProviderGradients] = {}
    for one in ("ce", "kl"):
        total = torch.zeros_like(wide.weight, requires_grad=False)
        found = head("reference").step(replace(wide, main_grad=total), one)
        assert found.teacher is not None, "the head returns it"
        assert found.student is not None, "the head returns it"
        terms[one] = ProviderGradients(found.loss, found.teacher[rows], found.student[rows], total[columns])
    pairs = zip(vars(terms["ce"]).values(), vars(terms["kl"]).values(), strict=True)
    return ProviderTruth(terms | {"full": ProviderGradients(*(ce + kl for ce, kl in pairs))}, rows, columns)


def _evenly(like: Tensor, size: int) -> Tensor:
    """Return up to ``SAMPLES`` indices over [0, size), both ends among them."""
    return torch.linspace(0, size - 1, min(size, SAMPLES), device=like.device, dtype=torch.float64).round().long()


def errors(found: ProviderGradients, truth: ProviderTruth, terms: Terms) -> dict[str, float]:
    """Return the relative errors of the loss and of each gradient that it has; the divergence has none of a teacher."""
    exact_one = truth.terms[terms]
    result = {"loss": abs(found.loss.item() / exact_one.loss.item() - 1)}
    if terms != "kl" and found.teacher is not None and exact_one.teacher is not None:
        result["grad_teacher"] = relative_error(found.teacher[truth.rows], exact_one.teacher)
    if found.student is not None and exact_one.student is not None:
        result["grad_student"] = relative_error(found.student[truth.rows], exact_one.student)
    return result | {"grad_weight": relative_error(found.weight[truth.columns], exact_one.weight)}


def _step_of(
    loss: Callable[[ProviderInputs, Terms], Tensor], joint: bool
) -> Callable[[ProviderInputs, Terms], ProviderGradients]:
    """Return forward and backward of ``loss``, which is computed from ``both`` rows where ``joint``."""

    def step(x: ProviderInputs, terms: Terms) -> ProviderGradients:
        value = loss(x, terms)
        hidden = (x.both,) if joint else (x.teacher, x.student)
        *found, weight = torch.autograd.grad(value, (*hidden, x.weight), allow_unused=True)
        teacher, student = found[0].chunk(2) if joint else found
        return ProviderGradients(value.detach(), teacher, student, weight)

    return step


# ---- of this package and torch: the floor, the head itself, and plain torch ----


def floor() -> Provider:
    """Compute the three matrix products alone, in one piece, the logits in place of the gradients in them."""

    @torch.no_grad()
    def step(x: ProviderInputs, terms: Terms) -> ProviderGradients:
        z = x.both @ x.weight.T
        teacher, student = (z @ x.weight).chunk(2)
        return ProviderGradients(z[0, 0], teacher, student, z.T @ x.both)

    forward = torch.no_grad()(lambda x: x.both @ x.weight.T)
    note = "three matrix products, no loss: the floor"
    return Provider(FLOOR, step, forward, terms=None, sharded=True, note=note)


def head(backend: HeadBackend) -> Provider:
    """Call this package's head as the training step does."""

    def step(x: ProviderInputs, terms: Terms) -> ProviderGradients:
        loss = distillation_head(x.weight, _pairs(x, terms), backend=backend, main_grad=x.main_grad).loss
        teacher, student, _ = torch.autograd.grad(loss, (x.teacher, x.student, x.weight))
        return ProviderGradients(loss.detach(), teacher, student, x.main_grad)

    forward = torch.no_grad()(lambda x: distillation_head(x.weight, _pairs(x, "full"), backend=backend).loss)
    configuration = {"backend": backend, "main_grad": "float32"}
    return Provider(backend, step, forward, sharded=True, configuration=configuration)


def _pairs(x: ProviderInputs, terms: Terms) -> PairRows:
    ce, kl = (x.no_weight if terms == absent else x.row_weight for absent in ("kl", "ce"))
    return PairRows(x.teacher, x.student, x.labels, x.labels, ce, ce, kl)


def eager() -> Provider:
    """Compute full fp32 logits and torch's own losses."""

    def loss(x: ProviderInputs, terms: Terms) -> Tensor:
        z_t, z_s = _LinearFp32.apply(x.both, x.weight).chunk(2)
        ce, kl = _sums(z_t, z_s, x.labels)
        return {"full": ce + kl, "ce": ce, "kl": kl}[terms] / len(x.labels)

    forward = torch.no_grad()(lambda x: loss(x, "full"))
    note, configuration = "all logits at once", {"logits": "float32"}
    return Provider("eager", _step_of(loss, True), forward, sharded=True, note=note, configuration=configuration)


class _LinearFp32(torch.autograd.Function):
    """[R, V] fp32 logits of bf16 factors, never rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return product(as_factor(h), as_factor(weight.T))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        dz = dz.to(h.dtype)
        return dz @ weight, dz.T @ h


def _sums(z_t: Tensor, z_s: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both cross entropies, and the divergence from the detached teacher, summed over all rows."""
    log_t, log_s = z_t.log_softmax(1), z_s.log_softmax(1)
    ce_t, ce_s = (functional.nll_loss(log, labels, reduction="sum") for log in (log_t, log_s))
    return ce_t + ce_s, functional.kl_div(log_s, log_t.detach(), log_target=True, reduction="sum")


def compiled() -> Provider:
    """Fuse losses and bf16 gradients of cuBLAS's fp32 logits by ``torch.compile``, in chunks; sum dW in fp32."""

    @torch.no_grad()
    def step(x: ProviderInputs, terms: Terms) -> ProviderGradients:
        pairs = len(x.labels)
        grads: tuple[list[Tensor], list[Tensor]] = ([], [])
        loss = x.row_weight.new_zeros(())
        for part in torch.arange(pairs).chunk(ceil(pairs * len(x.weight) / COMPILED_CHUNK_LOGITS)):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            h = x.teacher[rows], x.student[rows]
            chunk = [*(product(as_factor(side), as_factor(x.weight.T)) for side in h), x.labels[rows]]
            for tensor in chunk:
                # One compilation for a vocabulary does for any number of rows, and any weights.
                torch._dynamo.mark_dynamic(tensor, 0)
            weights = _pairs(x, terms)
            value, *dz = _compiled_loss()(*chunk, weights.ce_student_weight[0], weights.kl_weight[0])
            loss += value
            for side, gradient, total in zip(h, dz, grads, strict=True):
                total.append(gradient @ x.weight)
                add_product(x.main_grad, as_factor(gradient.T), as_factor(side))
        return ProviderGradients(loss, torch.cat(grads[0]), torch.cat(grads[1]), x.main_grad)

    return Provider(
        "compile",
        step,
        note=f"torch.compile of chunks of up to {COMPILED_CHUNK_LOGITS} logits a side",
        configuration={"logits": "float32", "chunk_logits": COMPILED_CHUNK_LOGITS, "main_grad": "float32"},
    )


@cache
def _compiled_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return what computes the loss of a chunk, dz_t and dz_s from logits, labels and the two weights of the terms."""

    def loss_and_gradients(
        z_t: Tensor, z_s: Tensor, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def loss(z_t: Tensor, z_s: Tensor) -> Tensor:
            ce, kl = _sums(z_t, z_s, labels)
            return ce_weight * ce + kl_weight * kl

        (dz_t, dz_s), value = torch.func.grad_and_value(loss, argnums=(0, 1))(z_t, z_s)
        return value, dz_t.bfloat16(), dz_s.bfloat16()

    return torch.compile(loss_and_gradients, dynamic=False)


# ---- of others, called as the documentation of the named version says, with defaults where the loss allows it ----
# They are optional (`pip install reflectron[bench]`): a builder raises whatever the import raises. Without a GPU they
# take other paths than on one: there a row shows that the call computes this loss, not how exact the kernel is.


def orda() -> Provider:
    """Call orda-kernel 0.1.0's ``distillation_loss`` with ``TiedTeacher``: the same three terms on one shared head.

    Its profile ``balanced`` is the default and tunes itself at the first call of a shape.
    """
    library = import_module("orda_kernel")
    # The check would read the labels back at each call; the head on a GPU does not do that either.
    config = library.KernelConfig(assume_valid_labels=True)

    def loss(x: ProviderInputs, terms: Terms) -> Tensor:
        ce = 0.0 if terms == "kl" else 1.0
        value: Tensor = library.distillation_loss(
            x.student,
            x.weight,
            x.labels,
            library.TiedTeacher(hidden=x.teacher),
            student_ce_weight=ce,
            teacher_ce_weight=ce,
            kl_weight=1.0,
            kl_divergence="forward",
            reduction="mean",
            backend="triton" if x.weight.is_cuda else "torch",
            config=config,
        ).loss
        return value

    note = "one label a pair, no row weights, no unpaired rows, no shards of the vocabulary"
    configuration = {"profile": "balanced", "assume_valid_labels": True}
    return Provider("orda", _step_of(loss, False), note=note, configuration=configuration)


def liger() -> Provider:
    """Call liger-kernel 0.8.5's ``LigerFusedLinearCrossEntropyLoss`` twice and ``LigerFusedLinearJSD`` with beta 0,
    which is forward KL; each of the three computes logits of its own."""
    library = import_module("liger_kernel.transformers")
    cross_entropy = library.LigerFusedLinearCrossEntropyLoss()
    divergence = library.LigerFusedLinearJSD(jsd_beta=0.0)

    def loss(x: ProviderInputs, terms: Terms) -> Tensor:
        value: Tensor = divergence(x.student, x.weight, x.teacher.detach(), x.weight.detach(), None)
        if terms == "full":
            value = value + sum(cross_entropy(x.weight, h, x.labels) for h in (x.teacher, x.student))
        return value

    note = "three calls; no row weights that reach a sum, no shards of the vocabulary"
    return Provider("liger", _step_of(loss, False), note=note, configuration={"accum_dtype": None})


def cut_cross_entropy() -> Provider:
    """Call cut-cross-entropy 25.1.1's ``linear_cross_entropy`` over the rows of teacher and student together."""
    library = import_module("cut_cross_entropy")

    def loss(x: ProviderInputs, terms: Terms = "ce") -> Tensor:
        impl = "cce" if x.weight.is_cuda else "torch_compile"
        total: Tensor = library.linear_cross_entropy(x.both, x.weight, x.labels_both, reduction="sum", impl=impl)
        return total / len(x.labels)

    return Provider(
        "cut-cross-entropy",
        _step_of(loss, True),
        torch.no_grad()(loss),
        terms="ce",
        note="cross entropies only, no divergence; skips small gradients, of which random logits have few",
        configuration={"filter_eps": "high"},
    )


BUILDERS: dict[str, Callable[[], Provider]] = {
    FLOOR: floor,
    OURS: partial(head, "triton"),
    "reference": partial(head, "reference"),
    "orda": orda,
    "liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "eager": eager,
    "compile": compiled,
}
"""By name, in the order in which they are measured and shown."""
