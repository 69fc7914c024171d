"""Composes random problems: a task in words, its function, and faulty versions of that.

Problems are split by composition: some pairs of operations that follow each other are held out. No training problem
holds such a pair, every held-out problem does, and each operation occurs in both.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from string import Template

from operations import RESULTS, SOURCES, STEPS, Operation, Source

from reflectron.tools.data.reflection.programs import mutants

HELD_OUT_SHARE = 0.15
"""Of the pairs of operations."""
_NAMES = ("f", "solve", "work", "answer")
_MUTATIONS = ("comparison", "constant", "arithmetic")
"""Changes that a programmer might make by mistake."""
_FIRST_MUTANTS = 8

Pair = tuple[str, str]


@dataclass(frozen=True)
class Use:
    """An operation in a problem, in words and in Python."""

    operation: Operation
    phrase: str
    line: str


@dataclass(frozen=True)
class Problem:
    """What is asked and the lines that do it."""

    name: str
    source: Source
    source_phrase: str
    uses: tuple[Use, ...]
    """One or two steps and the value returned."""

    @property
    def prompt(self) -> str:
        """A function's head and its docstring, as in HumanEval."""
        *steps, result = (use.phrase for use in self.uses)
        task = f"From {self.source_phrase}, {', then '.join(steps)}; return {result}."
        return f'def {self.name}({self.source.parameter}):\n    """{task}"""\n'

    @property
    def lines(self) -> tuple[str, ...]:
        """The function's body."""
        return (*filter(None, [self.source.line]), *(use.line for use in self.uses))

    @property
    def code(self) -> str:
        """The function."""
        return "\n    ".join([f"def {self.name}({self.source.parameter}):", *self.lines])

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Operations that follow each other."""
        names = [use.operation.name for use in self.uses]
        return tuple(itertools.pairwise(names))

    def said(self, line: int) -> str:
        """What the task says of a line of the body, as a command."""
        at = line - len(self.lines) + len(self.uses)
        if at < 0:
            return f"take {self.source_phrase}"
        return f"return {self.uses[at].phrase}" if at == len(self.uses) - 1 else self.uses[at].phrase


def pairs() -> list[Pair]:
    """All pairs of operations that can follow each other."""
    return [
        (first.name, second.name)
        for first in STEPS
        for second in (*STEPS, *RESULTS)
        if any(first.fits(kind) and second.fits(first.kind_after(kind)) for kind in ("int", "str"))
    ]


def held_out_pairs(seed: int) -> frozenset[Pair]:
    """The pairs that no training problem holds."""
    every = pairs()
    return frozenset(random.Random(f"{seed}/held out").sample(every, round(HELD_OUT_SHARE * len(every))))


def draw(rng: random.Random) -> Problem:
    """Any problem."""
    source = rng.choice(SOURCES)
    kind, uses = source.kind, []
    for _ in range(rng.choice((1, 2, 2, 2))):
        uses.append(_draw_use(STEPS, kind, rng))
        kind = uses[-1].operation.kind_after(kind)
    uses.append(_draw_use(RESULTS, kind, rng))
    return Problem(rng.choice(_NAMES), source, rng.choice(source.phrases), tuple(uses))


def faulty(problem: Problem, rng: random.Random) -> Iterator[str]:
    """Versions of the function that may fail: a line forgotten, lines in the wrong order, another operation, a slip.

    The first ones lack one line each.
    """
    code, uses = problem.code, problem.uses
    for at in range(len(uses) - 1):
        yield replace(problem, uses=uses[:at] + uses[at + 1 :]).code
    if len(uses) > 2:
        yield replace(problem, uses=(uses[1], uses[0], *uses[2:])).code
    at = rng.randrange(len(uses))
    yield replace(problem, uses=(*uses[:at], _another(uses[at], rng), *uses[at + 1 :])).code
    # Kinds of change take turns, so that the first ones are of all kinds.
    first = itertools.islice(mutants(code), _FIRST_MUTANTS)
    slips = [mutant.code for mutant in first if mutant.change.split(",")[0] in _MUTATIONS]
    if slips:
        yield rng.choice(slips)


def diagnosis(problem: Problem, wrong: str) -> str:
    """What is wrong with a faulty version, in the words of the task."""
    right, found = list(problem.lines), [line.strip() for line in wrong.split("\n")[1:]]
    different = [at for at, line in enumerate(right) if at >= len(found) or line != found[at]]
    first = different[0]
    if len(found) < len(right):
        return f"The line to {problem.said(first)} is missing."
    if len(different) > 1:
        return f"The order is wrong: {problem.said(first)}, then {problem.said(different[1])}."
    return f"To {problem.said(first)}, line {first + 2} must be `{right[first]}`."


def _draw_use(operations: tuple[Operation, ...], kind: str, rng: random.Random) -> Use:
    operation = rng.choice([operation for operation in operations if operation.fits(kind)])
    constant = rng.choice(operation.constants or ("",))
    phrase, line = (Template(text).substitute(k=constant) for text in (rng.choice(operation.phrases), operation.line))
    return Use(operation, phrase, line)


def _another(use: Use, rng: random.Random) -> Use:
    """A use of another operation that fits in the same places."""
    table = RESULTS if use.operation in RESULTS else STEPS
    same = [o for o in table if o != use.operation and (o.takes, o.gives) == (use.operation.takes, use.operation.gives)]
    return _draw_use(tuple(same), use.operation.takes.replace("any", "int"), rng)
