"""Text and programs: fenced code out of an answer, and the tests of a reflection sequence out of its programs.

Programs are parsed, never run here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from reflectron.tools.llm.fences import PYTHON, Fence, find_fences

_Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def python_fences(text: str) -> list[Fence]:
    """Closed blocks marked as Python; where there are none, unmarked ones that parse as Python."""
    closed = [fence for fence in find_fences(text) if fence.closed]
    marked = [fence for fence in closed if fence.language in PYTHON]
    return marked or [fence for fence in closed if not fence.language and parses(fence.code)]


def parses(code: str) -> bool:
    """Whether Python accepts the syntax."""
    try:
        ast.parse(code)
    # A null byte, or nesting beyond the parser's stack.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def has_tests(code: str) -> bool:
    """Whether there is an assert statement, or a call of a method like unittest's ``assertEqual``."""
    return parses(code) and any(map(_is_test, ast.walk(ast.parse(code))))


def definitions(code: str) -> set[str]:
    """Names of the functions and classes defined at the top level."""
    return {statement.name for statement in ast.parse(code).body if isinstance(statement, _Definition)}


@dataclass(frozen=True)
class Tests:
    """What a sequence tests an answer with."""

    targets: frozenset[str]
    """Functions and classes of the answer that the sequence defined as well."""
    code: str
    """Statements to run behind the answer."""


def extract_tests(answer: str, programs: Sequence[str]) -> Tests:
    """The tests of a reflection sequence, without its own solution.

    Of the last program all statements stay but the definitions that the answer brings. Of the earlier ones, which ran
    in the same interpreter, imports and definitions stay that nothing later replaces.

    Args:
        answer: code of the one-off answer; it must parse.
        programs: code blocks of the sequence in order, the last one passed.
    """
    brought = definitions(answer)
    last = [statement for statement in ast.parse(programs[-1]).body if not _defines(statement, brought)]
    replaced = brought | definitions(programs[-1])
    context: list[ast.stmt] = []
    defined = definitions(programs[-1])
    for program in reversed([program for program in programs[:-1] if parses(program)]):
        body = ast.parse(program).body
        kept = [s for s in body if isinstance(s, (*_Definition, ast.Import, ast.ImportFrom))]
        context = [s for s in kept if not _defines(s, replaced)] + context
        replaced |= definitions(program)
        defined |= definitions(program)
    statements = [s for s in (*context, *last) if not (isinstance(s, ast.ImportFrom) and s.module == "__future__")]
    return Tests(frozenset(brought & defined), ast.unparse(ast.Module(statements, [])))


def _defines(statement: ast.stmt, names: set[str]) -> bool:
    return isinstance(statement, _Definition) and statement.name in names


def _is_test(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return re.match(r"assert[A-Z]", node.func.attr) is not None
    return isinstance(node, ast.Assert)
