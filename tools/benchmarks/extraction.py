"""Finds the program that a model's answer means; answers are parsed and never run here.

Of a chat's answer ``answer_program`` finds at least what evalplus 0.3.1's ``sanitize`` finds: of the blocks or runs of
lines that are Python, the one that defines the entry point, reduced to what that function needs, so that examples and
tests do not run at import. Beyond that, drafts in thoughts do not count, a later block corrects an earlier one, and a
helper in another block is found.
"""

from __future__ import annotations

import ast
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reflectron.tools.llm.fences import PYTHON, find_fences, without_thoughts

FENCE = "```"
BLOCK_TAGS = ("<|text|>", "<|code|>", "<|endofblock|>", "<|endofmessage|>")
# What models append to the function that was asked for (ReflectionCoder).
_AFTER_FUNCTION = ("\n# Test", "\nif", "\nassert", "\nprint", f"\n{FENCE}")

# Colours that a terminal client left in its answer.
_ANSI = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")
# Python ends lines at these and at no others: str.splitlines() would also cut at a form feed or U+2028.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
_MANY_LINES = re.compile(r"(?:def|class|async|import|from|try|if|for|while|with)\b|@|\w[^=\n]*=[^=]")
_CONTINUATION = re.compile(r"(?:else|elif|except|finally)\b")
# What surrounds code that was copied from a session, a quotation or a typesetter.
_COPIED = re.compile(r"^[ \t]*(?:>>>|\.\.\.|>)(?: |$)|(?<=\S)```+[ \t]*$", re.MULTILINE)
_TYPESET = str.maketrans({"\ufeff": "", "\u200b": "", "\xa0": " ", "‘": "'", "’": "'", "“": '"', "”": '"'})
_SETTING = re.compile(r"(?:sys\.)?setrecursionlimit\([^()]*\)")
# Methods of containers; one of the program's own class may be called as an example.
_FILLING = frozenset({"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "sort", "reverse"})
# A statement with one of these shows or tries the program, and does not prepare it.
_OF_EXAMPLES = frozenset({"print", "input", "open", "exit", "quit", "__name__"})
# Parsing every prefix of a text is quadratic in its length; a statement has fewer lines at the margin than this, and an
# answer needs fewer attempts.
_MOST_PREFIXES = 64
_MOST_ATTEMPTS = 1024
_MOST_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class _Statement:
    """A statement at the top level of a program."""

    node: ast.stmt
    source: str
    binds: frozenset[str]
    needs: frozenset[str]
    """Global names that it refers to, in functions inside it as well."""

    def defines(self, name: str, *, returning: bool) -> bool:
        """Return whether it is a definition of ``name``, and not only the head of one, as a prompt shows it."""
        if name not in self.binds or isinstance(self.node, (ast.Import, ast.ImportFrom)):
            return False
        if not returning or not isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return True
        return any(isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) for node in ast.walk(self.node))

    @property
    def changes(self) -> set[str]:
        """The names whose value it changes in place, as ``memo[0] = 1`` and a loop of ``memo.append(n)`` do."""
        if isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or self.needs & _OF_EXAMPLES:
            return set()
        return {
            name.id
            for node in ast.walk(self.node)
            for target in _changed(node)
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }

    @property
    def is_setting(self) -> bool:
        """Whether it is one that the whole program runs under."""
        return _SETTING.fullmatch(self.source) is not None


def _changed(node: ast.AST) -> list[ast.expr]:
    """Return what a statement writes into."""
    if isinstance(node, ast.Assign):
        return [target for target in node.targets if isinstance(target, (ast.Subscript, ast.Attribute))]
    if isinstance(node, ast.AugAssign):
        return [node.target]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        if isinstance(function, ast.Attribute) and function.attr in _FILLING:
            return [function.value]
    return []


_Block = list[_Statement]


def cut_at_first(text: str, stops: Sequence[str]) -> str:
    """Return ``text`` up to the earliest of ``stops``."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def reflection_code(raw: str) -> str:
    """Return the code of an answer of ReflectionCoder, as its ``post_process`` does.

    That drops the first line of an answer without any fence, which only a truncated one is; here it stays.
    """
    for tag in BLOCK_TAGS:
        raw = raw.replace(tag, "")
    fences = raw.count(FENCE)
    if fences % 2:
        raw = raw[: raw.rfind(FENCE)]
    elif fences:
        raw = raw.split(FENCE, 1)[1].partition("\n")[2]
    for stop in _AFTER_FUNCTION:
        raw = raw.split(stop, 1)[0]
    return raw.strip()


def marked_block(raw: str, languages: Sequence[str]) -> str:
    """Return the first block of a chat's answer that calls itself one of ``languages``, else one without a name."""
    answer = without_thoughts(raw)
    fences = find_fences(answer)
    marked = [fence.code for fence in fences if fence.language in languages]
    unmarked = [fence.code for fence in fences if not fence.language]
    return textwrap.dedent((marked or unmarked or [fence.code for fence in fences] or [answer])[0])


def answer_program(raw: str, entry_point: str, prompt: str = "") -> str:
    """Return the program in an answer that may hold several blocks, prose and thoughts.

    Args:
        prompt: the problem's own program, which goes before what is found; a bare function body completes it.
    """
    text = _ANSI.sub("", without_thoughts(raw))[:_MOST_CHARACTERS]
    fences = find_fences(text)
    marked = [fence.code for fence in fences if fence.language in PYTHON]
    unmarked = [fence.code for fence in fences if not fence.language]
    codes = [fence.code for fence in fences if fence.language in ("", *PYTHON)] or [text]
    for returning in (True, False):
        for blocks in _readings(codes, text, entry_point):
            if any(statement.defines(entry_point, returning=returning) for block in blocks for statement in block):
                return _join(prompt, _needed(blocks, entry_point, returning=returning))
    code = (marked or unmarked or [text])[0]
    body = textwrap.indent(textwrap.dedent(code), "    ")
    return prompt + (body if "return" in body and _parse(prompt + body) else code)


def _readings(codes: Sequence[str], text: str, entry_point: str) -> Iterator[list[_Block]]:
    """Yield the blocks of Python that the answer may consist of, the surest reading first."""
    yield [_block(code) for code in codes]
    for cut in (False, True):
        yield [run for code in codes for run in _runs(code, entry_point, cut=cut)]
        yield _runs(text, entry_point, cut=cut)
    plain = _COPIED.sub("", text).translate(_TYPESET)
    if plain != text:
        yield _runs(plain, entry_point, cut=False)


def _needed(blocks: Sequence[_Block], entry_point: str, *, returning: bool) -> list[_Statement]:
    """Return what the last definition of the entry point needs, also by way of others, in the order of the answer.

    In a block the first definition of a name counts, as for evalplus; what a block lacks is taken from those before it,
    then from those behind it.
    """
    chosen = max(
        number
        for number, block in enumerate(blocks)
        if any(statement.defines(entry_point, returning=returning) for statement in block)
    )
    search = [blocks[chosen], *reversed(blocks[:chosen]), *blocks[chosen + 1 :]]
    always = [statement for statement in search[0] if "*" in statement.binds or statement.is_setting]
    kept = {id(statement): statement for statement in always}
    seen = {entry_point}.union(*(statement.needs for statement in always))
    names = [*seen]
    while names:
        name = names.pop()
        found = _definition(search, name)
        for statement in (*([found] if found else []), *_changing(search[0], name, found, entry_point)):
            kept[id(statement)] = statement
            new = statement.needs - seen
            seen |= new
            names += new
    order = [*blocks[:chosen], *blocks[chosen + 1 :], blocks[chosen]]
    return [statement for block in order for statement in block if id(statement) in kept]


def _changing(block: _Block, name: str, definition: _Statement | None, entry_point: str) -> list[_Statement]:
    """Return what changes a name's value in place; a call of a module's function changes none, nor does an example."""
    if definition is None or isinstance(definition.node, (ast.Import, ast.ImportFrom)):
        return []
    return [
        statement
        for statement in block
        if name in statement.changes and (name == entry_point or entry_point not in statement.needs)
    ]


def _definition(blocks: Sequence[_Block], name: str) -> _Statement | None:
    for block in blocks:
        for returning in (True, False):
            for statement in block:
                bound = name in statement.binds and isinstance(statement.node, (ast.Import, ast.ImportFrom))
                if bound or statement.defines(name, returning=returning):
                    return statement
    return None


def _join(prompt: str, statements: Sequence[_Statement]) -> str:
    """Return prompt and statements as one program; what Python wants at the beginning is put there."""
    first = [s for s in statements if isinstance(s.node, ast.ImportFrom) and s.node.module == "__future__"]
    rest = [s for s in statements if s not in first]
    head = "".join(f"{statement.source}\n" for statement in first)
    return head + prompt + "".join(f"{statement.source}\n" for statement in rest)


def _runs(text: str, entry_point: str, *, cut: bool) -> list[_Block]:
    """Return runs of statements between lines of prose.

    Args:
        cut: whether a statement that does not parse to its end counts as far as it does.
    """
    text = _at_margin(text, entry_point)
    lines = _LINE.findall(text)
    blocks: list[_Block] = [[]]
    at = 0
    attempts = iter(range(_MOST_ATTEMPTS))
    while at < len(lines):
        end = at if lines[at][0].isspace() else _statement_end(lines, at, attempts, cut=cut)
        block = _block("".join(lines[at:end]))
        blocks[-1] += block
        is_word = len(block) == 1 and isinstance(block[0].node, ast.Expr) and isinstance(block[0].node.value, ast.Name)
        if is_word or (not block and lines[at].strip() and not lines[at].startswith("#")):
            blocks.append([])
        at = max(end, at + 1)
    return [block for block in blocks if block]


def _at_margin(text: str, entry_point: str) -> str:
    """Return the text moved to the left as far as the function stands from there, as in Markdown's indented blocks."""
    found = re.findall(rf"^([ \t]*)(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", text, re.MULTILINE)
    if not found or "" in found:
        return text
    return "".join(line.removeprefix(found[0]) for line in _LINE.findall(text))


def _statement_end(lines: Sequence[str], at: int, attempts: Iterator[int], *, cut: bool) -> int:
    """Return the line behind the statement that begins at line ``at``, or ``at`` where none does.

    Args:
        attempts: one is taken for each text that is parsed; without any left there is no statement.
    """
    margins = (n for n in range(at + 1, len(lines)) if lines[n].strip() and lines[n][0] not in " \t\f#")
    ends = [end for _, end in zip(range(_MOST_PREFIXES), margins, strict=False)]
    if len(ends) < _MOST_PREFIXES:
        ends.append(len(lines))
    many = _MANY_LINES.match(lines[at])
    tried = [end for end in ends[: _MOST_PREFIXES if many else 1] if end == len(lines) or not _continues(lines[end])]
    if cut and many:
        # From the end of the lines that belong to it, or of the answer where a bracket or string never ends.
        tried += [end for last in (ends[0], ends[-1]) for end in range(last, max(at, last - _MOST_PREFIXES), -1)]
    for end, _ in zip(tried, attempts, strict=False):
        if _parse("".join(lines[at:end])):
            return end
    return at


def _continues(line: str) -> bool:
    """Return whether a line at the margin continues a statement that could have ended before it."""
    return _CONTINUATION.match(line) is not None


def _block(code: str) -> _Block:
    """Return the statements of a program; none where it does not parse."""
    tree = _parse(code)
    if tree is None:
        return []
    lines = [line.encode() for line in _LINE.findall(code)]
    return [_statement(node, _source(node, lines)) for node in tree.body]


def _source(node: ast.stmt, lines: Sequence[bytes]) -> str:
    """Return a statement's own text, decorators included; ``ast`` counts columns in bytes of UTF-8."""
    assert node.end_lineno is not None
    decorators = getattr(node, "decorator_list", [])
    first, start = (decorators[0].lineno, 0) if decorators else (node.lineno, node.col_offset)
    own = list(lines[first - 1 : node.end_lineno])
    own[-1] = own[-1][: node.end_col_offset]
    own[0] = own[0][start:]
    return b"".join(own).decode()


def _statement(node: ast.stmt, source: str) -> _Statement:
    table = symtable.symtable(source, "<answer>", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    if isinstance(node, ast.ImportFrom) and (node.module == "__future__" or node.names[0].name == "*"):
        bound = {"*"}
    needs = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    tables = table.get_children()
    while tables:
        table = tables.pop()
        needs |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        tables += table.get_children()
    return _Statement(node, source, frozenset(bound), frozenset(needs))


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            # An invalid escape in an answer is no news.
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
            symtable.symtable(code, "<answer>", "exec")
            return tree
    # A null byte, half a surrogate pair, or nesting beyond the parser's stack.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
