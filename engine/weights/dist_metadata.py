"""``.metadata`` of a dist checkpoint, built by hand from an inert reading of its pickle.

The file comes from torch.distributed.checkpoint 2.6 or later, or from megatron-core since 0.5 over it. Only what says
which tensors there are and where their bytes lie is built; what the writers' planners left in it is passed over.
"""

from __future__ import annotations

import math
import os
import stat
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from reflectron.engine.files import printable
from reflectron.engine.weights.inert_pickle import ForeignPickle, Made, Name, Pairs, PickleLimits, parse
from reflectron.engine.weights.torch_file import DTYPES

METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint"
_MEGATRON_METADATA = "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"
_SIZE, _PLACE = "torch.Size", f"{_DCP}.filesystem._StorageInfo"
_READ = {
    f"{_DCP}.metadata.{name}"
    for name in (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
    )
}
# What writers leave beside it: their plans, and where they wrote.
_PASSED_OVER = {
    *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(f"{_DCP}.planner.BytesIOWriteData", f"{_DCP}.filesystem._StoragePrefix", "torch.serialization._get_layout"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "collections.OrderedDict"),
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
}
_NAMES = {*DTYPES, *_READ, *_PASSED_OVER, _MEGATRON_METADATA, _SIZE, _PLACE}
_LIMITS = PickleLimits()
# Parts of a tensor that lie in no grid.
_MOST_COMPARED = 256


def read_metadata(folder: Path) -> Metadata:
    """Return which tensors and objects ``folder`` holds and where; nothing that the file names is imported or called.

    Raises:
        ValueError: in one line, when the file is missing, damaged, or holds anything else.
    """
    path = folder / METADATA_FILE
    try:
        return _Builder().metadata(parse(_content(path), _NAMES, _LIMITS))
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except ForeignPickle as error:
        reason = str(error)
    raise ValueError(
        f"{path} cannot be read: {reason}; expected a folder that megatron-core's dist_checkpointing wrote, whole"
    )


def _content(path: Path) -> bytes:
    """Read a regular file, and never more than the limit: a pipe or a device has no end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ForeignPickle("it is no regular file")
        if status.st_size > _LIMITS.bytes:
            raise ForeignPickle(f"it has {status.st_size} bytes, expected at most {_LIMITS.bytes}")
        return file.read(_LIMITS.bytes + 1)


class _Builder:
    def __init__(self) -> None:
        # What the file's lists and tuples became: it holds each once and names it many times over.
        self._sizes: dict[int, torch.Size] = {}
        self._chunks: dict[int, list[ChunkStorageMetadata]] = {}

    def metadata(self, node: Any) -> Metadata:
        # megatron-core before 0.16 writes a class of its own with the same attributes.
        own = isinstance(node, Made) and node.name == _MEGATRON_METADATA
        fields = _fields(node, _MEGATRON_METADATA if own else f"{_DCP}.metadata.Metadata")
        stored = fields.get("state_dict_metadata")
        places = fields.get("storage_data")
        if not isinstance(stored, Pairs) or not isinstance(places, Pairs):
            raise ForeignPickle("state_dict_metadata or storage_data is no dictionary")
        return Metadata(
            state_dict_metadata={_text(key): self.stored(value) for key, value in stored.items},
            storage_data={self.index(key): _place(value) for key, value in places.items},
            storage_meta=StorageMeta(),
        )

    def stored(self, node: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if isinstance(node, Made) and node.name == f"{_DCP}.metadata.BytesStorageMetadata":
            return BytesStorageMetadata()
        fields = _fields(node, f"{_DCP}.metadata.TensorStorageMetadata")
        size = self.size(fields.get("size"))
        chunks = self.chunks(fields.get("chunks"))
        for chunk in chunks:
            ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=False)]
            if not len(chunk.offsets) == len(chunk.sizes) == len(size) or any(map(int.__gt__, ends, size)):
                raise ForeignPickle(f"a part of a tensor of sizes {list(size)} ends at {ends}")
        return TensorStorageMetadata(TensorProperties(_dtype(fields.get("properties"))), size, chunks)

    def chunks(self, node: Any) -> list[ChunkStorageMetadata]:
        if not isinstance(node, list):
            raise _unexpected(node, "a list of parts")
        if id(node) not in self._chunks:
            self._chunks[id(node)] = [self.chunk(part) for part in node]
        return self._chunks[id(node)]

    def chunk(self, node: Any) -> ChunkStorageMetadata:
        fields = _fields(node, f"{_DCP}.metadata.ChunkStorageMetadata")
        return ChunkStorageMetadata(self.size(fields.get("offsets")), self.size(fields.get("sizes")))

    def index(self, node: Any) -> MetadataIndex:
        fields = _fields(node, f"{_DCP}.metadata.MetadataIndex")
        offset, index = fields.get("offset"), fields.get("index")
        if index is not None:
            index = _count(index)
        return MetadataIndex(_text(fields.get("fqn")), None if offset is None else self.size(offset), index)

    def size(self, node: Any) -> torch.Size:
        if id(node) not in self._sizes:
            match node:
                case Made(name="torch.Size", args=(tuple(numbers),), state=None) if len(numbers) < 10:
                    self._sizes[id(node)] = torch.Size([_count(number) for number in numbers])
                case _:
                    raise _unexpected(node, "a torch.Size")
        return self._sizes[id(node)]


def _fields(node: Any, name: str) -> dict[str, Any]:
    """Return the attributes of a dataclass's instance."""
    match node:
        case Made(name=found, args=(), state=Pairs(items=items)) if found == name:
            return {_text(key): value for key, value in items}
        # A frozen one with slots, and one that has no attribute.
        case Made(name=found, args=(), state=None) if found == name:
            return {}
    raise _unexpected(node, f"a {name.rpartition('.')[2]}")


def _dtype(node: Any) -> torch.dtype:
    match node:
        case Made(name=name, args=(), state=(Name(text=dtype), *_)) if name.endswith(".TensorProperties"):
            if dtype in DTYPES:
                return DTYPES[dtype]
    raise _unexpected(node, "TensorProperties with a dtype")


def _place(node: Any) -> _StorageInfo:
    fields = _fields(node, _PLACE)
    path, transforms = _text(fields.get("relative_path")), fields.get("transform_descriptors")
    if path in ("", ".", "..") or "/" in path or "\0" in path:
        raise ForeignPickle(f"{printable(path, 60)!r} is no name of a file in the folder")
    if transforms:
        raise ForeignPickle("its tensors are compressed or encrypted, which this project does not read")
    return _StorageInfo(path, _count(fields.get("offset")), _count(fields.get("length")))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 50:
        raise _unexpected(value, "a whole number from 0 to 2**50")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > 1000:
        raise _unexpected(value, "a name of at most 1000 characters")
    return value


def _unexpected(node: Any, expected: str) -> ForeignPickle:
    found = node.name if isinstance(node, Made) else printable(node, 40) if type(node) is int else type(node).__name__
    return ForeignPickle(f"it holds {found} in the place of {expected}")


def check_whole(key: str, stored: TensorStorageMetadata) -> None:
    """See that the parts of a tensor are the whole of it.

    Raises:
        ValueError: when some of it is nowhere, or twice.
    """
    held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    apart = len({chunk.offsets for chunk in stored.chunks}) == len(stored.chunks)
    if held != math.prod(stored.size) or not apart or (held and not _are_apart(stored)):
        raise ValueError(f"{key} is not whole: its parts do not make a tensor of shape {list(stored.size)}")


def _are_apart(stored: TensorStorageMetadata) -> bool:
    """Return whether no place of a tensor is in two of its parts, of which no two begin alike.

    Ranks cut a tensor into a grid, which is seen at a glance. Of other cuts each part is compared with each, up to a
    number of them.
    """
    chunks = stored.chunks
    ends: list[dict[int, int]] = []
    for dim, size in enumerate(stored.size):
        cuts = sorted({chunk.offsets[dim] for chunk in chunks} | {size})
        ends.append(dict(pairwise(cuts)))
    if all(
        start + length == ends[dim].get(start)
        for chunk in chunks
        for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
    ):
        return True
    return len(chunks) <= _MOST_COMPARED and not any(_overlap(*pair) for pair in combinations(chunks, 2))


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        max(starts) < min(starts[0] + lengths[0], starts[1] + lengths[1])
        for starts, lengths in zip(
            zip(one.offsets, other.offsets, strict=True), zip(one.sizes, other.sizes, strict=True), strict=True
        )
    )


# What megatron-core 0.16.1 is asked for, and what `content_metadata` of a checkpoint says.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
