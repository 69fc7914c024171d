"""Reads the tensors of a dist checkpoint folder for torch.distributed.checkpoint, without unpickling any of it.

torch's own reader unpickles ``.metadata``, so that a folder of a stranger runs code of his.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from reflectron.engine.checkpoint.dist_metadata import read_metadata
from reflectron.engine.checkpoint.inert_pickle import ForeignPickle
from reflectron.engine.checkpoint.torch_file import read_torch_file


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
        """What was read when this was made."""
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
