"""Reads what ``torch.save`` wrote, as plain data and tensors, without ``torch.load`` and so without pickle.

``torch.load(weights_only=True)`` keeps a list of allowed classes that every imported library adds to, lets a file ask
for any amount of memory, and can be switched off by the environment. Here a file gets numbers, text, containers and
tensors, and no more memory than it has bytes.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections import OrderedDict
from typing import IO, Any

import torch

from reflectron.engine.weights.inert_pickle import ForeignPickle, Made, Name, Outside, Pairs, PickleLimits, parse

_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
)
DTYPES: dict[str, torch.dtype] = {f"torch.{name}": getattr(torch, name) for name in _DTYPES}
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
_CALLED = {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "collections.OrderedDict",
    "_io.BytesIO",
    # How protocol 2 spells bytes, and empty ones.
    "_codecs.encode",
    "__builtin__.bytes",
}
_NAMES = {*DTYPES, *_STORAGES, *_CALLED}
# A file's plain part; tensors lie beside it.
_LIMITS = PickleLimits(bytes=16 << 20, nodes=1_000_000)
_MOST_MEMBERS = 10_000
_DEPTH = 32
_PIECE = 16 << 20


def read_torch_file(stream: IO[bytes] | io.RawIOBase) -> Any:
    """Return the object in a seekable ``stream``: None, bool, numbers, text, bytes, containers, buffers, tensors on the
    CPU.

    Raises:
        ForeignPickle: when it holds anything else, is cut short or of the format before torch 1.6.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            return _TorchFileReader(archive).read()
    except zipfile.BadZipFile as error:
        raise ForeignPickle(f"it is no file of torch.save: {error}") from None
    except ForeignPickle:
        raise
    except (
        NotImplementedError,
        EOFError,
        UnicodeDecodeError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise ForeignPickle(f"it is no file of torch.save: {type(error).__name__}: {error}") from None


class _TorchFileReader:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.members = {member.filename.partition("/")[2]: member for member in archive.infolist()[:_MOST_MEMBERS]}
        self.storages: dict[str, torch.Tensor] = {}
        self.nodes = 0

    def read(self) -> Any:
        if "byteorder" in self.members and bytes(self.bytes_of("byteorder", 16)) != b"little":
            raise ForeignPickle("its byte order is not 'little'")
        return self.plain(parse(bytes(self.bytes_of("data.pkl", _LIMITS.bytes)), _NAMES, _LIMITS))

    def bytes_of(self, name: str, most: int) -> memoryview:
        """Return a member's bytes, of which there are no more than the file has."""
        member = self.members.get(name)
        if member is None:
            raise ForeignPickle(f"it has no member {name[:50]!r}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ForeignPickle(f"its member {name[:50]!r} is compressed")
        if member.file_size > most:
            raise ForeignPickle(f"its member {name[:50]!r} has {member.file_size} bytes, expected at most {most}")
        # The directory may promise what the file does not have.
        self.archive.fp.seek(0, io.SEEK_END)  # type: ignore[union-attr]
        if member.file_size > self.archive.fp.tell():  # type: ignore[union-attr]
            raise ForeignPickle(f"its member {name[:50]!r} is cut short")
        whole = torch.empty(member.file_size, dtype=torch.uint8).numpy().data.cast("B")
        with self.archive.open(member) as source:
            assert isinstance(source, zipfile.ZipExtFile)
            start = 0
            while start < len(whole) and (count := source.readinto(whole[start : start + _PIECE])):
                start += count
        if start < len(whole):
            raise ForeignPickle(f"its member {name[:50]!r} is cut short")
        return whole

    def plain(self, node: Any, depth: int = 0) -> Any:
        """Return what ``node`` stands for."""
        self.nodes += 1
        # The same list, in itself or many times over, costs a file nothing.
        if depth > _DEPTH or self.nodes > _LIMITS.nodes:
            raise ForeignPickle(f"it nests deeper than {_DEPTH} or holds more than {_LIMITS.nodes} objects")
        if isinstance(node, list):
            return [self.plain(item, depth + 1) for item in node]
        if isinstance(node, tuple):
            return tuple(self.plain(item, depth + 1) for item in node)
        if isinstance(node, Pairs):
            return dict(self.items(node.items, depth))
        if isinstance(node, Made):
            return self.made(node, depth)
        if isinstance(node, Name | Outside):
            raise ForeignPickle(f"it holds {getattr(node, 'text', 'a storage')} by itself")
        return node

    def items(self, items: list[tuple[Any, Any]], depth: int) -> list[tuple[Any, Any]]:
        if not all(isinstance(key, str | int | bytes | None) for key, _ in items):
            raise ForeignPickle("a key of a dictionary is neither text nor a number")
        return [(key, self.plain(value, depth + 1)) for key, value in items]

    def made(self, node: Made, depth: int) -> Any:
        match node:
            case Made(name="collections.OrderedDict", args=(), state=None, items=items):
                return OrderedDict(self.items(items, depth))
            case Made(name="_codecs.encode", args=(str(text), "latin1"), state=None):
                return text.encode("latin1", errors="replace")
            case Made(name="__builtin__.bytes", args=(), state=None):
                return b""
            case Made(name="_io.BytesIO", args=(), state=(Made() | bytes() as content, int(), None)):
                return io.BytesIO(content if isinstance(content, bytes) else self._encoded(content))
            case Made(name="torch._utils._rebuild_tensor_v2", args=(Outside() as storage, offset, size, stride, _, _)):
                return self.tensor(storage, offset, size, stride, None)
            case Made(
                name="torch._utils._rebuild_tensor_v3",
                args=(Outside() as storage, offset, size, stride, _, _, Name(text=dtype)),
            ) if dtype in DTYPES:
                return self.tensor(storage, offset, size, stride, DTYPES[dtype])
        raise ForeignPickle(f"it makes a {node.name} of other parts than torch.save writes")

    def _encoded(self, node: Made) -> bytes:
        content = self.made(node, _DEPTH)
        if not isinstance(content, bytes):
            raise ForeignPickle("the content of a buffer is no bytes")
        return content

    def tensor(self, storage: Outside, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """Return a tensor whose places all lie inside its storage, each of them once."""
        match storage.key:
            case ("storage", Name(text=kind), str(key), str(), int()) if kind in _STORAGES:
                dtype = dtype or _STORAGES[kind]
            case _:
                raise ForeignPickle("a storage is described by other parts than torch.save writes")
        if key not in self.storages:
            held = torch.frombuffer(data, dtype=torch.uint8) if (data := self.storage(key)) else torch.empty(0).byte()
            self.storages[key] = held
        held = self.storages[key]
        shapes = all(isinstance(part, tuple) and len(part) < 10 and _counts(part) for part in (size, stride))
        if not shapes or not _counts((offset,)) or len(size) != len(stride):
            raise ForeignPickle("sizes of a tensor are no whole numbers from 0 to 2**40")
        places, room = math.prod(size), len(held) // dtype.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if places and (places > room or last >= room):
            raise ForeignPickle(f"a tensor of sizes {list(size)} does not fit its storage of {len(held)} bytes")
        return torch.empty(0, dtype=dtype).set_(held.untyped_storage(), offset if places else 0, size, stride)

    def storage(self, key: str) -> memoryview:
        """Return the bytes of the storage ``key``."""
        return self.bytes_of(f"data/{key}", 1 << 62)


def _counts(numbers: tuple[Any, ...]) -> bool:
    return all(type(number) is int and 0 <= number <= 1 << 40 for number in numbers)
