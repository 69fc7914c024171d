"""The reference's way of training, for comparison: transformers' Llama, one sample a forward, teacher and student both
at full length, logits of every token in float32, plain losses, gradient checkpointing.

So ReflectionCoder's published code trains (``utils/trainer.py``, commit 6b6e2d4: per-device batch 1, both views as two
rows of one batch, the student's mask as attention mask). Its numbers are those of ``engine``, as the tests show. Kinder
to it than the published run: parameters, gradients and AdamW's moments are all in the model's type, without DeepSpeed's
float32 copies.

N tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, kl_div
from torch.profiler import record_function

from reflectron.engine.config import LossConfig, OptimizerConfig
from reflectron.engine.data.views import IGNORED, SampleViews
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.weights.readers import TensorSource


@dataclass(frozen=True)
class Sample:
    """A sample on the device."""

    input_ids: torch.Tensor
    """[views, N], the teacher's and the student's the same."""
    attention_mask: torch.Tensor
    """[views, N], 0 for what the student does not see."""
    labels: torch.Tensor
    """[views, N], -100 without a cross entropy; of row i - 1 is label i."""
    kl_rows: torch.Tensor
    """[rows] of both views."""


class HfReference:
    """Model and optimizer on one rank; data-parallel ranks share the samples.

    Args:
        hf_config: ``config.json`` of a Llama.
        source: the weights, the same that the engine has.
        dtype: of parameters, gradients and moments.
        optimizer: AdamW's constants.
        groups: this rank's; gradients are summed over ``data``.

    Raises:
        ValueError: where the reference's way is not defined.
    """

    def __init__(
        self,
        hf_config: dict[str, Any],
        source: TensorSource,
        dtype: torch.dtype,
        optimizer: OptimizerConfig,
        groups: ParallelGroups,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        if groups.dp.size() != dist.get_world_size():
            raise ValueError("the reference's way has neither tensor, pipeline nor context parallelism")
        self.groups, self.optimizer_config = groups, optimizer
        self.attention = attention_implementation(groups.device)
        config = AutoConfig.for_model(**hf_config)
        with torch.device(groups.device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(source.read(name, tuple(parameter.shape), None, 0, 0))
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=0.0,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=groups.device.type == "cuda",
        )

    def samples(self, views: Sequence[SampleViews]) -> list[Sample]:
        """This rank's share of a global batch."""
        return [_to_sample(v, self.groups.device) for v in views[self.groups.dp.rank() :: self.groups.dp.size()]]

    def step(self, samples: Sequence[Sample], global_batch_size: int) -> tuple[float, float]:
        """One optimizer step; loss of the global batch, and L2 norm of its gradient before clipping."""
        total = torch.zeros((), device=self.groups.device)
        for sample in samples:
            loss = self.loss(sample) / global_batch_size
            loss.backward()
            total += loss.detach()
        parameters = list(self.model.parameters())
        if self.groups.dp.size() > 1:
            dist.all_reduce(total, group=self.groups.dp)
            for parameter in parameters:
                dist.all_reduce(parameter.grad, group=self.groups.dp)
        limit = self.optimizer_config.clip_grad_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, norm = torch.stack((total, norm.to(total))).tolist()
        return loss, norm

    def loss(self, sample: Sample) -> torch.Tensor:
        """Mean cross entropy over the rows of both views, plus the mean divergence of the student's rows."""
        views, length = sample.input_ids.shape
        logits = self.model(
            input_ids=sample.input_ids,
            attention_mask=sample.attention_mask,
            position_ids=torch.arange(length, device=logits_device(self.model)).expand(views, length),
            use_cache=False,
        ).logits.float()
        with record_function("eager loss"):
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), sample.labels[:, 1:].flatten(), ignore_index=IGNORED)
            if views == 1:
                return loss
            teacher, student = (logits[view, sample.kl_rows].log_softmax(-1) for view in (0, 1))
            return loss + kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")


def logits_device(model: torch.nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters()).device


def attention_implementation(device: torch.device) -> str:
    """FlashAttention-2 as the published run, where it is installed; version 4 bears its name and is not it."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def is_published_loss(loss: LossConfig) -> bool:
    """Whether the baseline computes this loss."""
    plain = LossConfig(backend=loss.backend)
    return loss == plain


def _to_sample(view: SampleViews, device: torch.device) -> Sample:
    length = len(view.input_ids)
    labels = np.full((1 if view.is_generation else 2, length), IGNORED, np.int64)
    labels[0, view.rows + 1] = view.input_ids[view.rows + 1]
    visible = np.ones(labels.shape, np.int64)
    if not view.is_generation:
        labels[0, view.pair_rows + 1] = view.pair_teacher_labels
        labels[1, view.pair_rows + 1] = view.pair_student_labels
        if len(view.student_positions):
            visible[1] = np.isin(np.arange(length), view.student_positions)
    ids = np.broadcast_to(view.input_ids.astype(np.int64), labels.shape).copy()
    tensors = (ids, visible, labels, view.pair_rows[1:])
    return Sample(*(torch.from_numpy(array).to(device) for array in tensors))
