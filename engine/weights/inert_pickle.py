"""Reads the pickles of strangers without building what they name: nothing is imported, called or changed.

A pickle is a program that may call whatever it can name, and its BUILD sets attributes of whatever it has built,
classes among them. Here the opcodes of plain data run on a stack of inert nodes instead: a name stays a ``Name``, a
call stays a ``Made`` of its name, arguments and state. What they mean is for the reader of one file format to say, who
builds the real objects by hand. Other opcodes, names that the format has no use for, and sizes beyond ``Limits`` are
refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from reflectron.engine.files import printable

# What CPython writes from 3.8 to 3.14, and torch.save.
_PROTOCOLS = range(2, 6)


class ForeignPickle(ValueError):
    """What a file holds that its format has no use for."""


@dataclass(frozen=True)
class Name:
    """A class or function that the file names; never looked up."""

    text: str
    """Module and name with a dot between."""


@dataclass(eq=False)
class Pairs:
    """A dictionary, whose keys are not hashed: that alone may take for ever."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Made:
    """What a call or a class with arguments would have made."""

    name: str
    args: Any
    state: Any = None
    """What BUILD would have given it."""
    items: list[tuple[Any, Any]] = field(default_factory=list)
    """Keys and values, where it is a kind of dictionary."""


@dataclass(frozen=True, eq=False)
class Outside:
    """A reference to what lies outside of the pickle, as a tensor's bytes do."""

    key: Any


@dataclass(frozen=True)
class PickleLimits:
    """How much is read at most; real files of the largest models stay far below."""

    bytes: int = 128 << 20
    nodes: int = 8_000_000
    """Objects made."""
    stack: int = 100_000


def parse(data: bytes, names: Collection[str], limits: PickleLimits) -> Any:
    """Return the one object of a pickle, of None, bool, int, float, str, bytes, tuples, lists and the nodes above.

    Args:
        data: the whole pickle; bytes after its end are refused.
        names: which it may name, ``module.name``.
        limits: how much is read.

    Raises:
        ForeignPickle: in one line, when it is cut short, too large or no plain data.
    """
    if len(data) > limits.bytes:
        raise ForeignPickle(f"it has {len(data)} bytes, expected at most {limits.bytes}")
    machine = _Machine(data, frozenset(names), limits)
    return machine.run()


class _Machine:
    def __init__(self, data: bytes, names: frozenset[str], limits: PickleLimits) -> None:
        self.data, self.names, self.limits = data, names, limits
        self.at = self.nodes = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        """Heights of the stack; what lies below the last one is out of reach."""
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            action = _ACTIONS.get(code)
            if action is None:
                raise ForeignPickle(f"opcode {code!r} at byte {self.at - 1} is none of plain data")
            action(self)
        result = self.pop()
        if self.stack or self.marks or self.at != len(self.data):
            raise ForeignPickle(f"more follows after its end at byte {self.at}")
        return result

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise ForeignPickle(f"it is cut short: byte {self.at} should be followed by {count}")
        self.at += count
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def push(self, value: Any) -> None:
        self.nodes += 1
        if self.nodes > self.limits.nodes or len(self.stack) >= self.limits.stack:
            raise ForeignPickle(f"it makes more than {self.limits.nodes} objects or nests too many of them")
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ForeignPickle(f"opcode at byte {self.at - 1} finds nothing to work on")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ForeignPickle(f"opcode at byte {self.at - 1} finds no mark")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def top(self, kind: type[Any] | tuple[type[Any], ...]) -> Any:
        value = self.pop()
        if not isinstance(value, kind):
            raise ForeignPickle(f"opcode at byte {self.at - 1} finds {_kind(value)}, on which it cannot work")
        self.stack.append(value)
        return value

    def pop_name(self) -> str:
        value = self.pop()
        if not isinstance(value, Name):
            raise ForeignPickle(f"it calls {_kind(value)}, expected a name")
        return value.text

    # What opcodes do --------------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        if (version := self.number("B")) not in _PROTOCOLS:
            raise ForeignPickle(f"it has protocol {version}, expected {_PROTOCOLS[0]} to {_PROTOCOLS[-1]}")

    def mark(self) -> None:
        if len(self.marks) >= self.limits.stack:
            raise ForeignPickle("it nests too deep")
        self.marks.append(len(self.stack))

    def text(self, layout: str) -> None:
        piece = self.take(self.number(layout))
        try:
            self.push(piece.decode())
        except UnicodeDecodeError:
            raise ForeignPickle(f"the text before byte {self.at} is no UTF-8") from None

    def name(self, module: Any, name: Any) -> None:
        text = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "what is no name"
        if text not in self.names:
            raise ForeignPickle(f"it names {printable(text, 100)}, which a file of this kind has no use for")
        self.push(Name(text))

    def global_line(self) -> None:
        lines = []
        for _ in range(2):
            # Longer than every name that is allowed.
            end = self.data.find(b"\n", self.at, self.at + 200)
            if end < 0:
                raise ForeignPickle(f"the name at byte {self.at} has no end")
            lines.append(self.take(end - self.at + 1)[:-1].decode("latin-1"))
        self.name(*lines)

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def make(self) -> None:
        args = self.pop()
        self.push(Made(self.pop_name(), args))

    def build(self) -> None:
        state = self.pop()
        self.top(Made).state = state

    def outside(self) -> None:
        self.push(Outside(self.pop()))

    def memoize(self, key: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[key] = value

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise ForeignPickle(f"it recalls object {key}, which it has not made")
        self.push(self.memo[key])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ForeignPickle(f"a key before byte {self.at} has no value")
        self.top((Pairs, Made)).items.extend(zip(items[::2], items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])


def _kind(value: Any) -> str:
    return value.text if isinstance(value, Name) else type(value).__name__


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": lambda machine: machine.number("<Q"),  # a frame's length
    b"(": _Machine.mark,
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"K": lambda machine: machine.push(machine.number("B")),
    b"M": lambda machine: machine.push(machine.number("<H")),
    b"J": lambda machine: machine.push(machine.number("<i")),
    b"\x8a": lambda machine: machine.push(int.from_bytes(machine.take(machine.number("B")), "little", signed=True)),
    b"G": lambda machine: machine.push(machine.number(">d")),
    b"\x8c": lambda machine: machine.text("B"),
    b"X": lambda machine: machine.text("<I"),
    b"C": lambda machine: machine.push(machine.take(machine.number("B"))),
    b"B": lambda machine: machine.push(machine.take(machine.number("<I"))),
    b"]": lambda machine: machine.push([]),
    b"a": lambda machine: machine.extend([machine.pop()]),
    b"e": lambda machine: machine.extend(machine.pop_to_mark()),
    b"}": lambda machine: machine.push(Pairs()),
    b"s": _Machine.set_item,
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),
    b")": lambda machine: machine.push(()),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    b"c": _Machine.global_line,
    b"\x93": _Machine.stack_name,
    b"R": _Machine.make,
    b"\x81": _Machine.make,
    b"b": _Machine.build,
    b"Q": _Machine.outside,
    b"q": lambda machine: machine.memoize(machine.number("B")),
    b"r": lambda machine: machine.memoize(machine.number("<I")),
    b"\x94": lambda machine: machine.memoize(len(machine.memo)),
    b"h": lambda machine: machine.recall(machine.number("B")),
    b"j": lambda machine: machine.recall(machine.number("<I")),
}
