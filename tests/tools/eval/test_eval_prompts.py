"""Prompts word for word as the papers', and what is made of answers."""

from __future__ import annotations

import pytest

from reflectron.tools.benchmarks.benchmark import STYLES, BenchmarkProblem, Style, make_ask, render, stop_strings
from reflectron.tools.benchmarks.ds1000 import DS1000
from reflectron.tools.benchmarks.extraction import reflection_code
from reflectron.tools.benchmarks.humaneval import HUMANEVAL
from reflectron.tools.benchmarks.mbpp import MBPP
from reflectron.tools.benchmarks.multipl_e import MULTIPL_E
from reflectron.tools.benchmarks.own import OWN

FUNCTION = BenchmarkProblem("HumanEval/0", "\ndef add(a, b):\n    '''Add.'''\n", "add", {})
TEXT = BenchmarkProblem("Mbpp/1", '"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n', "add", {})
QUESTION = BenchmarkProblem("DS-1000/0", "Problem:\n<code>\nx = ...\n</code>\nresult = ...\n", "", {})


def multipl_e(language: str, stops: list[str]) -> BenchmarkProblem:
    return BenchmarkProblem("HumanEval_0", "f(a) {\n", "", {"language": language, "stop_tokens": stops})


def test_reflection_prompts_are_the_papers() -> None:
    assert render("reflection", make_ask("reflection", HUMANEVAL, FUNCTION), None) == (
        "<|user|><|text|>Write a complete Python function for the problem.\n\ndef add(a, b):\n    '''Add.'''"
        "<|endofblock|><|endofmessage|><|assistant|><|text|>```python\n"
    )
    assert render("reflection", make_ask("reflection", MBPP, TEXT), None) == (
        "<|user|><|text|>Write a function to add.\nYour code should satisfy the following assertion:\n```python\n"
        "assert add(1, 2) == 3\n```<|endofblock|><|endofmessage|><|assistant|><|text|>```python\n"
    )
    rust = render("reflection", make_ask("reflection", MULTIPL_E, multipl_e("rs", [])), None)
    assert rust.startswith("<|user|><|text|>Write a complete Rust function for the problem.\n\nf(a) {<|endofblock|>")
    assert rust.endswith("<|assistant|><|text|>```rust\nf(a) {\n")


@pytest.mark.parametrize("style", STYLES)
def test_problems_of_ones_own_are_asked_and_answered_as_humanevals(style: Style) -> None:
    raw = (
        "```python\ndef add(a, b):\n    return a + b\n```" if style == "chat" else "    return a + b\n```\ndef main():"
    )
    assert make_ask(style, OWN, FUNCTION) == make_ask(style, HUMANEVAL, FUNCTION)
    assert stop_strings(style, OWN) == stop_strings(style, HUMANEVAL)
    program = OWN.solution(style, FUNCTION, raw)
    assert program == HUMANEVAL.solution(style, FUNCTION, raw)
    assert "return a + b" in program


def test_magicoder_prompts_are_the_papers() -> None:
    asked = render("magicoder", make_ask("magicoder", HUMANEVAL, FUNCTION), None)
    assert asked.startswith("You are an exceptionally intelligent coding assistant")
    assert asked.endswith(
        "\n\n@@ Instruction\nWrite a solution to the following problem:\n```python\ndef add(a, b):\n    '''Add.'''\n```"
        "\n\n@@ Response\n```python\ndef add(a, b):\n    '''Add.'''"
    )
    assert render("magicoder", make_ask("magicoder", MBPP, TEXT), None).endswith(
        "Write a function to add. Your code should satisfy the following assertion:\n```python\n"
        "assert add(1, 2) == 3\n```\n\n@@ Response\n```python"
    )
    assert render("magicoder", make_ask("magicoder", DS1000, QUESTION), None).endswith(
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
    assert HUMANEVAL.solution("magicoder", FUNCTION, f"\n  {fenced}") == FUNCTION.prompt + "\n    return a + b\n"
    assert MBPP.solution("magicoder", TEXT, "\ndef add(a, b):\n  return 1\nadd(1, 2)\n```") == (
        TEXT.prompt + "def add(a, b):\n  return 1\n"
    )
    body = "    return a + b\n"
    assert HUMANEVAL.solution("completion", FUNCTION, f"{body}\ndef g(): pass") == FUNCTION.prompt + body
    chat = "Sure:\n```python\n    def add(a, b):\n        return a + b\n```\n"
    assert HUMANEVAL.solution("chat", FUNCTION, chat) == FUNCTION.prompt + "def add(a, b):\n    return a + b\n"
    assert DS1000.solution("magicoder", QUESTION, "\nx = 1\n```\nwords") == "\nx = 1\n"


def test_solutions_of_other_languages() -> None:
    java, js = multipl_e("java", ["\n    }\n"]), multipl_e("js", ["\nfunction "])
    answer = "    if (a) {\n        }\n    return 1;\n    }\n}\n```\nwords"
    assert MULTIPL_E.solution("reflection", java, answer) == "f(a) {\n    if (a) {\n        }\n    return 1;"
    # A helper may follow the function: the last end counts.
    assert MULTIPL_E.solution("reflection", js, "  x\n}\nfunction g() {\n  y\n}\nf(1)") == (
        "f(a) {\n  x\n}\nfunction g() {\n  y\n}"
    )
    assert MULTIPL_E.solution("completion", js, "  x\n}\nfunction g() {}") == "f(a) {\n  x\n}"
    cpp = multipl_e("cpp", ["\n}"])
    chat = "<think>```js\nwrong\n}\n```</think>\nRun:\n```bash\nnode x\n```\n``` javascript\nf(a) {\n  x\n}\n```\nDone."
    assert MULTIPL_E.solution("chat", js, chat) == "f(a) {\n  x\n}"
    assert MULTIPL_E.solution("reflection", cpp, "  x;\n}\nint main() {\n}\n```") == "f(a) {\n  x;"
