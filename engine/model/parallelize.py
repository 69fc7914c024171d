"""The wrapping of this rank's chunks for training: mixed precision, and float32 gradients summed over replicas.

Where communication overlaps with computation, it is arranged as megatron-core's schedules expect it: gradients are
reduced in the last microbatch's backward, parameters gathered in the first one's forward. Until that forward only a
rank's own share of the parameters is up to date; ``gather_parameters`` serves those who read them earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from reflectron.engine.config import ParallelConfig
from reflectron.engine.model.gpt import PackedGPT


def parallelize(
    chunks: Sequence[PackedGPT], parallel: ParallelConfig, shard_optimizer: bool
) -> list[DistributedDataParallel]:
    """Wrap each of ``chunks``, its weights loaded, in megatron-core's data parallelism.

    A step's gradient is the plain sum over microbatches and replicas, because every row carries its weight.

    Args:
        chunks: this rank's part of the model.
        parallel: says what overlaps.
        shard_optimizer: lay gradients out for the ``DistributedOptimizer``.
    """
    config = chunks[0].config
    ddp_config = data_parallel_config(parallel, shard_optimizer, interleaved=len(chunks) > 1)
    inner: list[torch.nn.Module] = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    wrapped = [
        # The communication of later chunks lies behind the computation of earlier ones and needs no finer overlap.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(inner)
    ]
    # Without it megatron-core reduces neither data-parallel nor sequence-parallel gradients. No token count is handed
    # on: it would divide the sum once more.
    config.finalize_model_grads_func = lambda chunks, _num_tokens=None, **kwargs: finalize_model_grads(
        chunks, None, **kwargs
    )
    for chunk in wrapped:
        chunk.broadcast_params()
    _hand_to_schedule(config, wrapped)
    if ddp_config.overlap_param_gather and chunks[-1].post_process:
        _gather_for_loss(wrapped[-1], chunks[-1])
    return wrapped


def data_parallel_config(
    parallel: ParallelConfig, shard_optimizer: bool, interleaved: bool
) -> DistributedDataParallelConfig:
    """Resolve what overlaps: by default, on CUDA with replicas, all that can.

    Over gloo it works as well, but gains nothing: there the same cores compute and communicate.
    """
    has_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduce is None:
        reduce = bool(gather) or (torch.cuda.is_available() and has_replicas)
    if gather is None:
        gather = reduce and shard_optimizer
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=shard_optimizer,
        overlap_grad_reduce=reduce,
        overlap_param_gather=gather and shard_optimizer,
        # Only the interleaved schedule starts the stages' gathers together.
        align_param_gather=interleaved,
        bucket_size=parallel.bucket_size,
    )


def gather_parameters(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Bring all parameters up to date, as the next forward would; every rank calls it."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _hand_to_schedule(config: TransformerConfig, wrapped: Sequence[DistributedDataParallel]) -> None:
    """Give megatron-core's schedule the functions by which it holds communication back and starts it."""

    def one_or_all(functions: list[Callable[..., Any]]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    ddp_config = wrapped[0].ddp_config
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in wrapped])
        # All stages start a reduction at the same time: one that starts alone slows down its stage, and all wait.
        config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if ddp_config.overlap_param_gather and ddp_config.align_param_gather:
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]


def _gather_for_loss(wrapped: DistributedDataParallel, chunk: PackedGPT) -> None:
    """Wait for the output layer's weight as well, which the loss takes without calling the layer and its hook."""
    weight = chunk.output_weight()
    bucket_group = wrapped.param_to_bucket_group[weight]
    skip_next = wrapped.ddp_config.align_param_gather

    def wait(*_: Any) -> None:
        bucket_group.finish_param_sync(skip_next_bucket_dispatch=skip_next)

    chunk.decoder.final_layernorm.register_forward_pre_hook(wait)
