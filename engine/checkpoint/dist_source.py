"""Weights out of a folder in megatron-core's dist_checkpointing format, one parameter at a time.

Whichever layout wrote the folder, and whether or not optimizer state lies beside the weights, a ``DistSource`` answers
for Hugging Face tensors. It needs no process groups and holds no more than one parameter of one layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from reflectron.engine.checkpoint.dist_metadata import METADATA_FILE, check_whole
from reflectron.engine.checkpoint.dist_reader import DistReader
from reflectron.engine.checkpoint.hf_table import CheckpointTensor, checkpoint_tensors
from reflectron.engine.checkpoint.sources import SafetensorsSource
from reflectron.engine.checkpoint.tensor_names import check_names, check_tied_output, expected_names, listed
from reflectron.engine.model.families import Architecture

ADAPTER_FILE = "adapter_config.json"
# Keys of the model's own parameters, beside those of the optimizer and of the run.
_PARAMETERS = ("decoder.", "embedding.", "output_layer.")


def open_weights(folder: str | Path, arch: Architecture) -> SafetensorsSource | DistSource:
    """The weights in ``folder``, in either format; ``arch`` is their architecture.

    Raises:
        ValueError: when it holds none, or others than those of ``arch``.
    """
    if (Path(folder) / ADAPTER_FILE).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which transformers would load on top of the weights; "
            "merge the two (peft's merge_and_unload) or remove it"
        )
    if (Path(folder) / METADATA_FILE).exists():
        source = DistSource(folder, arch)
        source.check_names()
        return source
    weights = SafetensorsSource(folder)
    names = weights.names()
    check_names(names, arch, folder)
    for name in expected_names(arch):
        weights.dtype(name)
    check_tied_output(weights, arch, names, folder)
    return weights


class DistSource:
    """A ``TensorSource`` over the weights of a dist_checkpointing folder.

    Args:
        folder: holds ``.metadata`` and ``*.distcp`` files.
        arch: of the model whose weights they are.

    Raises:
        ValueError: when the folder cannot be read.
    """

    def __init__(self, folder: str | Path, arch: Architecture) -> None:
        self.folder = Path(folder)
        self._reader = DistReader(self.folder)
        self._metadata = self._reader.read_metadata()
        self._places = {piece.name: (tensor, piece) for tensor in checkpoint_tensors(arch) for piece in tensor.pieces}
        self._last: tuple[CheckpointTensor, torch.Tensor] | None = None

    def open_all(self) -> None:
        """See that every file that holds weights is there.

        Raises:
            ValueError: naming the file.
        """
        for name in sorted({place.relative_path for place in self._metadata.storage_data.values()}):
            if not (self.folder / name).is_file():
                raise ValueError(f"{self.folder / name} is missing; copy the whole folder again")

    def check_names(self) -> None:
        """See that there is no parameter that the architecture does not have; those missing are found when read.

        Raises:
            ValueError: naming them.
        """
        known = {tensor.key for tensor, _ in self._places.values()}
        unread = [
            key
            for key in sorted(self._metadata.state_dict_metadata)
            if key.startswith(_PARAMETERS) and key not in known and not key.partition("/")[0].endswith("._extra_state")
        ]
        if unread:
            raise ValueError(
                f"{self.folder} holds {len(unread)} tensors that its architecture does not compute with: "
                f"{listed(unread)}; expected none: it holds another architecture"
            )

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor with this Hugging Face name."""
        return self._stored(self._places[name][0]).properties.dtype

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        if name not in self._places:
            raise ValueError(f"{self.folder} has no tensor {name}: it holds another architecture")
        tensor, piece = self._places[name]
        # A vocabulary that grew is asked for with its old size.
        rows = piece.view(self._whole(tensor)).reshape(piece.shape)
        if rows.shape != shape:
            raise ValueError(f"{self.folder}: {name} has shape {list(rows.shape)}, expected {list(shape)}")
        return rows if dim is None else rows.narrow(dim, min(start, shape[dim]), max(min(stop, shape[dim]) - start, 0))

    def _stored(self, tensor: CheckpointTensor) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(tensor.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{self.folder} has no tensor {tensor.key}: it holds another architecture")
        check_whole(f"{self.folder}: {tensor.key}", stored)
        return stored

    def _whole(self, tensor: CheckpointTensor) -> torch.Tensor:
        """The parameter of one layer; the last one is kept, because its pieces are asked for one after the other."""
        if self._last is None or self._last[0] is not tensor:
            self._last = (tensor, self._read(tensor))
        return self._last[1]

    def _read(self, tensor: CheckpointTensor) -> torch.Tensor:
        stored, part = self._stored(tensor), chunk_of(tensor)
        found, expected = tuple(stored.size), tensor.stacked_shape
        # Rows that pad the vocabulary may follow.
        if found != expected and not (tensor.layer is None and found[0] > expected[0] and found[1:] == expected[1:]):
            raise ValueError(f"{self.folder}: {tensor.key} has shape {list(found)}, expected {list(expected)}")
        target = torch.empty(part.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(tensor.key, stored, [part])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target.view(tensor.shape)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def chunk_of(tensor: CheckpointTensor) -> ChunkStorageMetadata:
    """Where it lies in the stack of layers."""
    offsets, sizes = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.layer is not None:
        offsets, sizes = [tensor.layer, *offsets], [1, *sizes]
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
