"""What is measured of training: the engine's model, built once and then asked for steps of any layout and head, the
parts of a step alone, and the reference's way of training.

N tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, kl_div
from torch.profiler import record_function

from reflectron.engine.config import AdamwBackend, BackendsConfig, Config, LayersBackend, LossConfig, OptimizerConfig
from reflectron.engine.data.global_batch import GlobalBatch
from reflectron.engine.data.views import IGNORED, SampleViews
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.backends.choose import Backends
from reflectron.engine.model.backends.layers import lone_norm, lone_rotation, lone_swiglu
from reflectron.engine.optim.optimizer import adamw_class
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.build import build_model
from reflectron.engine.training.step import train_step
from reflectron.engine.weights.readers import TensorSource
from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import HeadBackend, PairRows, Rows


class EngineModel:
    """A model built as a run builds it, and steps of it with any head.

    Args:
        config: layout, types and optimizer.
        arch: the model.
        source: its weights.
        groups: process groups of the layout.
        chosen: the backends that compute it.
    """

    def __init__(
        self, config: Config, arch: Architecture, source: TensorSource, groups: ParallelGroups, chosen: Backends
    ) -> None:
        self.config, self.groups = config, groups
        self.model = build_model(config, arch, groups, source, chosen)
        self.chosen: dict[str, Any] = chosen.names

    def backends(self, fused_head: bool) -> dict[str, str]:
        """Return what computes the parts that there is a choice for."""
        fp8 = {} if self.config.model.fp8 == "none" else {"fp8": self.config.model.fp8}
        return self.chosen | {"head": self.head(fused_head)} | fp8

    def settled(self, fused_head: bool) -> Config:
        """Return the configuration with the names of all backends, for the planner."""
        loss = replace(self.config.loss, backend=self.head(fused_head))
        return replace(self.config, backends=BackendsConfig(**self.chosen), loss=loss)

    def head(self, fused: bool) -> HeadBackend:
        """Return the backend of the distillation head that ``fused`` stands for; a configured one always wins."""
        if self.config.loss.backend != "auto":
            return self.config.loss.backend
        can_run = self.groups.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return "triton" if fused and can_run else "reference"

    def step(self, batch: GlobalBatch, fused_head: bool) -> tuple[float, float]:
        """Step on ``batch``, return loss and gradient norm; learning rate 0 leaves the weights as they are."""
        self.model.loss.config = replace(self.config.loss, backend=self.head(fused_head))
        result = train_step(self.model.wrapped, self.model.optimizer, self.groups, batch, learning_rate=0.0)
        return result.terms.loss, result.grad_norm


# ---- parts of a training step, each as an action to be timed ----

Action = Callable[[], object]
_WIDTH = 1024


def parts_of_layers(
    backend: LayersBackend, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[int], Action]]:
    """Return, by name, forward and backward over a number of elements of what a layer computes beside products.

    Args:
        backend: one with norms of their own.
        device: what computes.
        dtype: of the elements.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def backward_too(forward: Callable[[], Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> Action:
        gradients = [torch.randn_like(output) for output in forward()]
        return lambda: torch.autograd.grad(forward(), inputs, gradients)

    def norm(count: int) -> Action:
        module, x = lone_norm(backend, _WIDTH, 1e-5, dtype).to(device), random(count // _WIDTH, 1, _WIDTH)
        return backward_too(lambda: [x + module(x)], [x, *module.parameters()])

    def rotated(count: int) -> Action:
        tokens, width = count // _WIDTH, 128
        # Three query heads share a key head.
        query, key = (random(tokens, 1, heads, width) for heads in (6, 2))
        positions, frequencies = torch.arange(tokens, device=device), torch.rand(width // 2, device=device)
        rotate = lone_rotation(backend, positions, frequencies, dtype)
        return backward_too(lambda: rotate(query, key), [query, key])

    def gated(count: int) -> Action:
        gate, x = lone_swiglu(backend, dtype), random(count // _WIDTH, 1, 2 * _WIDTH)
        return backward_too(lambda: [gate(x)], [x])

    return {"norm": norm, "rotation": rotated, "gated": gated}


def summed_or_copied(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[int], Action]]:
    """Return, by name, what clones a tensor of a number of elements, or adds it to a float32 sum."""

    def random(count: int) -> torch.Tensor:
        return torch.randn(count, device=device, dtype=dtype)

    def copy(count: int) -> Action:
        return random(count).clone

    def summed(count: int) -> Action:
        gradient, total = random(count), torch.zeros(count, device=device)
        return lambda: total.add_(gradient)

    return {"copy": copy, "sum": summed}


def lone_adamw(backend: AdamwBackend, parameter: torch.nn.Parameter, **constants: Any) -> torch.optim.Optimizer:
    """Return the AdamW of ``backend`` over one parameter."""
    return adamw_class(backend)([parameter], **constants, **({"fused": True} if backend == "torch_fused" else {}))


def update(adamw: AdamwBackend, device: torch.device, dtype: torch.dtype, count: int) -> Action:
    """Return what a step does to float32 gradients and parameters after the backward, and to gradients before it."""
    parameter = torch.nn.Parameter(torch.randn(count, device=device))
    parameter.grad = torch.randn(count, device=device)
    model = torch.empty(count, device=device, dtype=dtype)
    optimizer = lone_adamw(adamw, parameter, lr=1e-5)

    def run() -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(1 / max(1.0, float(parameter.grad.norm())))
        optimizer.step()
        if dtype != torch.float32:
            model.copy_(parameter.data)
        parameter.grad.zero_()

    return run


def head_step(
    backend: HeadBackend, device: torch.device, dtype: torch.dtype, rows: int, hidden: int, columns: int
) -> Action:
    """Return forward and backward of the head on ``rows`` of width ``hidden``, a third of them in pairs."""
    pairs = rows // 6
    alone = rows - 2 * pairs

    def labels(count: int) -> torch.Tensor:
        return torch.randint(0, columns, (count,), device=device)

    def states(count: int) -> torch.Tensor:
        return torch.randn(count, hidden, device=device, dtype=dtype, requires_grad=True)

    weight, teacher, student, single = states(columns), states(pairs), states(pairs), states(alone)
    # Logits of a model: the exponentials of larger ones underflow, which is slow on the CPU.
    weight.data.mul_(hidden**-0.5)
    total, ones = torch.zeros(columns, hidden, device=device), torch.ones(rows, device=device)
    one, paired = ones[:alone], ones[:pairs]

    def run() -> None:
        result = distillation_head(
            weight,
            PairRows(teacher, student, labels(pairs), labels(pairs), paired, paired, paired),
            Rows(single, labels(alone), one),
            backend=backend,
            main_grad=total,
        )
        torch.autograd.grad(result.loss, (weight, teacher, student, single))

    return run


# ---- the reference's way ----


@dataclass(frozen=True)
class ReferenceSample:
    """A sample on the device: N tokens, once a view."""

    input_ids: torch.Tensor
    """[views, N], the teacher's and the student's the same."""
    attention_mask: torch.Tensor
    """[views, N], 0 for what the student does not see."""
    labels: torch.Tensor
    """[views, N], -100 without a cross entropy; of row i - 1 is label i."""
    kl_rows: torch.Tensor
    """[rows] of both views."""


class HfReference:
    """The reference's way of training: transformers' Llama, one sample a forward, teacher and student both at full
    length, logits of every token in float32, plain losses, gradient checkpointing.

    So ReflectionCoder's published code trains (``utils/trainer.py``, commit 6b6e2d4: per-device batch 1, both views as
    two rows of one batch, the student's mask as attention mask). Its numbers are those of the engine, as the tests
    show. Kinder to it than the published run: parameters, gradients and AdamW's moments are all in the model's type,
    without DeepSpeed's float32 copies. Data-parallel ranks share the samples.

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

    def samples(self, views: Sequence[SampleViews]) -> list[ReferenceSample]:
        """Return this rank's share of a global batch."""
        return [_to_sample(v, self.groups.device) for v in views[self.groups.dp.rank() :: self.groups.dp.size()]]

    def step(self, samples: Sequence[ReferenceSample], global_batch_size: int) -> tuple[float, float]:
        """Step; return the loss of the global batch and the L2 norm of its gradient before clipping."""
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

    def loss(self, sample: ReferenceSample) -> torch.Tensor:
        """Return the mean cross entropy over the rows of both views, plus the mean divergence of the student's rows."""
        views, length = sample.input_ids.shape
        logits = self.model(
            input_ids=sample.input_ids,
            attention_mask=sample.attention_mask,
            position_ids=torch.arange(length, device=self.groups.device).expand(views, length),
            use_cache=False,
        ).logits.float()
        with record_function("eager loss"):
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), sample.labels[:, 1:].flatten(), ignore_index=IGNORED)
            if views == 1:
                return loss
            teacher, student = (logits[view, sample.kl_rows].log_softmax(-1) for view in (0, 1))
            return loss + kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")


def attention_implementation(device: torch.device) -> str:
    """Choose FlashAttention-2 as the published run, where it is installed; version 4 bears its name and is not it."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def is_published_loss(loss: LossConfig) -> bool:
    """Whether the baseline computes this loss."""
    plain = LossConfig(backend=loss.backend)
    return loss == plain


def _to_sample(view: SampleViews, device: torch.device) -> ReferenceSample:
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
    return ReferenceSample(*(torch.from_numpy(array).to(device) for array in tensors))
