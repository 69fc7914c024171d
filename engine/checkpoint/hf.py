"""Hugging Face checkpoints in and out of a model that is spread over ranks.

Reading, each rank takes its own slices. Writing, the tensor-parallel ranks of each pipeline stage gather one tensor at
a time and the first of them writes the stage's files, so that no process ever holds more than one file of weights.
Loading a checkpoint and exporting it gives bitwise the same tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from reflectron.engine.checkpoint.hf_folder import ExportFiles, file_name, plan_files, write_index
from reflectron.engine.checkpoint.hf_table import HfPiece, hf_pieces, tied_copy
from reflectron.engine.checkpoint.on_main import WRITE_ERRORS, file_error, first_error
from reflectron.engine.checkpoint.sources import TensorSource
from reflectron.engine.model.families import Architecture
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.parallel.process_groups import ParallelGroups


def load_weights(chunks: Sequence[PackedGPT], arch: Architecture, source: TensorSource, groups: ParallelGroups) -> None:
    """Fill this rank's parameters; rows that pad the vocabulary become zero.

    Raises:
        ValueError: naming a tensor that is missing or has another shape.
    """
    rank, size = groups.tensor.rank(), groups.tensor.size()
    with torch.no_grad():
        for parameter, pieces in hf_pieces(chunks, arch, size):
            for piece in pieces:
                _load_piece(piece.view(parameter), piece, source, rank, size)


def _load_piece(target: torch.Tensor, piece: HfPiece, source: TensorSource, rank: int, size: int) -> None:
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


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def gather_piece(local: torch.Tensor, piece: HfPiece, groups: ParallelGroups) -> torch.Tensor:
    """The whole Hugging Face tensor from every rank's share, the same on all tensor-parallel ranks."""
    size = groups.tensor.size()
    if piece.shard_dim is None:
        return local
    shape = list(piece.shape)
    shape[piece.shard_dim] = local.numel() * shape[piece.shard_dim] // _numel(piece.shape)
    shard = local.reshape(shape).contiguous()
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard, group=groups.tensor)
    return torch.cat(shards, dim=piece.shard_dim).narrow(piece.shard_dim, 0, piece.shape[piece.shard_dim])


def export_weights(
    chunks: Sequence[PackedGPT],
    arch: Architecture,
    groups: ParallelGroups,
    folder: Path,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the model as safetensors into ``folder``; every rank calls it, files appear when complete.

    Raises:
        OSError: on every rank alike, when a file cannot be written on one of them.
    """
    # The first replica writes; a tied output layer on a later stage is a copy of the embedding.
    copy = tied_copy(chunks, arch)
    pieces = [
        (parameter, piece)
        for parameter, members in hf_pieces(chunks, arch, groups.tensor.size())
        for piece in members
        if parameter is not copy
    ]
    mine = plan_files([(piece.name, _bytes(parameter, piece)) for parameter, piece in pieces], max_file_bytes)
    plans: list[ExportFiles] = [mine] * groups.pipeline.size()
    dist.all_gather_object(plans, mine, group=groups.pipeline)
    first = sum(len(plan.names) for plan in plans[: groups.pipeline.rank()])
    total = sum(len(plan.names) for plan in plans)
    writes = groups.replicas.rank() == 0 and groups.tensor.rank() == 0
    by_name = {piece.name: (parameter, piece) for parameter, piece in pieces}
    error = ""
    for index, names in enumerate(mine.names):
        gathered = {}
        for name in names:
            parameter, piece = by_name[name]
            whole = gather_piece(piece.view(parameter.detach()), piece, groups)
            if writes:
                gathered[name] = whole.to("cpu", copy=True).contiguous()
        # The others wait in the gathering of the next tensor, so an error must not end the loop.
        if writes and not error:
            error = _write(gathered, folder / file_name(first + index, total))
    if error := first_error(error):
        raise OSError(error)
    if groups.is_main and total > 1:
        write_index([names for plan in plans for names in plan.names], sum(plan.total_bytes for plan in plans), folder)


def _bytes(parameter: torch.nn.Parameter, piece: HfPiece) -> int:
    return _numel(piece.shape) * parameter.element_size()


def _write(tensors: dict[str, torch.Tensor], file: Path) -> str:
    """Write a file of weights; why it could not be written, or nothing."""
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, file)
    except WRITE_ERRORS as error:
        return file_error(error)
    return ""
