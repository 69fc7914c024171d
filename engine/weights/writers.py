"""Writers of weights: Hugging Face folders from a model that is spread over ranks, or either format from a source.

Exporting a model, the tensor-parallel ranks of each pipeline stage gather one tensor at a time and the first of them
writes the stage's files, so that no process ever holds more than one file of weights; loading a checkpoint and
exporting it gives bitwise the same tensors. From a ``TensorSource``, ``write_safetensors`` and ``write_weights``
(megatron-core's dist_checkpointing, under the names of its own GPT models) need no process groups and hold one tensor
at a time: the library's own safetensors writer wants all of a file's at once.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from reflectron.engine.files import remove, remove_temporaries, sync, temporary_name
from reflectron.engine.model.architecture import Architecture, linear_layers
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.model.hf_mapping import CheckpointTensor, HfPiece, checkpoint_tensors, hf_pieces, tied_copy
from reflectron.engine.model.inputs import ModelInputs
from reflectron.engine.parallel.process_groups import (
    WRITE_ERRORS,
    ParallelGroups,
    error_on_main,
    file_error,
    first_error,
    from_main,
)
from reflectron.engine.weights.dist_metadata import CONTENT
from reflectron.engine.weights.dist_reader import chunk_of
from reflectron.engine.weights.hf_folder import (
    ExportFiles,
    export_bytes,
    file_name,
    lack_of_space,
    plan_files,
    write_description,
    write_safetensors_index,
)
from reflectron.engine.weights.readers import SAFETENSORS_DTYPES, TensorSource, _numel


def gather_piece(local: torch.Tensor, piece: HfPiece, shards: dist.ProcessGroup) -> torch.Tensor:
    """Gather the whole Hugging Face tensor from the shares of all ranks of ``shards``, the same on each of them."""
    if piece.shard_dim is None:
        return local
    shape = list(piece.shape)
    shape[piece.shard_dim] = local.numel() * shape[piece.shard_dim] // _numel(piece.shape)
    shard = local.reshape(shape).contiguous()
    parts = [torch.empty_like(shard) for _ in range(shards.size())]
    dist.all_gather(parts, shard, group=shards)
    return torch.cat(parts, dim=piece.shard_dim).narrow(piece.shard_dim, 0, piece.shape[piece.shard_dim])


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
        for parameter, members in hf_pieces(chunks, arch, groups.tp.size())
        for piece in members
        if parameter is not copy
    ]
    mine = plan_files([(piece.name, _bytes(parameter, piece)) for parameter, piece in pieces], max_file_bytes)
    plans: list[ExportFiles] = [mine] * groups.pp.size()
    dist.all_gather_object(plans, mine, group=groups.pp)
    first = sum(len(plan.names) for plan in plans[: groups.pp.rank()])
    total = sum(len(plan.names) for plan in plans)
    writes = groups.dp_cp.rank() == 0 and groups.tp.rank() == 0
    by_name = {piece.name: (parameter, piece) for parameter, piece in pieces}
    error = ""
    for index, names in enumerate(mine.names):
        gathered = {}
        for name in names:
            parameter, piece = by_name[name]
            whole = gather_piece(piece.view(parameter.detach()), piece, groups.of(parameter).shards)
            if writes:
                gathered[name] = whole.to("cpu", copy=True).contiguous()
        # The others wait in the gathering of the next tensor, so an error must not end the loop.
        if writes and not error:
            error = _write(gathered, folder / file_name(first + index, total))
    if error := first_error(error):
        raise OSError(error)
    if groups.is_main and total > 1:
        files = [names for plan in plans for names in plan.names]
        write_safetensors_index(files, sum(plan.total_bytes for plan in plans), folder)


def _bytes(parameter: torch.nn.Parameter, piece: HfPiece) -> int:
    return _numel(piece.shape) * parameter.element_size()


def _write(tensors: dict[str, torch.Tensor], file: Path) -> str:
    """Write a file of weights; return why it could not be written, or nothing."""
    partial = file.with_suffix(".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, file)
    except WRITE_ERRORS as error:
        return file_error(error)
    return ""


def write_safetensors(
    source: TensorSource, arch: Architecture, dtype: torch.dtype, folder: Path, max_file_bytes: int = 5 * 10**9
) -> None:
    """Write ``model.safetensors``, or several files and their index, into ``folder``, which exists.

    Raises:
        ValueError: naming a tensor that the source lacks.
        OSError: when a file cannot be written.
    """
    pieces = {piece.name: piece for tensor in checkpoint_tensors(arch) for piece in tensor.pieces}
    sizes = [(name, math.prod(piece.shape) * dtype.itemsize) for name, piece in pieces.items()]
    plan = plan_files(sizes, max_file_bytes)
    for index, names in enumerate(plan.names):
        file = folder / file_name(index, len(plan.names))
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            _write_file(stream, [pieces[name] for name in names], source, dtype)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    if len(plan.names) > 1:
        write_safetensors_index(plan.names, plan.total_bytes, folder)


def _write_file(stream: IO[bytes], pieces: Sequence[HfPiece], source: TensorSource, dtype: torch.dtype) -> None:
    """Write a safetensors file: length of the header (8 bytes, little-endian), header (JSON), tensors."""
    spelled = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + math.prod(piece.shape) * dtype.itemsize
        header[piece.name] = {"dtype": spelled, "shape": list(piece.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padded with spaces, so that the tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for piece in pieces:
        tensor = source.read(piece.name, piece.shape, None, 0, 0).to(dtype).contiguous()
        stream.write(tensor.view(torch.uint8).numpy().data)


def write_weights(
    source: TensorSource, arch: Architecture, dtype: torch.dtype, folder: Path, max_file_bytes: int = 5 * 10**9
) -> None:
    """Write the weights of a model into an empty folder, for ``dist_checkpointing.load`` at any layout.

    Args:
        source: where they come from.
        arch: their architecture.
        dtype: in which they are written.
        folder: exists.
        max_file_bytes: a file ends before the tensor that would exceed it.

    Raises:
        ValueError: naming a tensor that the source lacks.
        OSError: when a file cannot be written.
    """
    tensors = list(checkpoint_tensors(arch))
    planner = _FromSource(source, tensors, dtype)
    writer = FileSystemWriter(folder, thread_count=1)
    results = []
    for number, items in enumerate(_files(tensors, arch, dtype, max_file_bytes)):
        plan = SavePlan(items, storage_data=_StoragePrefix(f"__{number}_"))
        results.append(writer.write_data(plan, planner).wait())
    write_dist_index(writer, folder, _metadata(tensors, arch, dtype), results, {"content_metadata": CONTENT})


class _FromSource(DefaultSavePlanner):
    """Makes each tensor when its turn to be written comes."""

    def __init__(self, source: TensorSource, tensors: list[CheckpointTensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.dtype = source, dtype
        self.tensors = {_index(tensor): tensor for tensor in tensors}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            # megatron-core keeps the objects of a name as a list, one for each of its shards in the same place.
            torch.save([None], empty)
            return empty
        tensor = self.tensors[write_item.index]
        whole = torch.empty(tensor.shape, dtype=self.dtype)
        for piece in tensor.pieces:
            view = piece.view(whole)
            view.copy_(self.source.read(piece.name, piece.shape, None, 0, 0).reshape(view.shape))
        return whole.view(chunk_of(tensor).sizes)


def _files(
    tensors: list[CheckpointTensor], arch: Architecture, dtype: torch.dtype, max_file_bytes: int
) -> list[list[WriteItem]]:
    """Return what is written into each file."""
    files: list[list[WriteItem]] = [[_extra_state_item(key) for key in _extra_state_keys(arch)]]
    in_file = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if in_file and in_file + size > max_file_bytes:
            files.append([])
            in_file = 0
        files[-1].append(
            WriteItem(
                index=_index(tensor),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk_of(tensor), TensorProperties(dtype), torch.Size(tensor.stacked_shape)
                ),
            )
        )
        in_file += size
    return files


def _metadata(tensors: list[CheckpointTensor], arch: Architecture, dtype: torch.dtype) -> Metadata:
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    sizes: dict[str, torch.Size] = {}
    for tensor in tensors:
        chunks.setdefault(tensor.key, []).append(chunk_of(tensor))
        sizes[tensor.key] = torch.Size(tensor.stacked_shape)
    stored: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype), sizes[key], parts) for key, parts in chunks.items()
    }
    return Metadata(stored | {key: BytesStorageMetadata() for key in _extra_state_keys(arch)})


def _index(tensor: CheckpointTensor) -> MetadataIndex:
    return MetadataIndex(tensor.key, chunk_of(tensor).offsets)


def _extra_state_keys(arch: Architecture) -> list[str]:
    """Return entries where megatron-core's linear layers expect what transformer-engine has beside its weights."""
    layers = arch.num_layers
    return [
        f"decoder.layers.{matrix.name}._extra_state/shard_{layer}_{layers}"
        for layer in range(layers)
        for matrix in linear_layers(arch)
    ]


def _extra_state_item(key: str) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0))


def write_dist_index(
    writer: FileSystemWriter,
    folder: Path,
    metadata: Metadata,
    results: list[list[WriteResult]],
    common: dict[str, Any],
) -> None:
    """Make ``folder`` complete for ``dist_checkpointing.load``.

    Args:
        writer: has written the tensors.
        metadata: where each part lies in the whole tensors.
        results: what was written, a list each call.
        common: what all ranks share.

    Raises:
        OSError, RuntimeError: when it cannot be written.
    """
    writer.finish(metadata, results)
    # Through a file of Python's, for torch's own says neither why nor where it could not write.
    with (folder / COMMON_STATE_FNAME).open("wb") as file:
        torch.save(common, file)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def export_checkpoint(chunks: Sequence[PackedGPT], inputs: ModelInputs, groups: ParallelGroups, folder: Path) -> None:
    """Write weights, config, tokenizer and generation config; an older folder is replaced when all is written.

    Raises:
        OSError: on every rank alike, when it cannot be written; nothing of it is left.
    """
    dtype = chunks[0].config.params_dtype
    partial = folder.with_name(from_main(temporary_name(folder.name, "partial")))

    def begin() -> str:
        remove_temporaries(folder.parent, folder.name)
        partial.mkdir(parents=True)
        return lack_of_space(folder, {"the export": export_bytes(inputs.arch, dtype)})

    def end() -> None:
        write_description(partial, inputs, dtype)
        for path in partial.iterdir():
            sync(path)
        remove(folder)
        partial.rename(folder)
        sync(folder.parent)

    try:
        if error := error_on_main(begin):
            raise OSError(error)
        export_weights(chunks, inputs.arch, groups, partial)
        if error := error_on_main(end):
            raise OSError(error)
    finally:
        if groups.is_main:
            remove(partial)
