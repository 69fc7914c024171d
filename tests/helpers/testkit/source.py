"""What a file's source says: its imports, the choices it makes, and where it decides by a name or by words.

Everything is read with ast, and nothing that is read is imported.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its path from the tree's root, its text's lines and its syntax."""

    path: str
    lines: int
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def scopes(self) -> list[tuple[str, Scope, list[ast.AST]]]:
        """The module and every function: "path:name", the scope, its nodes without those of functions inside it."""
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        named = [(f"{self.path}:{node.name}", node, list(_own_nodes(node))) for node in functions]
        return [(self.path, self.tree, list(_own_nodes(self.tree))), *named]

    @property
    def floor(self) -> str:
        return self.path.split("/")[0]

    @property
    def room(self) -> str:
        """The folder or the file directly under its floor."""
        return self.path.split("/")[1].removesuffix(".py")

    @property
    def module(self) -> str:
        return "reflectron." + self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of all that is imported anywhere in it, that of ``from a import b`` as ``a.b``."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    def of_this_project(self) -> list[tuple[int, tuple[str, ...]]]:
        """(line, (floor, room, ...)) of its imports of this project."""
        return [(line, tuple(name.split(".")[1:])) for line, name in self.imports if name.startswith("reflectron.")]

    def foreign(self) -> set[str]:
        """Top-level names that come neither from this project nor from the standard library."""
        return {name.split(".")[0] for _, name in self.imports} - {"reflectron"} - set(sys.stdlib_module_names)


@dataclass
class Choices:
    """What the source says about values chosen from a few: by the name of a type, of a field, of a function."""

    types: dict[str, set[str]] = field(default_factory=dict)
    fields: dict[str, list[set[str]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, sources: Sequence[Source]) -> Choices:
        choices = cls()
        nodes = [node for source in sources for node in source.nodes]
        for node in nodes:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
                choices.types[node.name] = {f"{node.name}.{name}" for name in _assigned(node)}
        aliases = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
        for _ in range(2):  # An alias may name another that stands further on.
            for node in aliases:
                if isinstance(node.value, ast.Subscript | ast.BinOp) and (values := choices.values(node.value)):
                    choices.types[ast.unparse(node.targets[0])] = values
        for node in nodes:
            if isinstance(node, ast.AnnAssign):
                choices._note(node.target, choices.values(node.annotation))
            elif isinstance(node, ast.FunctionDef) and node.returns is not None:
                choices._note(ast.Name(node.name), choices.values(node.returns))
        return choices

    def _note(self, target: ast.expr, values: set[str] | None) -> None:
        if values:
            self.fields[ast.unparse(target).rpartition(".")[2]].append(values)

    def values(self, annotation: ast.expr) -> set[str] | None:
        """The values that an annotation allows if it is a ``Literal`` of strings, an enum or a union of such."""
        match annotation:
            case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal"), slice=inner):
                parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                values: set[str] = set()
                for part in parts:
                    values |= {part.value} if isinstance(part, ast.Constant) and isinstance(part.value, str) else set()
                    values |= self.values(part) or set()
                return values
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return (self.values(left) or set()) | (self.values(right) or set())
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self.types.get(name)
            case ast.Constant(value=str(name)):
                return self.types.get(name)
        return None

    def known(self, subject: ast.expr, constants: set[str], variables: Mapping[str, list[set[str]]]) -> set[str]:
        """All values of what is compared with the constants; empty if it is not known to be chosen from a few."""
        subject = subject.func if isinstance(subject, ast.Call) else subject
        declared = variables.get(ast.unparse(subject)) or self.fields.get(_last_name(subject), [])
        elsewhere = [*self.types.values(), *(values for many in self.fields.values() for values in many)]
        for candidates in (declared, elsewhere if len(constants) > 1 else []):
            if fitting := [values for values in candidates if constants <= values]:
                return min(fitting, key=len)
        return set()


def _assigned(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(target) for item in node.body if isinstance(item, ast.Assign) for target in item.targets]


@dataclass(frozen=True)
class Chain:
    """A choice as the source writes it: the tests in order, and all that its branches do, the last one included."""

    line: int
    tests: list[ast.expr]
    done: list[ast.AST]
    has_else: bool

    def subjects(self) -> dict[str, list[set[str]]]:
        """For each thing that the tests compare, the constants of each test that asks for it."""
        found: dict[str, list[set[str]]] = defaultdict(list)
        for test in self.tests:
            of_test: dict[str, set[str]] = defaultdict(set)
            for subject, constants in _comparisons(test):
                of_test[subject] |= constants
            for subject, constants in of_test.items():
                found[subject].append(constants)
        return found

    def asks_nothing_else(self) -> bool:
        """Whether each test is one comparison, so that an ``else`` stands for the values that are left."""
        return all(isinstance(test, ast.Compare) for test in self.tests)

    def is_guarded(self, subject: str) -> bool:
        """Whether a branch hands the subject to ``assert_never``."""
        return any(
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] == "assert_never"
            and ast.unparse(node.args[0]) == subject
            for statement in self.done
            for node in ast.walk(statement)
        )


def unguarded(sources: Sequence[Source]) -> Iterator[tuple[str, str, int, int]]:
    """Yield (key, text, branches that ask for it, values that no branch names; 0 without an ``else``) of chains."""
    choices = Choices.of(sources)
    for source in sources:
        for name, scope, nodes in source.scopes:
            variables = _variables(scope, nodes, choices)
            for chain in _chains(scope, nodes):
                for subject, branches in chain.subjects().items():
                    constants = set().union(*branches)
                    known = choices.known(ast.parse(subject, mode="eval").body, constants, variables)
                    key = f"{name}: {subject}"
                    if len(known) > 1 and not chain.is_guarded(subject):
                        left = len(known - constants) if chain.has_else and chain.asks_nothing_else() else 0
                        text = f"{key} of {', '.join(sorted(known))} (line {chain.line})"
                        yield key, text, len(branches), left


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _own_nodes(child)


def _variables(scope: Scope, nodes: list[ast.AST], choices: Choices) -> dict[str, list[set[str]]]:
    """Parameters and variables that hold a choice, by their annotation or by the field that is assigned to them."""
    known: dict[str, list[set[str]]] = {}
    if not isinstance(scope, ast.Module):
        for arg in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs):
            known[arg.arg] = [(choices.values(arg.annotation) if arg.annotation else None) or set()]
    for node in nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            known[node.target.id] = [choices.values(node.annotation) or set()]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            known.setdefault(node.targets[0].id, []).extend(choices.fields.get(_last_name(value), []))
    return known


def _last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``; empty for what is no name."""
    return ast.unparse(node).rpartition(".")[2] if isinstance(node, ast.Name | ast.Attribute) else ""


def _chains(scope: Scope, nodes: list[ast.AST]) -> Iterator[Chain]:
    """Every if/elif/else, every run of ``if ...: return``, every nested conditional expression and every ``match``."""
    inside: set[int] = set()
    for block in (scope, *nodes):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(block, name, [])
            # The body of a lambda or of a conditional expression is no list.
            for at, statement in enumerate(statements if isinstance(statements, list) else []):
                if isinstance(statement, ast.If) and id(statement) not in inside:
                    yield _if_chain(statement, statements[at + 1 :], inside)
                elif isinstance(statement, ast.Match):
                    yield _match_chain(statement, statements[at + 1 : at + 2])
    for node in nodes:
        if isinstance(node, ast.IfExp) and id(node) not in inside:
            yield _expression_chain(node, inside)


def _if_chain(statement: ast.If, after: list[ast.stmt], inside: set[int]) -> Chain:
    """The chain that begins with a statement; an ``if`` whose body leaves continues with the one that follows."""
    line = statement.lineno
    tests: list[ast.expr] = []
    done: list[ast.AST] = []
    while True:
        inside.add(id(statement))
        tests.append(statement.test)
        done += statement.body
        leaves = isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
        after = after if leaves else []
        following = statement.orelse or after
        if not following or not isinstance(following[0], ast.If) or len(statement.orelse) > 1:
            return Chain(line, tests, [*done, *following], has_else=bool(statement.orelse))
        # What follows in the block continues the chain only if it asks about the same thing.
        if not statement.orelse and not _subjects(following[0].test) & {s for test in tests for s in _subjects(test)}:
            return Chain(line, tests, [*done, *following], has_else=False)
        after = after if statement.orelse else after[1:]
        statement = following[0]


def _subjects(test: ast.expr) -> set[str]:
    return {subject for subject, _ in _comparisons(test)}


def _expression_chain(node: ast.IfExp, inside: set[int]) -> Chain:
    line, tests = node.lineno, [node.test]
    while isinstance(node.orelse, ast.IfExp):
        node = node.orelse
        inside.add(id(node))
        tests.append(node.test)
    return Chain(line, tests, [node.orelse], has_else=True)


def _match_chain(node: ast.Match, after: list[ast.stmt]) -> Chain:
    """A ``match`` over values as the same comparisons with ``in``; what no case takes comes to ``after``."""
    tests: list[ast.expr] = []
    has_else = False
    for case in node.cases:
        patterns = case.pattern.patterns if isinstance(case.pattern, ast.MatchOr) else [case.pattern]
        values = [pattern.value for pattern in patterns if isinstance(pattern, ast.MatchValue)]
        if values:
            tests.append(ast.Compare(node.subject, [ast.In()], [ast.Tuple(values)]))
        has_else |= isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
    return Chain(node.lineno, tests, [*(done for case in node.cases for done in case.body), *after], has_else)


def _comparisons(test: ast.expr) -> Iterator[tuple[str, set[str]]]:
    """(subject, constants) of every comparison with constant strings or members of an enum in a test."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and not isinstance(node.left, ast.Constant):
            other = node.comparators[0]
            parts = other.elts if isinstance(other, ast.Tuple | ast.Set | ast.List) else [other]
            values = [value for part in parts if (value := _constant(part)) is not None]
            if values and len(values) == len(parts):
                yield ast.unparse(node.left), set(values)


def _constant(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.Attribute(value=ast.Name(id=name), attr=attr) if name[:1].isupper():
            return f"{name}.{attr}"
    return None


def name_endings(source: Source) -> Iterator[str]:
    """Find what asks how the name of a field begins or ends, where names come from ``fields``, ``vars`` or the like."""
    for name, _, nodes in source.scopes:
        names = _names_of_fields(nodes)
        for node in nodes:
            match node:
                case ast.Call(func=ast.Attribute(value=value, attr="endswith" | "startswith")):
                    value = value.value if isinstance(value, ast.Attribute) and value.attr == "name" else value
                    if isinstance(value, ast.Name) and value.id in names:
                        yield f"{name}: {ast.unparse(node)} (line {node.lineno})"


def _names_of_fields(nodes: list[ast.AST]) -> set[str]:
    """Variables that run over the fields of an object, or whose value ``getattr`` looks up."""
    calls = [node for node in nodes if isinstance(node, ast.Call) and _last_name(node.func) in ("getattr", "setattr")]
    looked_up = {node.args[1].id for node in calls if isinstance(node.args[1], ast.Name)}
    origins = {id(n) for n in nodes if isinstance(n, ast.Call) and _last_name(n.func) in _LISTS_FIELDS}
    return looked_up | _derived(nodes, origins)


_LISTS_FIELDS = ("fields", "vars", "asdict", "dir")


def _is_name(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _derived(nodes: list[ast.AST], origins: set[int]) -> set[str]:
    """Variables of a scope whose values come from an origin, directly or through other variables."""
    found: set[str] = set()
    for _ in range(3 if origins else 0):
        for node in nodes:
            match node:
                case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                    pass
                case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                    pass
                case _:
                    continue
            if any(id(part) in origins or _is_name(part, found) for part in ast.walk(value)):
                found |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def message_words(source: Source) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of tests of what a sentence says: any text asked of ``str(error)``, else a phrase."""
    for name, scope, nodes in source.scopes:
        errors = {f"str({error})" for error in _errors(scope, nodes)}
        calls = {id(node) for node in nodes if isinstance(node, ast.Call) and ast.unparse(node) in errors}
        texts = _derived(nodes, calls)
        for node in nodes:
            if (asked := _asked(node)) is not None:
                on, words = asked
                of_error = any(id(part) in calls or _is_name(part, texts) for part in ast.walk(on))
                phrases = [text for text in words if len(text.split()) > 1 and text.replace(" ", "").isalpha()]
                for text in words if of_error else phrases:
                    if any(map(str.isalpha, text)):
                        yield f"{name}: {text}", f"{name}: {text} (line {node.lineno}: {ast.unparse(node)})"


def _asked(node: ast.AST) -> tuple[ast.expr, list[str]] | None:
    """The text that an expression examines, and the words it looks for there."""
    match node:
        case ast.Compare(left=words, ops=[ast.In() | ast.NotIn()], comparators=[on]):
            pass
        case ast.Call(func=ast.Attribute(value=on, attr="startswith" | "endswith"), args=[words]):
            pass
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="re"), attr="match" | "search" | "fullmatch"), args=[words, on, *_]
        ):
            pass
        case _:
            return None
    parts = words.elts if isinstance(words, ast.Tuple) else [words]
    return on, [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _errors(scope: Scope, nodes: list[ast.AST]) -> set[str]:
    """Names of caught errors, and of parameters that are one."""
    names = {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    if not isinstance(scope, ast.Module):
        for arg in (*scope.args.args, *scope.args.kwonlyargs):
            if arg.annotation is not None and ast.unparse(arg.annotation).endswith(("Error", "Exception")):
                names.add(arg.arg)
    return names
