"""The table of operations that problems are composed of: how a task says each, and the line of Python that does it.

A problem reads its argument into a list ``xs``, takes one or two steps over it and returns one value. ``$k`` stands for
a constant. Every line is written as ``ast.unparse`` writes it, so that a changed program differs from it in the change
alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_WORDS = ("apple", "river", "stone", "tea", "maple", "piano", "an", "robot", "sea", "garden", "ox", "winter", "banana")
_SMALL = tuple(str(k) for k in range(2, 10))
_LETTERS = tuple("aeinrst")
_MARKS = tuple("-+.:")


@dataclass(frozen=True)
class Source:
    """What a function is given, and how it becomes the list ``xs``."""

    name: str
    parameter: str
    phrases: tuple[str, ...]
    line: str
    """Empty where the argument is the list."""
    kind: str
    """Of the list's elements: int or str."""
    draw: Callable[[random.Random], object]
    """An argument."""


@dataclass(frozen=True)
class Operation:
    """A step from list to list, or what is returned."""

    name: str
    takes: str
    """Kind of the list's elements: int, str, or any."""
    gives: str
    """Kind of the elements afterwards: int, str, or same; of a returned value always same."""
    phrases: tuple[str, ...]
    line: str
    constants: tuple[str, ...] = ()

    def fits(self, kind: str) -> bool:
        """Whether it can follow where the list has elements of ``kind``."""
        return self.takes in (kind, "any")

    def kind_after(self, kind: str) -> str:
        """Kind of the elements that it leaves."""
        return kind if self.gives == "same" else self.gives


def _integers(rng: random.Random) -> list[int]:
    return [rng.choice((rng.randint(-9, 12), rng.randint(0, 40))) for _ in range(rng.randint(0, 7))]


def _strings(rng: random.Random) -> list[str]:
    return [rng.choice(_WORDS) for _ in range(rng.randint(0, 6))]


SOURCES = (
    Source("integers", "xs", ("the numbers in xs", "the list xs of integers"), "", "int", _integers),
    Source(
        "digits",
        "n",
        ("the digits of n", "each digit of n"),
        "xs = [int(d) for d in str(n)]",
        "int",
        lambda rng: rng.choice((rng.randint(0, 99), rng.randint(1000, 9999999))),
    ),
    Source(
        "count",
        "n",
        ("the numbers from 1 to n", "1, 2 and so on up to n"),
        "xs = list(range(1, n + 1))",
        "int",
        lambda rng: rng.randint(0, 25),
    ),
    Source("strings", "xs", ("the strings in xs", "the list xs of words"), "", "str", _strings),
    Source(
        "words",
        "s",
        ("the words of s", "each word in s"),
        "xs = s.split()",
        "str",
        lambda rng: " ".join(_strings(rng)),
    ),
)


def _each(name: str, takes: str, phrases: tuple[str, ...], value: str, constants: tuple[str, ...] = ()) -> Operation:
    return Operation(name, takes, "same", phrases, f"xs = [{value} for x in xs]", constants)


def _keep(name: str, takes: str, phrases: tuple[str, ...], test: str, constants: tuple[str, ...]) -> Operation:
    return Operation(name, takes, "same", phrases, f"xs = [x for x in xs if {test}]", constants)


def _whole(name: str, phrases: tuple[str, ...], value: str, constants: tuple[str, ...] = ()) -> Operation:
    return Operation(name, "any", "same", phrases, f"xs = {value}", constants)


STEPS = (
    _keep("keep_multiples", "int", ("keep the multiples of $k", "keep what $k divides"), "x % $k == 0", _SMALL),
    _keep("drop_multiples", "int", ("drop the multiples of $k", "leave out what $k divides"), "x % $k != 0", _SMALL),
    _keep("keep_above", "int", ("keep those above $k", "keep what is greater than $k"), "x > $k", _SMALL),
    _keep("keep_below", "int", ("keep those below $k", "keep what is less than $k"), "x < $k", _SMALL),
    _keep(
        "keep_longer", "str", ("keep those longer than $k", "drop those of up to $k letters"), "len(x) > $k", _SMALL[:4]
    ),
    _keep(
        "keep_shorter",
        "str",
        ("keep those shorter than $k", "drop those of $k letters or more"),
        "len(x) < $k",
        _SMALL[2:5],
    ),
    _keep("keep_with", "str", ("keep those with the letter $k", "keep what contains $k"), "'$k' in x", _LETTERS),
    _keep(
        "keep_without", "str", ("keep those without the letter $k", "drop what contains $k"), "'$k' not in x", _LETTERS
    ),
    _each("add", "int", ("add $k to each", "increase each by $k"), "x + $k", _SMALL),
    _each("subtract", "int", ("subtract $k from each", "decrease each by $k"), "x - $k", _SMALL),
    _each("multiply", "int", ("multiply each by $k", "take $k times each"), "x * $k", _SMALL),
    _each("modulo", "int", ("take each modulo $k", "take the remainder of each by $k"), "x % $k", _SMALL),
    _each("divide", "int", ("divide each by $k and round down", "take how often $k fits in each"), "x // $k", _SMALL),
    _each("square", "int", ("square each", "multiply each by itself"), "x ** 2"),
    _each("negate", "int", ("negate each", "change the sign of each"), "-x"),
    _each(
        "distance", "int", ("take the distance of each from $k", "take how far each is from $k"), "abs(x - $k)", _SMALL
    ),
    _each("upper", "str", ("write each in capitals", "turn each into upper case"), "x.upper()"),
    _each("backwards", "str", ("write each backwards", "reverse the letters of each"), "x[::-1]"),
    _each("start", "str", ("cut each to $k letters", "keep the first $k letters of each"), "x[:$k]", _SMALL[:3]),
    _each("append", "str", ("append $k to each", "put $k behind each"), "x + '$k'", _MARKS),
    _each("prepend", "str", ("put $k before each", "let each begin with $k"), "'$k' + x", _MARKS),
    _each("repeat", "str", ("repeat each $k times", "write each $k times over"), "x * $k", _SMALL[:3]),
    Operation(
        "lengths", "str", "int", ("take the length of each", "count the letters of each"), "xs = [len(x) for x in xs]"
    ),
    Operation(
        "counts",
        "str",
        "int",
        ("count $k in each", "take how often $k is in each"),
        "xs = [x.count('$k') for x in xs]",
        _LETTERS,
    ),
    _whole("sort", ("sort them", "put them in ascending order"), "sorted(xs)"),
    _whole("sort_down", ("sort them in reverse", "put them in descending order"), "sorted(xs, reverse=True)"),
    _whole("turn", ("reverse the list", "turn their order around"), "xs[::-1]"),
    _whole("first", ("take the first $k", "keep only the first $k"), "xs[:$k]", _SMALL[:4]),
    _whole("skip", ("skip the first $k", "leave out the first $k"), "xs[$k:]", _SMALL[:3]),
    _whole("every", ("take one in $k", "keep every place divisible by $k"), "xs[::$k]", _SMALL[:2]),
    _whole("unique", ("remove repeats", "keep each value once"), "list(dict.fromkeys(xs))"),
)


def _value(name: str, takes: str, phrases: tuple[str, ...], value: str, constants: tuple[str, ...] = ()) -> Operation:
    return Operation(name, takes, "same", phrases, f"return {value}", constants)


RESULTS = (
    _value("list", "any", ("the list", "what remains"), "xs"),
    _value("count", "any", ("how many there are", "their number"), "len(xs)"),
    _value("last", "any", ("the last in a list", "a list of the last one"), "xs[-1:]"),
    _value("sum", "int", ("their sum", "the total"), "sum(xs)"),
    _value("max", "int", ("the largest or $k", "the maximum, $k if none"), "max(xs, default=$k)", _SMALL),
    _value("min", "int", ("the smallest or $k", "the minimum, $k if none"), "min(xs, default=$k)", _SMALL),
    _value("occurrences", "int", ("how many are $k", "how often $k occurs"), "xs.count($k)", _SMALL),
    _value(
        "any_above",
        "int",
        ("whether any is above $k", "if one is greater than $k"),
        "any((x > $k for x in xs))",
        _SMALL,
    ),
    _value(
        "all_below", "int", ("whether all are below $k", "if each is less than $k"), "all((x < $k for x in xs))", _SMALL
    ),
    _value(
        "text", "int", ("them as text with $k between", "one string, joined by $k"), "'$k'.join(map(str, xs))", _MARKS
    ),
    _value("join", "str", ("them joined by $k", "one string with $k between"), "'$k'.join(xs)", _MARKS),
    _value("letters", "str", ("their total length", "how many letters they have"), "sum(map(len, xs))"),
    _value("longest", "str", ("the longest or nothing", "the one of most letters"), "max(xs, key=len, default='')"),
    _value(
        "member",
        "str",
        ("the places of $k in their text", "how often $k is in all"),
        "''.join(xs).count('$k')",
        _LETTERS,
    ),
)
