"""What a chat model answers becomes the program that it means: as evalplus's own sanitizer finds it, and beyond."""

from __future__ import annotations

import contextlib
import sys

import pytest
from evalplus.sanitize import sanitize

from reflectron.tools.benchmarks.extraction import answer_program

# The forms of evalplus's own tests (tests/test_treesitter_sanitizer.py): the asserts in them say which ``g`` is meant.
_OWN_BASIC = """Following is the code snippet:
```python
import math
from math import sin, cos

def f(x):
    return math.tan(x)

def g(x):
    return cos(f(x))

def g(x):
    return sin(f(x))

def c(x):
    return 0

assert g(0) == 1
```
"""
_OWN_CHAIN = """Following is the code snippet:
```python
from math import sin, cos

SOME_CONSTANT = 5

def f(x):
    return c(x)
assert f(1) == 5
def g(x):
    return cos(f(x))

def c(x):
    newObj = h()
    return x

class h():
    def hello_world():
        return SOME_CONSTANT

class h():
    def goodbye_world():
        return 0

def d(x):
    return g(x)

# Some tests
assert g(0) == 1
print(g(123))
ret = g(321)
```
"""
_OWN_PROSE = """Here is some python code generated
import math
Sorry, I made a mistake, let me try again
from math import sin, cos, tan

def g(x):
    return cos(tan(x))
As you can observe from above
    """
_LENGTH = "def strlen(string: str) -> int:\n    return len(string)\n"

FOUND_BY_BOTH = {
    "evalplus: two definitions": (_OWN_BASIC, "g(0) == 1"),
    "evalplus: chain, constant, tests": (_OWN_CHAIN, "g(0) == 1 and c(2) == 2 and h.hello_world() == 5"),
    "evalplus: prose around": (_OWN_PROSE, "g(0) == 1"),
    "tag py, shell block first": (
        f"First:\n```bash\npip install x\n```\nThen:\n```py\n{_LENGTH}```\n",
        "strlen('abc') == 3",
    ),
    "tag python3, output block first": (
        f"Example:\n```\nstrlen('abc') = 3\n```\nCode:\n```python3\n{_LENGTH}```\n",
        "strlen('abc') == 3",
    ),
    "space before the tag": (f"```text\nsketch\n```\n``` python\n{_LENGTH}```\n", "strlen('abc') == 3"),
    "doctest block before the definition": (
        f"```python\n>>> strlen('a')\n1\n```\n\n```python\n{_LENGTH}```",
        "strlen('abc') == 3",
    ),
    "no fence, prose around": (f"Here is the function:\n\n{_LENGTH}\nIt works.", "strlen('abc') == 3"),
    "never closed, prose behind": (
        f"```python\n{_LENGTH}\nThis function returns the length.",
        "strlen('abc') == 3",
    ),
    "cut off in a second function": (
        f"```python\n{_LENGTH}\ndef other(x):\n    return [x for y in (",
        "strlen('abc') == 3",
    ),
    "fence inside a docstring": (
        '```python\ndef strlen(s):\n    """Count.\n\n```\nstrlen("a")\n```\n    """\n    return len(s)\n```\n',
        "strlen('abc') == 3",
    ),
    "calls that would fail at import": (
        f"```python\n{_LENGTH}\nn = int(input())\nprint(strlen(n))\n```",
        "strlen('abc') == 3",
    ),
    "mark at the end of a line": (f"The code:```python\n{_LENGTH}```", "strlen('abc') == 3"),
    "windows line ends": (f"```python\n{_LENGTH}```\nDone.".replace("\n", "\r\n"), "strlen('abc') == 3"),
    "form feed and line separators in strings": (
        "```python\nimport os\n\f\nSEP = '\u2028\x0c\x1c'\n\ndef strlen(s):\n    return len(s) + len(SEP) - 3\n```",
        "strlen('abc') == 3",
    ),
    "imports and constants of several lines": (
        "```python\nfrom math import (\n    floor,\n    ceil,\n)\nTABLE = {\n    'a': 1,\n}\n\n"
        "def strlen(s):\n    return floor(3.5) * TABLE['a']\n```",
        "strlen('abc') == 3",
    ),
    "comment at the margin of a body": (
        "Here:\ndef strlen(s):\n    n = len(s)\n# the result\n    return n\nDone!",
        "strlen('abc') == 3",
    ),
    "non-ASCII before the code on a line": (
        "```python\nd = 'é'; LIMIT = 7\ndef strlen(s):\n    return len(s) + LIMIT - 7\n```",
        "strlen('abc') == 3",
    ),
}

BEYOND = {
    "lambda": ("```python\nstrlen = lambda s: len(s)\n```", "strlen('abc') == 3"),
    "colours of a terminal": (f"\x1b[1m```python\x1b[0m\n\x1b[32m{_LENGTH}\x1b[0m\n```", "strlen('abc') == 3"),
    "whole think block": (
        f"<think>\nMaybe\n```python\ndef strlen(s):\n    return 0\n```\nno.\n</think>\n\n```python\n{_LENGTH}```\n",
        "strlen('abc') == 3",
    ),
    "opening tag was in the prompt": (
        f"Maybe\n```python\ndef strlen(s):\n    return 0\n```\nno.\n</think>\n\n```python\n{_LENGTH}```\n",
        "strlen('abc') == 3",
    ),
    "other tags of thoughts": (
        f"[THINK]```python\ndef strlen(s):\n    return 0\n```[/THINK]{_LENGTH}",
        "strlen('abc') == 3",
    ),
    "the tag in a string of the code": (
        "```python\ndef strlen(s):\n    return len(s.replace('</think>', ''))\n```",
        "strlen('abc</think>') == 3",
    ),
    "a correction": (
        f"```python\ndef strlen(s):\n    n = 0\n    return n\n```\nThat is wrong. Better:\n```python\n{_LENGTH}```",
        "strlen('abc') == 3",
    ),
    "the head of the prompt again behind the answer": (
        f'```python\n{_LENGTH}```\nIt completes\n```python\ndef strlen(s):\n    """Length."""\n```',
        "strlen('abc') == 3",
    ),
    "helper in a block of its own": (
        "A helper:\n```python\nimport math\ndef one(x):\n    return math.floor(1.5)\n```\nThen\n```python\n"
        "def strlen(s):\n    return sum(map(one, s))\n```",
        "strlen('abc') == 3",
    ),
    "a cache filled in place": (
        "```python\nmemo = {}\nmemo[3] = 3\ndef strlen(s):\n    return memo[len(s)]\nmemo[3] = missing\n```".replace(
            "\nmemo[3] = missing", ""
        ),
        "strlen('abc') == 3",
    ),
    "a table filled by calls and a loop": (
        "```python\nmemo = []\nmemo.append(0)\nfor n in range(1, 9):\n    memo.append(n)\n"
        "def strlen(s):\n    return memo[len(s)]\nfor s in ('a', 'b'):\n    memo.append(strlen(s) / 0)\n"
        "if memo:\n    memo.append(input())\n```",
        "strlen('abc') == 3 and len(memo) == 9",
    ),
    "the limit on recursion": (
        "```python\nimport sys\nsys.setrecursionlimit(4321)\n\ndef strlen(s):\n    return len(s)\n```",
        "strlen('abc') == 3 and __import__('sys').getrecursionlimit() == 4321",
    ),
    "a fence right behind the thought": (
        f"<think>\n```python\ndef strlen(s):\n    return 0\n```\n</think>```python\n{_LENGTH}```",
        "strlen('abc') == 3",
    ),
    "channels whose special tokens were taken out": (
        f"analysisWe try\n```python\ndef strlen(s):\n    return 0\n```\nassistantfinal```python\n{_LENGTH}```",
        "strlen('abc') == 3",
    ),
    "a session": (
        "```python\n>>> def strlen(s):\n...     return len(s)\n...\n>>> strlen('abc')\n3\n```",
        "strlen('abc') == 3",
    ),
    "a quotation": ("> ```python\n> def strlen(s):\n>     return len(s)\n> ```", "strlen('abc') == 3"),
    "a mark behind the last line": ("```python\ndef strlen(s):\n    return len(s)```", "strlen('abc') == 3"),
    "a typesetter's quotes and spaces": (
        "```python\n\ufeffdef strlen(s):\n\xa0\xa0\xa0\xa0return 0 if s == ‘’ else len(s)\n```",
        "strlen('abc') == 3",
    ),
    "decorator": (
        "```python\nfrom functools import lru_cache\n\n@lru_cache()\ndef strlen(s):\n    return len(s)\n```",
        "strlen('abc') == 3 and strlen.cache_info().misses == 1",
    ),
    "list item": (
        f"1. So:\n\n   ```python\n{_LENGTH}   ```\n".replace("\ndef", "\n   def").replace("\n    ret", "\n       ret"),
        "strlen('abc') == 3",
    ),
    "a future import behind a prompt": (
        "```python\nfrom __future__ import annotations\n\ndef strlen(s: Undefined) -> int:\n    return len(s)\n```",
        "strlen('abc') == 3",
    ),
    "try around an import": (
        "```python\ntry:\n    import no_such_module as n\nexcept ImportError:\n    n = None\n\n"
        "def strlen(s):\n    return len(s) if n is None else 0\n```",
        "strlen('abc') == 3",
    ),
    "an import that only tests need": (f"```python\nimport pytest_missing\n{_LENGTH}```", "strlen('abc') == 3"),
}

PROMPT = 'from typing import List\n\n\ndef strlen(string: str) -> int:\n    """Length of string."""\n'


def _holds(program: str, expression: str) -> bool:
    names: dict[str, object] = {}
    exec(program, names)
    return bool(eval(expression, names))


@pytest.mark.parametrize("case", FOUND_BY_BOTH)
def test_what_evalplus_finds_is_found(case: str) -> None:
    raw, expression = FOUND_BY_BOTH[case]
    entry_point = expression.split("(")[0]
    assert _holds(sanitize(raw, entry_point), expression)
    assert _holds(answer_program(raw, entry_point, PROMPT), expression)
    assert _holds(answer_program(raw, entry_point), expression)


@pytest.mark.parametrize("case", BEYOND)
def test_what_evalplus_does_not_find_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, expression = BEYOND[case]
    # One of the programs sets it.
    monkeypatch.setattr(sys, "setrecursionlimit", lambda n: monkeypatch.setattr(sys, "getrecursionlimit", lambda: n))
    assert _holds(answer_program(raw, "strlen", PROMPT), expression)


def test_a_body_completes_the_prompt() -> None:
    for raw in ("```python\n    return len(string)\n```", "```\nreturn len(string)\n```", "    return len(string)"):
        assert _holds(answer_program(raw, "strlen", PROMPT), "strlen('abc') == 3")


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "I cannot help.",
        "<think>\nendless ```python\ndef strlen(s):\n    return len(s)\n```",
        "```python\ndef strlen(s:\n```",
        "def strlen(\x00):\n  return 3",
        "```python\nx = '\ud800'\n```",
        "(" * 100_000,
        "def f():\n" * 2_000,
        "from here\n" * 2_000,
        "```\n" * 4_000,
    ],
)
def test_what_holds_no_program_ends_soon_and_gives_none(raw: str) -> None:
    program = answer_program(raw, "strlen", PROMPT)
    assert program.startswith(PROMPT)
    with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
        assert not _holds(program, "strlen('abc') == 3")
