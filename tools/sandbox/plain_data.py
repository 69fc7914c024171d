"""Values as bytes and back: how arguments, answers and verdicts cross between processes that do not trust each other.

Only plain data crosses: what Python's literals can say, collections, numpy's numbers, and marks for "an instance of a
subclass of" and "not data". Reading runs no code that the bytes could name, sets no attribute, and checks every length
against `DataLimits` and against the bytes at hand before memory is taken for it. Writing calls no method that a value's
class may have overridden. A value is a tree: an object that occurs twice is written twice, so that what expands beyond
the limits is refused where it is written.

This file needs nothing but the standard library (and numpy, where arrays are met): a copy of it works alone, inside a
sandbox.
"""

from __future__ import annotations

import collections
import re
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import compress
from math import prod
from typing import Any, BinaryIO, NoReturn

FORMAT_VERSION = 1
"""Changes with the format: part of the name of whatever is kept in it."""

_HEAD, _COUNT, _NUMBER, _FLOAT, _COMPLEX = (struct.Struct(f"<{code}") for code in ("cBQ", "Q", "q", "d", "dd"))
_CHUNK_BYTES = 1 << 20
# A set or dict whose elements all have one hash takes quadratic time to build; honest ones hardly repeat any.
_EQUAL_HASHES = 64
_DESCRIPTION_CHARACTERS = 100
_NUMPY_NUMBER = re.compile(r"[<>|][biufc](?:1|2|4|8|16|32)")


class PlainDataError(ValueError):
    """Says that a value is too large to be written, or that bytes are no value."""


@dataclass(frozen=True)
class DataLimits:
    """Limits what one value may take."""

    message_bytes: int = 256 << 20
    """Written."""
    nodes: int = 1 << 22
    """Values in it, each element of a container being one."""
    depth: int = 100
    """Containers inside one another."""
    integer_bits: int = 1 << 24
    """Bits of one integer."""


DEFAULT_LIMITS = DataLimits()


class NotData:
    """Stands for a value that was no data; equal to nothing, not even to itself."""

    __slots__ = ("description",)
    description: str

    def __init__(self, description: str) -> None:
        object.__setattr__(self, "description", description[:_DESCRIPTION_CHARACTERS])

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("what stands for no data does not change")

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.description}: not plain data>"


class _Unchangeable(type):
    """The type of classes that nobody can set an attribute of."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} does not change")

    def __delattr__(cls, name: str) -> NoReturn:
        raise TypeError(f"{cls.__name__} does not change")


_BASES: tuple[type, ...] = (tuple, list, dict, set, frozenset, str, bytes, int, float, complex)
_SUBCLASSES: dict[type, type] = {
    base: _Unchangeable(f"subclass of {base.__name__}", (base,), {"__slots__": ()}) for base in _BASES
}
# The mark in front of each kind of value, and of the ways to write the elements of a container.
_SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z"}
_MAPPINGS: dict[type, bytes] = {
    dict: b"d",
    collections.OrderedDict: b"O",
    collections.Counter: b"C",
    collections.defaultdict: b"D",
}
_ONE_BY_ONE, _INTEGERS, _FLOATS, _NUMBERS, _TEXTS = range(5)
# Integers below this are floats without loss.
_EXACT = 1 << 53
# Shorter rows gain nothing from being written at once.
_ROW = 4


def encode(value: object, limits: DataLimits = DEFAULT_LIMITS) -> bytes:
    """Return ``value`` as bytes.

    Raises:
        PlainDataError: when it is larger than the limits, which includes what contains itself.
    """
    writer = _Writer(limits)
    writer.write(value, 0)
    return bytes(writer.out)


def decode(data: bytes | bytearray | memoryview, limits: DataLimits = DEFAULT_LIMITS) -> Any:
    """Return what ``encode`` was given, of the same types; a ``defaultdict`` comes without its factory.

    Raises:
        PlainDataError: when ``data`` is anything else.
    """
    if len(data) > limits.message_bytes:
        raise PlainDataError(f"a value of {len(data)} bytes, expected at most {limits.message_bytes}")
    reader = _DataReader(memoryview(data), limits)
    try:
        value = reader.read(0)
    except (TypeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, PlainDataError) else PlainDataError(f"no value: {error}") from None
    if reader.at != len(data):
        raise PlainDataError(f"{len(data) - reader.at} bytes follow the value")
    return value


def write_message(stream: BinaryIO, value: object, limits: DataLimits = DEFAULT_LIMITS) -> None:
    """Write ``value`` with its length in front, for ``read_message``.

    Raises:
        PlainDataError: as ``encode`` does, with nothing written.
    """
    data = encode(value, limits)
    stream.write(_COUNT.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_message(stream: BinaryIO, limits: DataLimits = DEFAULT_LIMITS) -> Any:
    """Return the next value of a buffered stream.

    Raises:
        EOFError: where the stream ends between two values.
        PlainDataError: when something else was written, or half a value.
    """
    head = _read_all(stream, _COUNT.size)
    if not head:
        raise EOFError("no further value")
    if len(head) < _COUNT.size:
        raise PlainDataError("the length of a value is cut short")
    (size,) = _COUNT.unpack(head)
    if size > limits.message_bytes:
        raise PlainDataError(f"a value of {size} bytes, expected at most {limits.message_bytes}")
    data = _read_all(stream, size)
    if len(data) < size:
        raise PlainDataError(f"a value of {size} bytes is cut short after {len(data)}")
    return decode(data, limits)


def _read_all(stream: BinaryIO, size: int) -> bytearray:
    """Read ``size`` bytes, less at the stream's end; no memory is taken for promised bytes before they arrive."""
    data = bytearray()
    while len(data) < size and (chunk := stream.read(min(size - len(data), _CHUNK_BYTES))):
        data += chunk
    return data


class _Writer:
    """Appends values to ``out`` as long as the limits allow."""

    def __init__(self, limits: DataLimits) -> None:
        self.out = bytearray()
        self._limits, self._nodes = limits, limits.nodes
        # By identity: a class may claim to equal another.
        self._writers: dict[int, Callable[[Any, int], None]] = {
            id(type(None)): lambda *_: self._add(b"N"),
            id(bool): lambda value, _: self._add(b"T" if value else b"F"),
            id(int): lambda value, _: self._integer(value),
            id(float): lambda value, _: self._add(b"f" + _FLOAT.pack(value)),
            id(complex): lambda value, _: self._add(b"c" + _COMPLEX.pack(value.real, value.imag)),
            id(str): lambda value, _: self._text(b"s", value),
            id(bytes): lambda value, _: self._content(b"b", value),
            id(bytearray): lambda value, _: self._content(b"B", value),
            id(range): self._range,
            id(collections.deque): self._deque,
            **{id(kind): self._sequence for kind in _SEQUENCES},
            **{id(kind): self._mapping for kind in _MAPPINGS},
            id(NotData): lambda value, _: self._text(b"x", value.description),
        }

    def write(self, value: Any, depth: int) -> None:
        self._take(1, depth)
        kind = type(value)
        writer = self._writers.get(id(kind))
        if writer is not None:
            writer(value, depth)
        else:
            self._foreign(value, kind, depth)

    def _take(self, nodes: int, depth: int) -> None:
        self._nodes -= nodes
        if self._nodes < 0:
            raise PlainDataError(f"more than {self._limits.nodes} values in one another")
        if depth > self._limits.depth:
            raise PlainDataError(f"values more than {self._limits.depth} deep in one another")

    def _room(self, size: int) -> None:
        if len(self.out) + size > self._limits.message_bytes:
            raise PlainDataError(f"a value of more than {self._limits.message_bytes} bytes")

    def _add(self, data: bytes | memoryview | array[Any]) -> None:
        self._room(memoryview(data).nbytes)
        self.out += data

    def _content(self, mark: bytes, data: bytes | bytearray) -> None:
        self._add(mark + _COUNT.pack(len(data)))
        self._add(memoryview(data))

    def _text(self, mark: bytes, text: str) -> None:
        self._room(len(text))
        self._content(mark, text.encode("utf-8", "surrogatepass"))

    def _integer(self, value: int) -> None:
        bits = value.bit_length()
        if bits < 64:
            self._add(b"i" + _NUMBER.pack(value))
            return
        if bits > self._limits.integer_bits:
            raise PlainDataError(f"an integer of {bits} bits, expected at most {self._limits.integer_bits}")
        self._content(b"I", value.to_bytes(bits // 8 + 1, "little", signed=True))

    def _range(self, value: range, depth: int) -> None:
        self._add(b"R")
        for part in (value.start, value.stop, value.step):
            self.write(part, depth + 1)

    def _deque(self, value: collections.deque[Any], depth: int) -> None:
        self._add(b"Q")
        self.write(value.maxlen, depth + 1)
        self._elements(b"l", list(value), depth)

    def _sequence(self, value: Iterable[Any], depth: int) -> None:
        self._elements(_SEQUENCES[type(value)], value if type(value) in (list, tuple) else list(value), depth)

    def _mapping(self, value: Any, depth: int) -> None:
        kind = type(value)
        base: Any = kind if kind is collections.OrderedDict else dict
        self._add(_MAPPINGS[kind])
        for part in (base.keys(value), base.values(value)):
            self._elements(b"t", list(part), depth)

    def _elements(self, mark: bytes, values: Any, depth: int) -> None:
        """Read the elements of a container, at once where all are of a kind that allows it."""
        size = len(values)
        self._take(size, depth)
        form, rows = _as_rows(values) if size >= _ROW else (_ONE_BY_ONE, ())
        self._add(_HEAD.pack(mark, form, size))
        if form != _ONE_BY_ONE:
            for row in rows:
                self._add(row)
            return
        self._nodes += size
        for value in values:
            self.write(value, depth + 1)

    def _foreign(self, value: Any, kind: type, depth: int) -> None:
        """Write what is of no class that is written as it is: numpy's, a subclass's instance, or no data."""
        # Asked of `type` itself: a class may have properties of these names.
        ancestors = _ancestors(kind)
        numpy = sys.modules.get("numpy")
        if numpy is not None and any(base is numpy.ndarray for base in ancestors):
            self._array(numpy.ndarray.view(value, numpy.ndarray), depth)
            return
        if numpy is not None and any(kind is known for known in numpy.sctypeDict.values()) and _is_number(value.dtype):
            self._text(b"g", value.dtype.str)
            self._content(b"", value.tobytes())
            return
        for base in _BASES:
            if any(ancestor is base for ancestor in ancestors):
                self._add(b"u")
                self.write(_AS_BASE[base](value), depth + 1)
                return
        self._text(b"x", _name(kind)[:_DESCRIPTION_CHARACTERS])

    def _array(self, value: Any, depth: int) -> None:
        if _is_number(value.dtype):
            self._room(value.nbytes)
            self._text(b"A", value.dtype.str)
            self._content(b"", value.tobytes())
        else:
            self._elements_of_array(value, depth)
        self._elements(b"t", value.shape, depth)

    def _elements_of_array(self, value: Any, depth: int) -> None:
        self._add(b"a")
        self._take(value.size, depth)
        self._nodes += value.size
        self._elements(b"l", [value.item(index) for index in range(value.size)], depth)


def _as_rows(values: Any) -> tuple[int, tuple[Any, ...]]:
    """Return how the elements of a list or tuple are written at once, and the rows; one by one where they are mixed."""
    kinds = set(map(id, map(type, values)))
    try:
        if kinds == {id(int)}:
            return _INTEGERS, (_little(array("q", values)),)
        if kinds == {id(float)}:
            return _FLOATS, (_little(array("d", values)),)
    except OverflowError:
        return _ONE_BY_ONE, ()
    if kinds == {id(int), id(float)}:
        whole = bytes([type(value) is int for value in values])
        if all(-_EXACT < value < _EXACT for value in compress(values, whole)):
            return _NUMBERS, (_little(array("d", values)), whole)
    if kinds == {id(str)}:
        content = "".join(values).encode("utf-8", "surrogatepass")
        return _TEXTS, (_little(array("Q", map(len, values))), _COUNT.pack(len(content)), content)
    return _ONE_BY_ONE, ()


def _little(row: array[Any]) -> array[Any]:
    """Return the row in the byte order of the format."""
    if sys.byteorder == "big":
        row.byteswap()
    return row


def _is_number(dtype: Any) -> bool:
    return _NUMPY_NUMBER.fullmatch(dtype.str) is not None


_ancestors: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
_name: Callable[[type], str] = type.__dict__["__name__"].__get__
# What an instance of a subclass holds, by the base's own methods.
_AS_BASE: dict[type, Callable[[Any], Any]] = {
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    int: int.__int__,
    float: float.__float__,
    complex: complex.__pos__,
}


class _DataReader:
    """Reads values from ``data``, beginning ``at`` a position."""

    def __init__(self, data: memoryview, limits: DataLimits) -> None:
        self.at = 0
        self._data, self._limits, self._nodes = data, limits, limits.nodes
        self._readers: dict[int, Callable[[int], Any]] = {
            ord("N"): lambda _: None,
            ord("T"): lambda _: True,
            ord("F"): lambda _: False,
            ord("i"): lambda _: _NUMBER.unpack(self._take(_NUMBER.size))[0],
            ord("I"): lambda _: self._integer(),
            ord("f"): lambda _: _FLOAT.unpack(self._take(_FLOAT.size))[0],
            ord("c"): lambda _: complex(*_COMPLEX.unpack(self._take(_COMPLEX.size))),
            ord("s"): lambda _: self._text(),
            ord("b"): lambda _: bytes(self._content()),
            ord("B"): lambda _: bytearray(self._content()),
            ord("R"): lambda depth: range(*(self._whole_number(depth) for _ in range(3))),
            ord("Q"): self._deque,
            **{mark[0]: self._reader_of(kind, mark) for kind, mark in _SEQUENCES.items()},
            **{mark[0]: self._mapping_reader(kind) for kind, mark in _MAPPINGS.items()},
            ord("u"): self._instance,
            ord("x"): lambda _: NotData(self._text()),
            ord("g"): lambda _: self._scalar(),
            ord("A"): self._array,
            ord("a"): self._array_of_values,
        }

    def read(self, depth: int) -> Any:
        self._count(1, depth)
        mark = self._take(1)[0]
        reader = self._readers.get(mark)
        if reader is None:
            raise PlainDataError(f"{mark:#x} begins no value")
        return reader(depth)

    def _count(self, nodes: int, depth: int) -> None:
        self._nodes -= nodes
        if self._nodes < 0:
            raise PlainDataError(f"more than {self._limits.nodes} values in one another")
        if depth > self._limits.depth:
            raise PlainDataError(f"values more than {self._limits.depth} deep in one another")

    def _take(self, size: int) -> memoryview:
        start, self.at = self.at, self.at + size
        if self.at > len(self._data):
            raise PlainDataError(f"{size} bytes are promised, {len(self._data) - start} are there")
        return self._data[start : self.at]

    def _size(self) -> int:
        return int(_COUNT.unpack(self._take(_COUNT.size))[0])

    def _content(self) -> memoryview:
        return self._take(self._size())

    def _text(self) -> str:
        return str(self._content(), "utf-8", "surrogatepass")

    def _integer(self) -> int:
        content = self._content()
        # A byte more, for the sign.
        if 8 * len(content) > self._limits.integer_bits + 8:
            raise PlainDataError(
                f"an integer of {len(content)} bytes, expected {self._limits.integer_bits} bits at most"
            )
        return int.from_bytes(content, "little", signed=True)

    def _whole_number(self, depth: int) -> int:
        value = self.read(depth + 1)
        if type(value) is not int:
            raise PlainDataError("a bound of a range is no integer")
        return value

    def _elements(self, expected: bytes, depth: int) -> list[Any]:
        mark, form, size = _HEAD.unpack(self._take(_HEAD.size))
        if mark != expected:
            raise PlainDataError(f"{mark!r} where {expected!r} was to come")
        # Every element takes a byte at least.
        if size > len(self._data) - self.at:
            raise PlainDataError(f"{size} elements are promised, {len(self._data) - self.at} bytes are there")
        if form == _ONE_BY_ONE:
            return [self.read(depth + 1) for _ in range(size)]
        self._count(size, depth)
        if form == _INTEGERS:
            return self._row("q", size).tolist()
        if form == _FLOATS:
            return self._row("d", size).tolist()
        if form == _NUMBERS:
            values, whole = self._row("d", size).tolist(), self._take(size)
            return [int(value) if is_whole else value for value, is_whole in zip(values, whole, strict=True)]
        if form == _TEXTS:
            return self._texts(size)
        raise PlainDataError(f"{form} is no way to write elements")

    def _row(self, code: str, size: int) -> array[Any]:
        row = array(code)
        row.frombytes(self._take(size * row.itemsize))
        return _little(row)

    def _texts(self, size: int) -> list[str]:
        lengths, joined = self._row("Q", size), self._text()
        if sum(lengths) != len(joined):
            raise PlainDataError("texts of other lengths than is said")
        texts, start = [], 0
        for length in lengths:
            texts.append(joined[start : start + length])
            start += length
        return texts

    def _reader_of(self, kind: type, mark: bytes) -> Callable[[int], Any]:
        def read(depth: int) -> Any:
            # The mark is part of the elements' head.
            self.at -= 1
            elements = self._elements(mark, depth)
            if kind in (list, tuple):
                return kind(elements)
            _check_distinct(elements)
            return _distinct(kind(elements), len(elements))

        return read

    def _mapping_reader(self, kind: Any) -> Callable[[int], Any]:
        def read(depth: int) -> Any:
            keys, values = self._elements(b"t", depth), self._elements(b"t", depth)
            _check_distinct(keys)
            found = dict(zip(keys, values, strict=True))
            _distinct(found, len(keys))
            return found if kind is dict else kind(None, found) if kind is collections.defaultdict else kind(found)

        return read

    def _deque(self, depth: int) -> collections.deque[Any]:
        most = self.read(depth + 1)
        if most is not None and (type(most) is not int or most < 0):
            raise PlainDataError("the length of a deque is no count")
        return collections.deque(self._elements(b"l", depth), most)

    def _instance(self, depth: int) -> Any:
        value = self.read(depth + 1)
        if type(value) not in _SUBCLASSES:
            raise PlainDataError(f"an instance of a subclass of {type(value).__name__}")
        return _SUBCLASSES[type(value)](value)

    def _dtype(self) -> Any:
        import numpy

        name = self._text()
        if not _NUMPY_NUMBER.fullmatch(name):
            raise PlainDataError("an array of something else than numbers")
        return numpy.dtype(name)

    def _scalar(self) -> Any:
        dtype, content = self._dtype(), self._content()
        if len(content) != dtype.itemsize:
            raise PlainDataError("a number of another size than its type's")
        return self._numbers(dtype, content, ())[()]

    def _array(self, depth: int) -> Any:
        dtype, content = self._dtype(), self._content()
        shape = self._shape(depth)
        if prod(shape) * dtype.itemsize != len(content):
            raise PlainDataError("an array of another size than its shape's")
        return self._numbers(dtype, content, shape)

    def _numbers(self, dtype: Any, content: memoryview, shape: tuple[int, ...]) -> Any:
        import numpy

        if dtype.kind == "b" and any(value > 1 for value in content):
            raise PlainDataError("a truth value that is neither")
        # A copy may be written to and is aligned.
        return numpy.ndarray(shape, dtype, bytes(content)).copy()

    def _array_of_values(self, depth: int) -> Any:
        import numpy

        values, shape = self._elements(b"l", depth), self._shape(depth)
        if prod(shape) != len(values):
            raise PlainDataError("an array of another size than its shape's")
        flat = numpy.empty(len(values), dtype=object)
        for index, value in enumerate(values):
            flat[index] = value
        return flat.reshape(shape)

    def _shape(self, depth: int) -> tuple[int, ...]:
        shape = self._elements(b"t", depth)
        if len(shape) > 32 or not all(type(size) is int and size >= 0 for size in shape):
            raise PlainDataError("a shape that is no list of sizes")
        return tuple(shape)


def _check_distinct(keys: list[Any]) -> None:
    """Reject keys that would take quadratic time to compare."""
    if len(keys) > _EQUAL_HASHES:
        # Hashes as keys are as different as they are themselves.
        most = max(collections.Counter(map(hash, keys)).values())
        if most > _EQUAL_HASHES:
            raise PlainDataError(f"{most} keys of the same hash")


def _distinct(container: Any, size: int) -> Any:
    if len(container) != size:
        raise PlainDataError(f"{size - len(container)} keys come twice")
    return container
