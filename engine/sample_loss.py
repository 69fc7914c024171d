"""Loss and gradient norms of single samples, exactly as training computes them: for inspection and tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reflectron.engine.checkpoint.hf_table import hf_pieces
from reflectron.engine.config import LossConfig
from reflectron.engine.data.microbatch import pack, to_device
from reflectron.engine.data.views import SampleViews, row_weights
from reflectron.engine.model.families import Architecture
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.train_step import run_model


@dataclass(frozen=True)
class SampleLoss:
    """Loss of one sample in nats; ``ce`` and ``kl`` are means over their rows, the others sums over theirs."""

    loss: float
    """ce + kl, with the weights of the configuration."""
    ce: float
    """Teacher's and student's cross entropy together."""
    kl: float
    """Divergence of the student from the teacher; 0 for a generation sample."""
    ce_teacher_sum: float
    ce_student_sum: float
    kl_sum: float


def sample_loss(model: PackedGPT, views: SampleViews) -> tuple[torch.Tensor, SampleLoss]:
    """Loss of one sample: differentiable, and in numbers.

    Args:
        model: an unsharded model on one rank whose output processor has the default term weights.
        views: the sample.
    """
    tokens = len(views.input_ids) + len(views.student_positions)
    (weights,) = row_weights([views], LossConfig())
    microbatch = to_device(pack([views], [weights], tokens), next(model.parameters()).device)
    terms = run_model(model, microbatch)
    loss, ce_teacher, ce_student, ce_generation, kl = terms.tolist()
    ce_rows = views.ce_teacher_rows + views.ce_student_rows
    return terms[0], SampleLoss(
        loss=loss,
        ce=ce_teacher + ce_generation + ce_student,
        kl=kl,
        ce_teacher_sum=(ce_teacher + ce_generation) * ce_rows,
        ce_student_sum=ce_student * ce_rows,
        kl_sum=kl * views.kl_rows,
    )


def gradient_norms(model: PackedGPT, arch: Architecture) -> dict[str, float]:
    """L2 norm of each parameter's gradient by its Hugging Face name, and ``global`` over all of them.

    ``model`` is unsharded; its gradients are in ``.grad``.
    """
    norms: dict[str, float] = {}
    for parameter, pieces in hf_pieces([model], arch, tensor_parallel_size=1):
        assert parameter.grad is not None, "the backward reaches every parameter"
        norms |= {piece.name: piece.view(parameter.grad).double().norm().item() for piece in pieces}
    return {"global": math.sqrt(sum(norm**2 for norm in norms.values())), **norms}
