"""Plain data comes back as it was, and nothing else is read: not a damaged message, not one that promises too much."""

from __future__ import annotations

import collections
import io
import math
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reflectron.tools.sandbox.plain_data import (
    DataLimits,
    NotData,
    PlainDataError,
    decode,
    encode,
    read_message,
    write_message,
)

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, -(10**5000), 0.0, -0.0, math.inf, -math.inf, math.nan),
    *(5e-324, 1 + 2j, complex(-0.0, math.nan), "", "naïve \x00 \x1b[31m", "lone \ud800\udc00 \udfff", b"", b"\x00\xff"),
    *([], (), {}, set(), frozenset(), bytearray(b"ab"), range(3), range(10, -(2**70), -3)),
    *([1, 2, 3, 2**70], [1.5, -0.0, math.nan, 2], [1, 2.0, 3, -4.5, 2**53], [True, 1, 2, 3], ["a", "", "\ud800", "ß"]),
    *((1, (2, [3, {4: {5}}])), {(1, 2): [3], "a": None, frozenset({1}): {}}, {1.5, "a", None, (1, 2), True}),
    *(collections.Counter("abca"), collections.OrderedDict([(2, 1), (1, 2)]), collections.deque([1, 2], 3)),
    *(np.float64(-0.0), np.int8(-3), np.bool_(True), np.longdouble("1.1"), np.complex64(1 + 2j), np.array(3)),
    *(np.arange(6).reshape(2, 3), np.zeros((0, 5), "f4"), np.array([True, False]), np.array([[1, 2]], ">i2")),
    *(np.array(["a", "bc"]), np.array([1, "a", [2]], dtype=object), [np.float64(1), 2.0, np.int64(3), 4, 5]),
]


def spelt(value: Any) -> str:
    """A text that is the same for values of the same types and content, and for no others."""
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        # Only numbers keep their type of elements: others come as objects.
        dtype = value.dtype.str if value.dtype.kind in "biufc" else "objects"
        return f"{kind} {dtype} {value.shape} {spelt(value.ravel().tolist())}"
    if isinstance(value, dict):
        return f"{kind} {spelt(list(value.items()))}"
    if isinstance(value, set | frozenset):
        return f"{kind} {sorted(map(spelt, value))}"
    if isinstance(value, list | tuple | collections.deque):
        return f"{kind} {getattr(value, 'maxlen', None)} {list(map(spelt, value))}"
    return f"{kind} {value:#x}" if kind == "int" else f"{kind} {value!r}"


def made_up(rng: random.Random, depth: int, *, key: bool = False) -> Any:
    leaves: list[Callable[[], Any]] = [
        *(lambda: None, lambda: rng.random() < 0.5, lambda: rng.randint(-5, 5), lambda: rng.getrandbits(200)),
        *(lambda: rng.gauss(0, 1e9), lambda: rng.choice([math.inf, -0.0]), lambda: complex(rng.random(), 1)),
        *(lambda: "".join(map(chr, rng.choices(range(0xD700, 0xE100), k=3))), lambda: rng.randbytes(4)),
    ]
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(leaves)()
    size = rng.choice([0, 1, 2, 3, 7])

    def several(*, key: bool = key) -> list[Any]:
        if rng.random() < 0.4:
            leaf = rng.choice(leaves)
            return [leaf() for _ in range(size)]
        return [made_up(rng, depth - 1, key=key) for _ in range(size)]

    if key:
        return rng.choice([tuple, frozenset])(several())
    mapping = rng.choice([dict, collections.OrderedDict, collections.Counter])
    return rng.choice(
        [
            lambda: several(),
            lambda: tuple(several()),
            lambda: set(several(key=True)),
            lambda: collections.deque(several(), 100),
            lambda: mapping(dict(zip(several(key=True), several(), strict=False))),
            lambda: np.array(rng.choices(range(100), k=size), rng.choice(["i4", "f8", "u1", "c16", "?"])),
        ]
    )()


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values_come_back(number: int) -> None:
    value = VALUES[number]
    assert spelt(decode(encode(value))) == spelt(value)


def test_made_up_values_come_back() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        value = made_up(rng, 4)
        assert spelt(decode(encode(value))) == spelt(value)


def test_a_stream_of_values() -> None:
    stream = io.BytesIO()
    for value in (1, "a", [None]):
        write_message(stream, value)
    stream.seek(0)
    assert [read_message(stream) for _ in range(3)] == [1, "a", [None]]
    with pytest.raises(EOFError):
        read_message(stream)


class Mine:
    """No data, and a nuisance to whoever asks it anything."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)

    def __eq__(self, other: object) -> bool:
        raise SystemExit

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        raise SystemExit


class Meddling(type):
    """A class that takes itself for every other."""

    def __eq__(cls, other: object) -> bool:
        return True

    def __hash__(cls) -> int:
        return hash(int)

    def __instancecheck__(cls, instance: object) -> bool:
        raise SystemExit

    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise SystemExit


def _meddled(base: type) -> type:
    def refuse(*_: object, **__: object) -> Any:
        raise SystemExit

    names = (
        "__eq__ __iter__ __len__ __getitem__ items keys values __int__ __index__ __float__ __str__ __bytes__ __repr__"
    )
    return Meddling(f"{base.__name__}s", (base,), {**dict.fromkeys(names.split(), refuse), "__hash__": base.__hash__})


@pytest.mark.parametrize("value", [(1, 2), [1], {1: 2}, {1}, frozenset({1}), "ab", b"ab", 3, 1.5, 1j])
def test_an_instance_of_a_subclass_is_its_base(value: Any) -> None:
    back = decode(encode([_meddled(type(value))(value)]))[0]
    assert back == value
    assert value == back
    assert type(back) is not type(value)
    assert isinstance(back, type(value))
    with pytest.raises(TypeError, match="does not change"):
        type(back).__eq__ = lambda *_: True  # type: ignore[method-assign,assignment]
    with pytest.raises((AttributeError, TypeError)):
        back.mark = 1


# By number: pytest asks its parameters for names.
NO_DATA = [Mine(), Mine, len, iter([]), np, np.array([1], "M8[s]")[0], Meddling("M", (), {})()]


@pytest.mark.parametrize("number", range(len(NO_DATA)))
def test_no_data_equals_nothing(number: int) -> None:
    value = NO_DATA[number]
    back = decode(encode([value]))[0]
    assert type(back) is NotData
    assert back != value
    assert back != back
    with pytest.raises(AttributeError):
        back.description = ""


class Numbers(np.ndarray):  # type: ignore[type-arg]
    dtype = shape = None  # type: ignore[assignment]

    def tobytes(self, order: Any = None) -> bytes:
        raise SystemExit


def test_an_array_of_a_subclass_is_an_array() -> None:
    value = np.ndarray.__new__(Numbers, 3, float, np.arange(3.0).tobytes())
    assert decode(encode(value)).tolist() == [0, 1, 2]
    assert decode(encode(np.ma.array([1, 2], mask=[0, 1]))).tolist() == [1, 2]


def _doubled(times: int, kind: Callable[[list[Any]], Any]) -> Any:
    value: Any = ()
    for _ in range(times):
        value = kind([value, value])
    return value


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _cyclic() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


TOO_LARGE = [_cyclic(), _nested(10**4), _doubled(60, tuple), [_doubled(60, list)], 1 << 10**8, "a" * 10**6]


@pytest.mark.parametrize("number", range(len(TOO_LARGE)))
def test_too_large_values_are_not_written(number: int) -> None:
    value = TOO_LARGE[number]
    limits = DataLimits(message_bytes=10**5, nodes=10**4)
    stream = io.BytesIO()
    with pytest.raises(PlainDataError):
        write_message(stream, value, limits)
    assert stream.getvalue() == b""


def _head(mark: bytes, form: int, size: int) -> bytes:
    return struct.pack("<cBQ", mark, form, size)


def _integer(value: int) -> bytes:
    return encode(value)


SAME_HASH = [index * (2**61 - 1) for index in range(20_000)]
MALFORMED = {
    "nothing": b"",
    "no mark": b"?",
    "more behind": encode(1) + b"N",
    "cut": encode([1, "a"])[:-1],
    "long text": b"s" + struct.pack("<Q", 2**60) + b"a",
    "long list": _head(b"l", 0, 2**60) + b"N",
    "long row": _head(b"l", 1, 2**60) + b"N" * 100,
    "long array": encode(np.zeros(3))[:-8] + struct.pack("<q", 2**40),
    "array of a large shape": encode(np.zeros((0, 3))).replace(struct.pack("<Q", 3), struct.pack("<Q", 2**62)),
    "array of objects": encode(np.zeros(3)).replace(b"<f8", b"|O8"),
    "odd truth": encode(np.array([True]))[:-11].replace(b"\x01", b"\x07") + encode(np.array([True]))[-11:],
    "deep": _head(b"l", 0, 1) * 10**5 + b"N",
    "deep instances": b"u" * 10**6,
    "instance of None": b"uN",
    "instance of a truth value": b"uT",
    "instance of an instance": b"uu" + _integer(1),
    "huge integer": b"I" + struct.pack("<Q", 10**7) + b"\x01" * 10**7,
    "no text": b"s" + struct.pack("<Q", 1) + b"\xff",
    "lengths of texts": _head(b"l", 4, 1) + struct.pack("<QQ", 2**63, 1) + b"a",
    "no way": _head(b"l", 9, 1) + b"N",
    "a list as a key": _head(b"S", 0, 1) + encode([]),
    "a key twice": _head(b"S", 1, 2) + struct.pack("<qq", 1, 1),
    "keys of one hash": _head(b"S", 0, len(SAME_HASH)) + b"".join(map(_integer, SAME_HASH)),
    "dict of one hash": b"d"
    + _head(b"t", 0, len(SAME_HASH))
    + b"".join(map(_integer, SAME_HASH))
    + _head(b"t", 0, len(SAME_HASH))
    + b"N" * len(SAME_HASH),
    "fewer values": b"d" + _head(b"t", 0, 1) + b"N" + _head(b"t", 0, 0),
    "a range of text": b"R" + encode("a") * 3,
    "a range without a step": b"R" + _integer(0) * 3,
    "a deque of less than nothing": b"Q" + _integer(-1) + _head(b"l", 0, 0),
    "infinity as an integer": _head(b"l", 3, 1) + struct.pack("<d", math.inf) + b"\x01",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_values_are_refused_at_once(data: bytes) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(PlainDataError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + 10**6
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2


@pytest.mark.parametrize("head", [b"\x01", struct.pack("<Q", 2**60), struct.pack("<Q", 10**8) + b"N", bytes(8)])
def test_malformed_messages_are_refused_at_once(head: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PlainDataError):
            read_message(io.BytesIO(head))
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    finally:
        tracemalloc.stop()


def _damaged(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(damaged) + 1)
        what = rng.randrange(4)
        if what == 0:
            damaged[at : at + 1] = rng.randbytes(1)
        elif what == 1:
            damaged[at:at] = damaged[(start := rng.randrange(len(damaged) + 1)) : start + rng.randrange(20)]
        elif what == 2:
            del damaged[at : at + rng.randrange(10)]
        else:
            damaged[at : at + 8] = struct.pack("<Q", rng.choice([0, 2**32, 2**60, 2**64 - 1, rng.getrandbits(8)]))
    return bytes(damaged)


def _noise(rng: random.Random) -> bytes:
    """Marks in any order."""
    return bytes(rng.choices(b"NTFiIfcsbBRQltSZdOCDuxgAa\x00\x00\x00\x01\x02\x03\x04", k=rng.randrange(200)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_messages_are_values_or_refused() -> None:
    rng = random.Random(2)
    limits = DataLimits(message_bytes=10**5, nodes=2000, depth=20, integer_bits=10**4)
    refused = 0
    for number in range(12_000):
        data = rng.randbytes(rng.randrange(60)) if number % 3 == 0 else _noise(rng)
        if number % 3 == 1:
            data = _damaged(encode(made_up(rng, 3)), rng)
        try:
            value = decode(data, limits)
        except PlainDataError:
            refused += 1
        else:
            # What is read is data, so it can be written.
            encode(value, limits)
    assert 3000 < refused < 12_000
