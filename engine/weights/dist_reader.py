"""Weights and tensors of a dist checkpoint folder, without unpickling any of it.

torch's own reader unpickles ``.metadata``, so a stranger's folder runs his code. Whichever layout wrote the folder, and
whether or not optimizer state lies beside the weights, a ``DistSource`` answers for Hugging Face tensors. It needs no
process groups and holds no more than one parameter of one layer.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_mapping import (
    CheckpointTensor,
    check_names,
    check_tied_output,
    checkpoint_tensors,
    expected_names,
    listed,
)
from reflectron.engine.weights.dist_metadata import METADATA_FILE, check_whole, read_metadata
from reflectron.engine.weights.inert_pickle import ForeignPickle
from reflectron.engine.weights.readers import SafetensorsSource
from reflectron.engine.weights.torch_file import read_torch_file


class DistReader(FileSystemReader):
    """torch's reader of a folder, over our own of its metadata and of each tensor.

    Raises:
        ValueError: when the folder's ``.metadata`` cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self._metadata = read_metadata(folder)
        self.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read_metadata(self) -> Metadata:
        """Return what was read when this was made."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hand every tensor and object of ``plan`` to ``planner``.

        Raises:
            ValueError: naming the file that is missing or holds anything else.
        """
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            place = self.storage_data.get(item.storage_index)
            if place is None:
                raise ValueError(f"{self.folder}: .metadata does not say where {item.storage_index.fqn} lies")
            files.setdefault(place.relative_path, []).append(item)
        for name, items in files.items():
            path = self.folder / name
            try:
                self._read_file(path, items, planner)
            except (OSError, ForeignPickle) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise ValueError(f"{path} cannot be read: {reason}; copy the folder again") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_file(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        if not path.is_file():
            raise ForeignPickle("it is missing" if not path.exists() else "it is no regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            for item in items:
                place = self.storage_data[item.storage_index]
                if place.offset + place.length > size:
                    raise ForeignPickle(f"it has {size} bytes, expected at least {place.offset + place.length}")
                part = _Part(file, place.offset, place.length)
                if item.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(part.read()))
                    continue
                tensor = read_torch_file(part)
                if not isinstance(tensor, torch.Tensor):
                    raise ForeignPickle(f"{item.storage_index.fqn} is no tensor")
                _copy_part(tensor, item, planner)


class _Part(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = min(max(start + offset, 0), self._length)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        piece = self._file.read(min(len(buffer), self._length - self._at))
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _copy_part(tensor: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    parts = list(zip(item.storage_offsets, item.lengths, strict=True))
    if tensor.dim() != len(parts) or any(
        start + length > tensor.size(dim) for dim, (start, length) in enumerate(parts)
    ):
        raise ForeignPickle(
            f"{item.storage_index.fqn} has shape {list(tensor.shape)} there, which is not what .metadata says"
        )
    for dim, (start, length) in enumerate(parts):
        tensor = tensor.narrow(dim, start, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(tensor)
    planner.commit_tensor(item, target)


ADAPTER_FILE = "adapter_config.json"
# Keys of the model's own parameters, beside those of the optimizer and of the run.
_PARAMETERS = ("decoder.", "embedding.", "output_layer.")


def open_weights(folder: str | Path, arch: Architecture) -> SafetensorsSource | DistSource:
    """Return the weights in ``folder``, in either format; ``arch`` is their architecture.

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
        """Return the type of the tensor with this Hugging Face name."""
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
        """Return the parameter of one layer; the last one is kept, because its pieces are asked for one after the
        other."""
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
    """Return where it lies in the stack of layers."""
    offsets, sizes = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.layer is not None:
        offsets, sizes = [tensor.layer, *offsets], [1, *sizes]
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
