"""The update rule on megatron-core's gradients, and the learning rate of each update.

The rule is AdamW, its state sharded over replicas or not, or Adafactor. Both keep float32 copies of bfloat16
parameters, and clip the norm of the whole gradient, measured over all ranks. The learning rate warms up linearly, then
decays as a cosine or linearly, or stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from typing_extensions import assert_never

from reflectron.engine.config import AdamwBackend, LrScheduleConfig, OptimizerConfig
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.model.hf_mapping import hf_pieces
from reflectron.engine.optim.adafactor import Adafactor
from reflectron.engine.parallel.process_groups import ParallelGroups


def shards_optimizer(config: OptimizerConfig, distributed_optimizer: bool) -> bool:
    """Return whether optimizer state is sharded over replicas; Adafactor's factored state is too small to need it."""
    return distributed_optimizer and config.name == "adamw"


def build_optimizer(
    config: OptimizerConfig,
    wrapped: Sequence[DistributedDataParallel],
    chunks: Sequence[PackedGPT],
    arch: Architecture,
    groups: ParallelGroups,
    shard: bool,
    adamw: AdamwBackend = "torch",
) -> MegatronOptimizer:
    """Build the optimizer of this rank's parameters, whose weights are loaded.

    Args:
        config: update rule and its constants.
        wrapped: ``chunks`` inside data parallelism.
        chunks: this rank's part of the model.
        arch: gives the Hugging Face tensors inside the parameters, by which Adafactor factors.
        groups: process groups.
        shard: as given to ``parallelize``.
        adamw: which AdamW, as ``Backends`` names it.
    """
    model_config = chunks[0].config
    offload = config.cpu_offload_fraction
    megatron_config = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        # No norm exceeds infinity.
        clip_grad=config.clip_grad_norm or math.inf,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=shard,
        # With either, torch's or transformer-engine's optimizer keeps the float32 copies of the parameters.
        use_precision_aware_optimizer=config.lowers_precision or offload > 0,
        exp_avg_dtype=getattr(torch, config.exp_avg_dtype),
        exp_avg_sq_dtype=getattr(torch, config.exp_avg_sq_dtype),
        # Their lower halves alone would not fit a checkpoint that loads anywhere.
        store_param_remainders=False,
        optimizer_cpu_offload=offload > 0,
        optimizer_offload_fraction=offload,
        overlap_cpu_optimizer_d2h_h2d=True,
    )
    if config.name == "adamw":
        _use_adamw(adamw)
        optimizer = megatron_optimizer.get_megatron_optimizer(megatron_config, list(wrapped))
    elif config.name == "adafactor":
        optimizer = _build_adafactor(config, megatron_config, chunks, arch, groups)
    else:
        assert_never(config.name)
    for group in optimizer.param_groups:
        if config.name == "adamw" and adamw == "torch_fused":
            # megatron-core cannot be told to pass it on. Before the first step it is as good as an argument.
            group["fused"] = True
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    model_config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@dataclass(frozen=True)
class GradientAxis:
    """Gradients whose squares, summed over one process group, count every element once.

    A model has one axis for its dense parameters; parameters that are split over other ranks have an axis of their own.
    """

    gradients: list[torch.Tensor]
    """This rank's share."""
    group: dist.ProcessGroup | None
    """The ranks that together hold all of it; None for every rank of the job."""


def squared_gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Return the squared L2 norm of the whole gradient over all ranks, [1] float32 on the device.

    The gradient is then ready for ``update``. megatron-core's own (0.16.1) waits for the device: once, or without
    transformer-engine once for every parameter.
    """
    optimizer.prepare_grads()
    return squared_norm(gradient_axes(optimizer), torch.device(torch.cuda.current_device()))


def gradient_axes(optimizer: MegatronOptimizer) -> list[GradientAxis]:
    """Return the gradients of each part of the optimizer, beside the group that its statistics are summed over."""
    return [
        GradientAxis(part.get_main_grads_for_grad_norm(), part.get_grad_stats_parallel_group())
        for part in optimizer_parts(optimizer)
    ]


def squared_norm(axes: Iterable[GradientAxis], device: torch.device) -> torch.Tensor:
    """Return the squared L2 norm over all axes, [1] float32; every rank brings the same axes in the same order."""
    total = torch.zeros(1, device=device)
    for axis in axes:
        square = torch.zeros_like(total)
        if axis.gradients:
            square = torch.stack(list(torch._foreach_norm(axis.gradients))).square().sum().reshape(1)
        dist.all_reduce(square, group=axis.group)
        total += square
    return total


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the gradient and update the parameters.

    After ``squared_gradient_norm`` it completes what ``MegatronOptimizer.step`` does at once, so that the caller can
    skip the update in between.
    """
    for part in optimizer_parts(optimizer):
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                grad_norm,
                part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def optimizer_parts(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """Return the optimizers of a chain, one for each kind of parameter, or the only one there is."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def learning_rate(step: int, total_steps: int, peak: float, schedule: LrScheduleConfig) -> float:
    """Return the learning rate of one update: above 0 also for the first, whose warm-up counts updates from 1.

    The reference implementation counts from 0 and so spends its first update on nothing. From the end of the warm-up
    the rate equals transformers' ``get_cosine_schedule_with_warmup``, ``get_linear_schedule_with_warmup`` and
    ``get_constant_schedule_with_warmup`` where ``min_learning_rate`` is 0.

    Args:
        step: updates before this one, 0 to ``total_steps - 1``.
        total_steps: updates of the run.
        peak: ``optimizer.learning_rate``.
        schedule: shape, warm-up and lowest rate.
    """
    warmup = warmup_steps(total_steps, schedule)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (total_steps - warmup)
    if schedule.shape == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.shape == "linear":
        share = 1 - progress
    elif schedule.shape == "constant":
        return peak
    else:
        assert_never(schedule.shape)
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * share


def warmup_steps(total_steps: int, schedule: LrScheduleConfig) -> int:
    """Return the updates that warm up; the ratio is rounded up, as transformers does."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(total_steps * schedule.warmup_ratio)


def adamw_class(name: AdamwBackend) -> Callable[..., torch.optim.Optimizer]:
    """Return the AdamW that ``Backends`` names so; ``torch_fused`` is ``torch`` with the option ``fused``."""
    if name == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam as Adam
    elif name == "apex":
        from apex.optimizers import FusedAdam as Adam
    elif name == "torch" or name == "torch_fused":
        from torch.optim import AdamW as Adam
    else:
        assert_never(name)
    return Adam


def _use_adamw(name: AdamwBackend) -> None:
    """Have megatron-core build this AdamW: on import it takes transformer-engine's, else Apex's, else torch's (0.16.1).

    The global names in which it records its choice are written again, in both modules that have them.
    """
    is_torch = name in ("torch", "torch_fused")
    megatron_optimizer.Adam = distrib_optimizer.Adam = adamw_class(name)
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = is_torch
    distrib_optimizer.HAVE_APEX_OR_TE = not is_torch
    distrib_optimizer.USING_TE_OPTIMIZER = name == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = name == "apex"


def _build_adafactor(
    config: OptimizerConfig,
    megatron_config: megatron_optimizer.OptimizerConfig,
    chunks: Sequence[PackedGPT],
    arch: Architecture,
    groups: ParallelGroups,
) -> MegatronOptimizer:
    members = list(hf_pieces(chunks, arch, groups.tp.size()))
    # Matrices decay, norms and biases do not; megatron-core calls the factor wd_mult.
    parts = [[entry for entry in members if (entry[0].dim() > 1) == decays] for decays in (True, False)]
    base = Adafactor(
        [{"params": [p for p, _ in part], "wd_mult": mult} for part, mult in zip(parts, (1.0, 0.0), strict=True)],
        [[pieces for _, pieces in part] for part in parts],
        lr=config.learning_rate,
        decay_rate=config.adafactor_decay_rate,
        clip_threshold=config.adafactor_clip_threshold,
        weight_decay=config.weight_decay,
        tensor_group=groups.tp,
    )
    if chunks[0].config.bf16:
        optimizer: MegatronOptimizer = Float16OptimizerWithFloat16Params(base, megatron_config, None, lambda _: None)
    else:
        optimizer = FP32Optimizer(base, megatron_config, lambda _: None)
    # What get_megatron_optimizer sets on the optimizers that it builds (megatron-core 0.16.1).
    optimizer.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    optimizer.tp_group = groups.tp
    optimizer.model_chunks = list(chunks)
    return optimizer
