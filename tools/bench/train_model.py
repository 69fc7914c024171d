"""The engine as ``reflectron bench train`` runs it: built once, then asked for steps of any layout and head."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from reflectron.engine.config import BackendsConfig, Config, LossConfig
from reflectron.engine.data.global_batch import GlobalBatch
from reflectron.engine.model.architecture import Architecture, padded_vocab_size
from reflectron.engine.model.backends.choose import choose_on_every_rank
from reflectron.engine.model.gpt import build_chunks, transformer_config
from reflectron.engine.model.parallelize import parallelize
from reflectron.engine.optim.optimizer import build_optimizer, shards_optimizer
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.build import load_weights
from reflectron.engine.training.loss import PackLoss
from reflectron.engine.training.step import train_step
from reflectron.engine.weights.readers import TensorSource
from reflectron.kernels.distill_head import Backend
from reflectron.tools.bench.train_timing import Step


class EngineModel:
    """This rank's part of a model and its optimizer.

    Args:
        config: layout, types, backends and optimizer.
        arch: the model.
        source: its weights.
        groups: process groups of the layout.

    Raises:
        ValueError: when a backend cannot do what it is asked for.
    """

    def __init__(self, config: Config, arch: Architecture, source: TensorSource, groups: ParallelGroups) -> None:
        parallel = config.parallel
        vocab = padded_vocab_size(
            arch.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
        )
        self.config, self.groups = config, groups
        self.loss = PackLoss(config.loss, arch.vocab_size, groups.tp, groups.cp, parallel.sequence_parallel)
        chosen = choose_on_every_rank(config, arch, groups.device)
        dtype = getattr(torch, config.model.dtype)
        transformer = transformer_config(arch, parallel, dtype, chosen, config.model.fp8)
        self.chunks = build_chunks(arch, transformer, vocab, self.loss, chosen)
        load_weights(self.chunks, arch, source, groups)
        shard = shards_optimizer(config.optimizer, parallel.distributed_optimizer)
        self.wrapped = parallelize(self.chunks, parallel, shard)
        self.optimizer = build_optimizer(config.optimizer, self.wrapped, self.chunks, arch, groups, shard, chosen.adamw)
        self.chosen: dict[str, Any] = chosen.names

    def backends(self, fused_head: bool) -> dict[str, str]:
        """What computes the parts that there is a choice for."""
        fp8 = {} if self.config.model.fp8 == "none" else {"fp8": self.config.model.fp8}
        return self.chosen | {"head": self.head(fused_head)} | fp8

    def settled(self, fused_head: bool) -> Config:
        """The configuration with the names of all back ends, for the planner."""
        loss = replace(self.config.loss, backend=self.head(fused_head))
        return replace(self.config, backends=BackendsConfig(**self.chosen), loss=loss)

    def head(self, fused: bool) -> Backend:
        """Backend of the distillation head that ``fused`` stands for; a configured one always wins."""
        if self.config.loss.backend != "auto":
            return self.config.loss.backend
        can_run = self.groups.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return "triton" if fused and can_run else "reference"

    def step(self, batch: GlobalBatch, fused_head: bool) -> Step:
        """An optimizer step on ``batch``; the weights stay as they are, for its learning rate is 0."""
        return partial(self._step, batch, replace(self.config.loss, backend=self.head(fused_head)))

    def _step(self, batch: GlobalBatch, loss: LossConfig) -> tuple[float, float]:
        self.loss.config = loss
        result = train_step(self.wrapped, self.optimizer, self.groups, batch, learning_rate=0.0)
        return result.terms.loss, result.grad_norm
