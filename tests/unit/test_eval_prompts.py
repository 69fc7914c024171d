"""Prompts word for word as the papers', and what is made of answers."""

from __future__ import annotations

import pytest

from reflectron.tools.eval.problems import Problem
from reflectron.tools.eval.prompts import (
    STYLES,
    Style,
    make_ask,
    reflection_code,
    render,
    solution,
    stop_strings,
)

HUMANEVAL = Problem("HumanEval/0", "\ndef add(a, b):\n    '''Add.'''\n", "add", {})
MBPP = Problem("Mbpp/1", '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n', "add", {})
DS1000 = Problem("DS-1000/0", "Problem:\n<code>\nx = ...\n</code>\nresult = ...\n", "", {})


def multipl_e(language: str, stops: list[str]) -> Problem:
    return Problem("HumanEval_0", "f(a) {\n", "", {"language": language, "stop_tokens": stops})


def test_reflection_prompts_are_the_papers() -> None:
    assert render("reflection", make_ask("reflection", "humaneval", HUMANEVAL), None) == (
        "<|user|><|text|>Write a complete Python function for the problem.\n\ndef add(a, b):\n    '''Add.'''"
        "<|endofblock|><|endofmessage|><|assistant|><|text|>```python\n"
    )
    assert render("reflection", make_ask("reflection", "mbpp", MBPP), None) == (
        "<|user|><|text|>Write a function to add.\nYour code should satisfy the following assertion:\n```python\n"
        "assert add(1, 2) == 3\n```<|endofblock|><|endofmessage|><|assistant|><|text|>```python\n"
    )
    rust = render("reflection", make_ask("reflection", "multipl-e", multipl_e("rs", [])), None)
    assert rust.startswith("<|user|><|text|>Write a complete Rust function for the problem.\n\nf(a) {<|endofblock|>")
    assert rust.endswith("<|assistant|><|text|>```rust\nf(a) {\n")


@pytest.mark.parametrize("style", STYLES)
def test_problems_of_ones_own_are_asked_and_answered_as_humanevals(style: Style) -> None:
    raw = (
        "```python\ndef add(a, b):\n    return a + b\n```" if style == "chat" else "    return a + b\n```\ndef main():"
    )
    assert make_ask(style, "functions", HUMANEVAL) == make_ask(style, "humaneval", HUMANEVAL)
    assert stop_strings(style, "functions") == stop_strings(style, "humaneval")
    program = solution(style, "functions", HUMANEVAL, raw)
    assert program == solution(style, "humaneval", HUMANEVAL, raw)
    assert "return a + b" in program


def test_magicoder_prompts_are_the_papers() -> None:
    asked = render("magicoder", make_ask("magicoder", "humaneval", HUMANEVAL), None)
    assert asked.startswith("You are an exceptionally intelligent coding assistant")
    assert asked.endswith(
        "\n\n@@ Instruction\nWrite a solution to the following problem:\n```python\ndef add(a, b):\n    '''Add.'''\n```"
        "\n\n@@ Response\n```python\ndef add(a, b):\n    '''Add.'''"
    )
    assert render("magicoder", make_ask("magicoder", "mbpp", MBPP), None).endswith(
        "Write a function to add. Your code should satisfy the following assertion:\n```python\n"
        "assert add(1, 2) == 3\n```\n\n@@ Response\n```python"
    )
    assert render("magicoder", make_ask("magicoder", "ds1000", DS1000), None).endswith(
        '@@ Instruction\nProblem:\n```python\nx = ...\n```\nresult = ...\n\n\nComplete the Python code in "..."'
        "\n\n@@ Response\n```python"
    )


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ("def f():\n    return 1\n```\nSome words.", "def f():\n    return 1"),
        ("Words.\n```python\ndef f():\n    return 1\n```", "def f():\n    return 1"),
        ("def f():\n    return 1\n\nprint(f())\n```<|endofblock|>", "def f():\n    return 1"),
        ("def f():\n    return 1\n# Test\nf()", "def f():\n    return 1"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("", ""),
    ],
)
def test_reflection_code(raw: str, code: str) -> None:
    assert reflection_code(raw) == code


def test_solutions_of_python() -> None:
    fenced = "  return a + b\n```\nDone."
    assert solution("magicoder", "humaneval", HUMANEVAL, f"\n  {fenced}") == HUMANEVAL.prompt + "\n    return a + b\n"
    assert solution("magicoder", "mbpp", MBPP, "\ndef add(a, b):\n  return 1\nadd(1, 2)\n```") == (
        MBPP.prompt + "def add(a, b):\n  return 1\n"
    )
    body = "    return a + b\n"
    assert solution("completion", "humaneval", HUMANEVAL, f"{body}\ndef g(): pass") == HUMANEVAL.prompt + body
    chat = "Sure:\n```python\n    def add(a, b):\n        return a + b\n```\n"
    assert solution("chat", "humaneval", HUMANEVAL, chat) == HUMANEVAL.prompt + "def add(a, b):\n    return a + b\n"
    assert solution("magicoder", "ds1000", DS1000, "\nx = 1\n```\nwords") == "\nx = 1\n"


def test_solutions_of_other_languages() -> None:
    java, js = multipl_e("java", ["\n    }\n"]), multipl_e("js", ["\nfunction "])
    answer = "    if (a) {\n        }\n    return 1;\n    }\n}\n```\nwords"
    assert solution("reflection", "multipl-e", java, answer) == "f(a) {\n    if (a) {\n        }\n    return 1;"
    # A helper may follow the function: the last end counts.
    assert solution("reflection", "multipl-e", js, "  x\n}\nfunction g() {\n  y\n}\nf(1)") == (
        "f(a) {\n  x\n}\nfunction g() {\n  y\n}"
    )
    assert solution("completion", "multipl-e", js, "  x\n}\nfunction g() {}") == "f(a) {\n  x\n}"
    cpp = multipl_e("cpp", ["\n}"])
    chat = "<think>```js\nwrong\n}\n```</think>\nRun:\n```bash\nnode x\n```\n``` javascript\nf(a) {\n  x\n}\n```\nDone."
    assert solution("chat", "multipl-e", js, chat) == "f(a) {\n  x\n}"
    assert solution("reflection", "multipl-e", cpp, "  x;\n}\nint main() {\n}\n```") == "f(a) {\n  x;"
