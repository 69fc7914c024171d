"""Answers of a model come in, clean problem-solution pairs go out, and the reason for each that is none.

Cleaning is Magicoder's: of the same seed, problem or solution, whitespace aside, only the first stays, and a solution
must not copy code of its problem.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.records import parse_record
from reflectron.tools.llm.fences import find_fences

_PROBLEM = re.compile(r"^[^\w\n]*problem description[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
_SOLUTION = re.compile(r"^[^\w\n]*solution[^\w\n]*$", re.IGNORECASE | re.MULTILINE)


class Unusable(Exception):
    """An answer that gives no sample; the text is the reason it is counted under."""


@dataclass(frozen=True)
class Row:
    """One sample in the schema of Magicoder-OSS-Instruct-75K."""

    lang: str
    raw_index: int
    index: int
    seed: str
    problem: str
    solution: str


def parse_answer(text: str) -> tuple[str, str]:
    """Problem and solution from an answer with the two headings on lines of their own, in any markup.

    Raises:
        Unusable: when a heading or a part is missing.
    """
    problem_heading = _PROBLEM.search(text)
    solution_heading = _SOLUTION.search(text, problem_heading.end()) if problem_heading else None
    if problem_heading is None or solution_heading is None:
        raise Unusable("no headings")
    problem = text[problem_heading.end() : solution_heading.start()].strip()
    solution = text[solution_heading.end() :].strip()
    if not problem or not solution:
        raise Unusable("empty problem" if not problem else "empty solution")
    return problem, solution


@dataclass
class Cleaner:
    """Judges rows one after another; which of several equal ones stays depends on their order."""

    _seeds: set[str] = field(default_factory=set)
    _problems: set[str] = field(default_factory=set)
    _solutions: set[str] = field(default_factory=set)

    def check_seed(self, seed: str) -> None:
        """Take note of a seed before the model is asked.

        Raises:
            Unusable: when it was there before.
        """
        self._take(self._seeds, seed, "duplicate seed")

    def check(self, row: Row) -> None:
        """Take note of a row's problem and solution.

        Raises:
            Unusable: when it has to go.
        """
        if _codes(row.problem) & _codes(row.solution) or _bare(row.solution) in _bare(row.problem):
            raise Unusable("solution copies the problem")
        try:
            parse_record({"problem": row.problem, "solution": row.solution})
        except BadRecord as error:
            raise Unusable(str(error).split(":")[0]) from None
        self._take(self._problems, row.problem, "duplicate problem")
        self._take(self._solutions, row.solution, "duplicate solution")

    def _take(self, known: set[str], text: str, reason: str) -> None:
        bare = _bare(text)
        if bare in known:
            raise Unusable(reason)
        known.add(bare)


def _codes(text: str) -> set[str]:
    return {_bare(fence.code) for fence in find_fences(text)} - {""}


def _bare(text: str) -> str:
    return "".join(text.split())
