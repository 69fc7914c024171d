"""What is measured, as far as this package and torch bring it: the floor, the head itself, and plain torch.

A provider takes ``Inputs`` and gives ``Gradients`` of the loss described there. None keeps anything from call to call
but what it compiled. The head and the compiled torch add the gradient of the matrix to an fp32 buffer that exists
anyway, as in a training run with Megatron's ``main_grad``; all others return it in bf16.

Legend: N pairs, R = 2N rows, d hidden width, V columns; z logits, dz gradient of the loss in them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reflectron.kernels.distill_head import Backend, PairRows, distillation_head
from reflectron.kernels.products import add_product, as_factor, product
from reflectron.tools.bench.inputs import Gradients, Inputs, Terms

FLOOR, OURS = "cublas", "triton"
COMPILED_CHUNK_LOGITS = 2**28  # of one side, 1 GiB in fp32: long chunks make the sum of the matrix gradient cheap


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss and its gradients."""

    name: str
    step: Callable[[Inputs, Terms], Gradients]
    """Forward and backward."""
    forward: Callable[[Inputs], object] | None = None
    """The loss alone, without anything kept for a backward; None is not offered."""
    terms: Terms | None = "full"
    """The largest loss it can compute; None for the floor, whose numbers mean nothing."""
    sharded: bool = False
    """Whether it can work on one shard of a vocabulary."""
    note: str = ""
    """What it cannot do, or does otherwise than the head."""
    configuration: Mapping[str, Any] = field(default_factory=dict)


def linear_fp32(h: Tensor, weight: Tensor) -> Tensor:
    """[R, V] fp32 logits of bf16 factors, never rounded to bf16; differentiable."""
    return _LinearFp32.apply(h, weight)


class _LinearFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return _product(h, weight.T)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        dz = dz.to(h.dtype)
        return dz @ weight, dz.T @ h


def _product(a: Tensor, b: Tensor) -> Tensor:
    """fp32 product."""
    return product(as_factor(a), as_factor(b))


# ---- the floor ----


def floor() -> Provider:
    """The three matrix products alone, in one piece, the logits in place of the gradients in them."""

    @torch.no_grad()
    def step(x: Inputs, terms: Terms) -> Gradients:
        z = x.both @ x.weight.T
        teacher, student = (z @ x.weight).chunk(2)
        return Gradients(z[0, 0], teacher, student, z.T @ x.both)

    @torch.no_grad()
    def forward(x: Inputs) -> Tensor:
        return x.both @ x.weight.T

    note = "three matrix products, no loss: the floor"
    return Provider(FLOOR, step, forward, terms=None, sharded=True, note=note)


# ---- the head ----


def head(backend: Backend) -> Provider:
    """This package's head, as the training step calls it."""

    def step(x: Inputs, terms: Terms) -> Gradients:
        loss = distillation_head(x.weight, _pairs(x, terms), backend=backend, main_grad=x.main_grad).loss
        teacher, student, _ = torch.autograd.grad(loss, (x.teacher, x.student, x.weight))
        return Gradients(loss.detach(), teacher, student, x.main_grad)

    @torch.no_grad()
    def forward(x: Inputs) -> Tensor:
        return distillation_head(x.weight, _pairs(x, "full"), backend=backend).loss

    return Provider(backend, step, forward, sharded=True, configuration={"backend": backend, "main_grad": "float32"})


def _pairs(x: Inputs, terms: Terms) -> PairRows:
    ce, kl = (x.no_weight if terms == absent else x.row_weight for absent in ("kl", "ce"))
    return PairRows(x.teacher, x.student, x.labels, x.labels, ce, ce, kl)


# ---- plain torch ----


def eager() -> Provider:
    """Full fp32 logits and torch's own losses."""

    def loss(x: Inputs, terms: Terms) -> Tensor:
        z_t, z_s = linear_fp32(x.both, x.weight).chunk(2)
        ce, kl = _sums(z_t, z_s, x.labels)
        return {"full": ce + kl, "ce": ce, "kl": kl}[terms] / len(x.labels)

    def step(x: Inputs, terms: Terms) -> Gradients:
        value = loss(x, terms)
        both, weight = torch.autograd.grad(value, (x.both, x.weight))
        teacher, student = both.chunk(2)
        return Gradients(value.detach(), teacher, student, weight)

    forward = torch.no_grad()(lambda x: loss(x, "full"))
    return Provider(
        "eager", step, forward, sharded=True, note="all logits at once", configuration={"logits": "float32"}
    )


def compiled() -> Provider:
    """Chunks of fp32 logits from cuBLAS, whose losses and bf16 gradients ``torch.compile`` fuses; dW summed in fp32."""

    @torch.no_grad()
    def step(x: Inputs, terms: Terms) -> Gradients:
        pairs = len(x.labels)
        chunks = ceil(pairs * len(x.weight) / COMPILED_CHUNK_LOGITS)
        grads: tuple[list[Tensor], list[Tensor]] = ([], [])
        loss = x.row_weight.new_zeros(())
        for part in torch.arange(pairs).chunk(chunks):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            h = x.teacher[rows], x.student[rows]
            z_t, z_s = (_product(side, x.weight.T) for side in h)
            value, *dz = _compiled_chunk(z_t, z_s, x.labels[rows], _pairs(x, terms))
            loss += value
            for side, gradient, total in zip(h, dz, grads, strict=True):
                total.append(gradient @ x.weight)
                add_product(x.main_grad, as_factor(gradient.T), as_factor(side))
        return Gradients(loss, torch.cat(grads[0]), torch.cat(grads[1]), x.main_grad)

    return Provider(
        "compile",
        step,
        note=f"torch.compile of chunks of up to {COMPILED_CHUNK_LOGITS} logits a side",
        configuration={"logits": "float32", "chunk_logits": COMPILED_CHUNK_LOGITS, "main_grad": "float32"},
    )


def _compiled_chunk(z_t: Tensor, z_s: Tensor, labels: Tensor, pairs: PairRows) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk, dz_t and dz_s. One compilation for a vocabulary does for any number of rows, and any weights."""
    for tensor in (z_t, z_s, labels):
        torch._dynamo.mark_dynamic(tensor, 0)
    return _compiled_loss()(z_t, z_s, labels, pairs.ce_student_weight[0], pairs.kl_weight[0])


@cache
def _compiled_loss() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    def loss_and_gradients(
        z_t: Tensor, z_s: Tensor, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def loss(z_t: Tensor, z_s: Tensor) -> Tensor:
            ce, kl = _sums(z_t, z_s, labels)
            return ce_weight * ce + kl_weight * kl

        (dz_t, dz_s), value = torch.func.grad_and_value(loss, argnums=(0, 1))(z_t, z_s)
        return value, dz_t.bfloat16(), dz_s.bfloat16()

    return torch.compile(loss_and_gradients, dynamic=False)


def _sums(z_t: Tensor, z_s: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both cross entropies, and the divergence from the detached teacher, over all rows."""
    log_t, log_s = z_t.log_softmax(1), z_s.log_softmax(1)
    ce_t, ce_s = (functional.nll_loss(log, labels, reduction="sum") for log in (log_t, log_s))
    return ce_t + ce_s, functional.kl_div(log_s, log_t.detach(), log_target=True, reduction="sum")
