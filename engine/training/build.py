from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from reflectron.engine.config import Config
from reflectron.engine.model.architecture import Architecture, padded_vocab_size
from reflectron.engine.model.backends.choose import PLAIN, Backends
from reflectron.engine.model.gpt import PackedGPT, build_chunks, transformer_config
from reflectron.engine.model.hf_mapping import HfPiece, hf_pieces
from reflectron.engine.model.inputs import ModelInputs
from reflectron.engine.parallel.process_groups import (
    ParallelGroups,
)
from reflectron.engine.training.loss import PackLoss
from reflectron.engine.weights.dist_reader import open_weights
from reflectron.engine.weights.readers import RandomSource, TensorSource, WithAddedTokens, _numel


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
    extent = target.numel() * piece.shape[dim] // _numel(piece.shape)
    shard = source.read(piece.name, piece.shape, dim, rank * extent, (rank + 1) * extent)
    if shard.shape[dim] == extent:
        target.copy_(shard.reshape(target.shape))
    else:
        target.zero_()
        target[: shard.shape[0]].copy_(shard)


def load_model(
    config: Config,
    inputs: ModelInputs,
    groups: ParallelGroups,
    dtype: torch.dtype,
    backends: Backends = PLAIN,
    with_weights: bool = True,
) -> list[PackedGPT]:
    """This rank's part of the model with its weights: from the checkpoint, or random; new tags averaged.

    Without weights it holds what happened to be in memory.

    Returns:
        One chunk, or the chunks of an interleaved pipeline.
    """
    arch, parallel = inputs.arch, config.parallel
    vocab = padded_vocab_size(
        arch.vocab_size, config.model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    loss = PackLoss(config.loss, arch.vocab_size, groups.tp, groups.cp, parallel.sequence_parallel)
    model_config = transformer_config(arch, parallel, dtype, backends, config.model.fp8)
    chunks = build_chunks(arch, model_config, vocab, loss, backends)
    if with_weights:
        load_weights(chunks, arch, weight_source(config, inputs), groups)
    return chunks


def weight_source(config: Config, inputs: ModelInputs) -> TensorSource:
    """Where the initial weights come from."""
    source: TensorSource
    if config.model.path:
        source = open_weights(config.model.path, replace(inputs.arch, vocab_size=inputs.original_vocab_size))
    else:
        source = RandomSource(config.seed, inputs.arch.initializer_range)
    tokenizer = inputs.tokenizer
    new = {tokenizer.tag_ids[tag]: ids for tag, ids in tokenizer.tag_sub_tokens.items()}
    grew = inputs.arch.vocab_size > inputs.original_vocab_size
    return WithAddedTokens(source, inputs.original_vocab_size, new) if new or grew else source
