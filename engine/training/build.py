"""A configuration and weights become this rank's part of the model: alone, or wrapped and with its optimizer.

Everybody who runs the model builds it here: training, validation and inspection, conversion, benchmarks and tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer

from reflectron.engine.config import Config
from reflectron.engine.model.architecture import Architecture, padded_vocab_size
from reflectron.engine.model.backends.choose import PLAIN, Backends
from reflectron.engine.model.gpt import PackedGPT, build_chunks, transformer_config
from reflectron.engine.model.hf_mapping import HfPiece, hf_pieces
from reflectron.engine.model.inputs import ModelInputs
from reflectron.engine.model.parallelize import parallelize
from reflectron.engine.optim.optimizer import build_optimizer, shards_optimizer
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.loss import PackLoss
from reflectron.engine.weights.dist_reader import open_weights
from reflectron.engine.weights.readers import RandomSource, TensorSource, WithAddedTokens


@dataclass(frozen=True, kw_only=True)
class TrainableModel:
    """This rank's part of a model, ready for ``train_step``."""

    backends: Backends
    """The implementations that compute it."""
    chunks: list[PackedGPT]
    """Its pipeline stage: one chunk, or the chunks of an interleaved pipeline."""
    wrapped: list[DistributedDataParallel]
    """``chunks`` inside data parallelism."""
    optimizer: MegatronOptimizer
    """Updates the parameters of ``wrapped``."""

    @property
    def loss(self) -> PackLoss:
        """The loss that the last stage computes."""
        loss = self.chunks[-1].output_processor
        assert isinstance(loss, PackLoss)
        return loss


def build_model(
    config: Config,
    arch: Architecture,
    groups: ParallelGroups,
    weights: TensorSource | None,
    backends: Backends = PLAIN,
) -> TrainableModel:
    """Build this rank's part of the model in ``config.model.dtype``, ready for training.

    Args:
        config: layout, loss and optimizer.
        arch: the model.
        groups: process groups of the layout.
        weights: initial weights; None leaves the parameters uninitialised, for a checkpoint that is loaded afterwards.
        backends: as ``choose_on_every_rank`` returns them.
    """
    chunks = _build_chunks(config, arch, groups, getattr(torch, config.model.dtype), backends)
    if weights is not None:
        load_weights(chunks, arch, weights, groups)
    return make_trainable(chunks, config, arch, groups, backends)


def make_trainable(
    chunks: list[PackedGPT], config: Config, arch: Architecture, groups: ParallelGroups, backends: Backends = PLAIN
) -> TrainableModel:
    """Wrap chunks, whose weights are loaded, for data parallelism and give them their optimizer."""
    shard = shards_optimizer(config.optimizer, config.parallel.distributed_optimizer)
    wrapped = parallelize(chunks, config.parallel, shard)
    optimizer = build_optimizer(config.optimizer, wrapped, chunks, arch, groups, shard, backends.adamw)
    return TrainableModel(backends=backends, chunks=chunks, wrapped=wrapped, optimizer=optimizer)


def load_model(
    config: Config,
    inputs: ModelInputs,
    groups: ParallelGroups,
    dtype: torch.dtype,
    backends: Backends = PLAIN,
    with_weights: bool = True,
) -> list[PackedGPT]:
    """Build this rank's part of the model with its initial weights, without anything that training needs.

    Without weights the parameters stay uninitialised.

    Returns:
        One chunk, or the chunks of an interleaved pipeline.
    """
    chunks = _build_chunks(config, inputs.arch, groups, dtype, backends)
    if with_weights:
        load_weights(chunks, inputs.arch, weight_source(config, inputs), groups)
    return chunks


def weight_source(config: Config, inputs: ModelInputs) -> TensorSource:
    """Return the initial weights: from the checkpoint, or random; rows of new tokens are averages."""
    source: TensorSource
    if config.model.path:
        source = open_weights(config.model.path, replace(inputs.arch, vocab_size=inputs.original_vocab_size))
    else:
        source = RandomSource(config.seed, inputs.arch.initializer_range)
    tokenizer = inputs.tokenizer
    new = {tokenizer.tag_ids[tag]: ids for tag, ids in tokenizer.tag_sub_tokens.items()}
    grew = inputs.arch.vocab_size > inputs.original_vocab_size
    return WithAddedTokens(source, inputs.original_vocab_size, new) if new or grew else source


def load_weights(chunks: Sequence[PackedGPT], arch: Architecture, source: TensorSource, groups: ParallelGroups) -> None:
    """Fill this rank's parameters; rows that pad the vocabulary become zero.

    Raises:
        ValueError: naming a tensor that is missing or has another shape.
    """
    with torch.no_grad():
        for parameter, pieces in hf_pieces(chunks, arch, groups.tp.size()):
            shards = groups.of(parameter).shards
            for piece in pieces:
                _load_piece(piece.view(parameter), piece, source, shards.rank())


def _load_piece(target: torch.Tensor, piece: HfPiece, source: TensorSource, rank: int) -> None:
    dim = piece.shard_dim
    if dim is None:
        target.copy_(source.read(piece.name, piece.shape, None, 0, 0))
        return
    # A padded vocabulary gives each rank more rows than its share of the file's.
    extent = target.numel() * piece.shape[dim] // math.prod(piece.shape)
    shard = source.read(piece.name, piece.shape, dim, rank * extent, (rank + 1) * extent)
    if shard.shape[dim] == extent:
        target.copy_(shard.reshape(target.shape))
    else:
        target.zero_()
        target[: shard.shape[0]].copy_(shard)


def _build_chunks(
    config: Config, arch: Architecture, groups: ParallelGroups, dtype: torch.dtype, backends: Backends
) -> list[PackedGPT]:
    """Build this rank's chunks, uninitialised, with the loss at their end."""
    parallel = config.parallel
    vocab = padded_vocab_size(
        arch.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    loss = PackLoss(config.loss, arch.vocab_size, groups.tp, groups.cp, parallel.sequence_parallel)
    model_config = transformer_config(arch, parallel, dtype, backends, config.model.fp8)
    return build_chunks(arch, model_config, vocab, loss, backends)
