"""Programs as text: fenced code of an answer, the tests of a sequence, mutants of a program, and telltale words.

Programs are parsed, never run here. Tests that pass for every mutant of a program say nothing about its functions; each
mutant changes one place of a function's body, and the kinds of change take turns in the order of the program, so that a
few mutants are already of several kinds.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reflectron.tools.llm.fences import PYTHON, Fence, find_fences

_Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_THING = r"(?:version|attempt|code|solution|implementation|program|answer|approach)s?"
_FAULT = r"(?:bug|error|mistake|failure|fault)s?"
_PHRASES = (
    rf"(?:corrected|fixed|repaired|revised|updated|improved|modified)\s+(?:\w+\s+)?{_THING}",
    rf"(?:previous|earlier|prior|original|initial|first|last|old)\s+{_THING}",
    rf"(?:previous|earlier|prior)\s+(?:{_FAULT}|tests?|outputs?|conversation|responses?)",
    rf"(?:fix|fixes|fixed|fixing|corrects?|corrected|correcting|repairs?|repaired|repairing)\s+(?:[\w-]+\s+){{0,2}}{_FAULT}",
    rf"after\s+(?:fixing|correcting|repairing|debugging|analy[sz]ing\s+the\s+{_FAULT})",
    r"as\s+(?:I\s+|we\s+)?(?:mentioned|discussed)",
    r"as\s+(?:I\s+|we\s+)?(?:noted|explained|shown|seen|said|stated)\s+(?:above|before|earlier|previously)",
    r"(?:tests?|assertions?|asserts?)\s+(?:now\s+|all\s+)?(?:pass|passes|passed|succeed|succeeded|fail|fails|failed)",
    r"(?:failed|failing|passed|passing)\s+(?:the\s+|all\s+)*(?:tests?|assertions?|asserts?)",
    r"(?:code|solution|function|program|it|this|that|which)\s+now\s+(?:correctly\s+|properly\s+)?"
    r"(?:works|passes|handles|returns|behaves|gives|produces)",
    r"(?:code\s+|the\s+)interpreter\s+(?:printed|output|showed|shows|reported)",
    r"I\s+apologi[sz]e|(?:my|our)\s+apologies|(?:I\s+am|I'm)\s+sorry|my\s+mistake|made\s+a\s+mistake|oops",
)
_LEFTOVER = re.compile(rf"\b(?:{'|'.join(_PHRASES)})\b", re.IGNORECASE)


def python_fences(text: str) -> list[Fence]:
    """Return closed blocks marked as Python; where there are none, unmarked ones that parse as Python."""
    closed = [fence for fence in find_fences(text) if fence.closed]
    marked = [fence for fence in closed if fence.language in PYTHON]
    return marked or [fence for fence in closed if not fence.language and parses(fence.code)]


def parses(code: str) -> bool:
    """Return whether Python accepts the syntax."""
    try:
        ast.parse(code)
    # A null byte, or nesting beyond the parser's stack.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def has_tests(code: str) -> bool:
    """Return whether there is an assert statement, or a call of a method like unittest's ``assertEqual``."""
    return parses(code) and any(map(_is_test, ast.walk(ast.parse(code))))


def definitions(code: str) -> set[str]:
    """Return the names of the functions and classes defined at the top level."""
    return {statement.name for statement in ast.parse(code).body if isinstance(statement, _Definition)}


@dataclass(frozen=True)
class SequenceTests:
    """The tests that a sequence has for an answer."""

    targets: frozenset[str]
    """Functions and classes of the answer that the sequence defined as well."""
    code: str
    """Statements to run behind the answer."""


def extract_tests(answer: str, programs: Sequence[str]) -> SequenceTests:
    """Return the tests of a reflection sequence, without its own solution.

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
    return SequenceTests(frozenset(brought & defined), ast.unparse(ast.Module(statements, [])))


@dataclass(frozen=True)
class Mutant:
    """A changed program."""

    change: str
    """Kind and line, such as ``return, line 3``."""
    code: str


def mutants(code: str) -> Iterator[Mutant]:
    """Yield every mutant of a program that parses, of each kind in turn."""
    by_kind: dict[str, list[int]] = {}
    for index, node in enumerate(_places(ast.parse(code))):
        if (kind := _kind(node)) is not None:
            by_kind.setdefault(kind, []).append(index)
    order = ("return", "comparison", "constant", "arithmetic", "logic", "statement")
    turns = itertools.zip_longest(*(by_kind.get(kind, []) for kind in order))
    for index in (index for turn in turns for index in turn if index is not None):
        tree = ast.parse(code)
        node = next(itertools.islice(_places(tree), index, None))
        change = f"{_kind(node)}, line {node.lineno}"  # type: ignore[attr-defined]
        _CHANGES[str(_kind(node))](node)
        yield Mutant(change, ast.unparse(tree))


def without_bodies(code: str, targets: frozenset[str]) -> str:
    """Return the program whose functions, and methods of classes, raise ``NotImplementedError`` when called."""
    tree = ast.parse(code)
    for statement in tree.body:
        if isinstance(statement, (*_Function, ast.ClassDef)) and statement.name in targets:
            for node in ast.walk(statement):
                if isinstance(node, _Function):
                    node.body = ast.parse("raise NotImplementedError").body
    return ast.unparse(tree)


def leftover(answer: str, problem: str) -> str | None:
    """Return the first phrase of ``answer`` that tells of earlier attempts, none of which a one-off answer may hold.

    Comments and docstrings of the code count as well; phrases that the problem uses itself are allowed.
    """
    asked = " ".join(problem.lower().split())
    phrases = (" ".join(match.group().split()) for match in _LEFTOVER.finditer(answer))
    return next((phrase for phrase in phrases if phrase.lower() not in asked), None)


def _defines(statement: ast.stmt, names: set[str]) -> bool:
    return isinstance(statement, _Definition) and statement.name in names


def _is_test(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return re.match(r"assert[A-Z]", node.func.attr) is not None
    return isinstance(node, ast.Assert)


def _places(tree: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """Yield nodes of functions' bodies; not docstrings, annotations, decorators and default values."""
    if isinstance(tree, _Function):
        body = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
        for statement in body:
            yield from _places(statement, True)
        return
    if inside:
        yield tree
    for name, value in ast.iter_fields(tree):
        if name == "annotation":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _places(child, inside)


def _kind(node: ast.AST) -> str | None:
    if isinstance(node, ast.Return) and node.value is not None:
        return "return"
    if isinstance(node, ast.Compare):
        return "comparison"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        return "constant"
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        return "arithmetic"
    if isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        return "logic"
    if isinstance(node, ast.Assign | ast.Expr) and not _is_none(node.value):
        return "statement"
    return None


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _change_comparison(node: ast.AST) -> None:
    assert isinstance(node, ast.Compare)
    node.ops[0] = _COMPARISONS[type(node.ops[0])]()


def _change_constant(node: ast.AST) -> None:
    assert isinstance(node, ast.Constant)
    value = node.value
    if isinstance(value, bool):
        node.value = not value
    elif isinstance(value, int | float):
        node.value = value + 1
    else:
        assert isinstance(value, str)
        node.value = value + "x"


def _change_arithmetic(node: ast.AST) -> None:
    assert isinstance(node, ast.BinOp | ast.AugAssign)
    node.op = _OPERATORS[type(node.op)]()


def _change_logic(node: ast.AST) -> None:
    if isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    else:
        # Not has no opposite: twice is none.
        assert isinstance(node, ast.UnaryOp)
        node.operand = ast.UnaryOp(ast.Not(), node.operand)


def _change_return(node: ast.AST) -> None:
    assert isinstance(node, ast.Return)
    assert node.value is not None
    node.value = ast.Constant(0 if _is_none(node.value) else None)


def _drop_value(node: ast.AST) -> None:
    assert isinstance(node, ast.Assign | ast.Expr)
    node.value = ast.Constant(None)


_CHANGES: dict[str, Callable[[ast.AST], None]] = {
    "return": _change_return,
    "comparison": _change_comparison,
    "constant": _change_constant,
    "arithmetic": _change_arithmetic,
    "logic": _change_logic,
    "statement": _drop_value,
}
