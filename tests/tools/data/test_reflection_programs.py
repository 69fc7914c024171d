"""Programs out of texts, tests out of programs, mutants, and words that betray an earlier attempt."""

from __future__ import annotations

import json
import re

import pytest

from reflectron.tools.data.reflection.programs import (
    extract_tests,
    has_tests,
    leftover,
    mutants,
    python_fences,
    without_bodies,
)
from testkit.places import ROOT

QUICKSTART = ROOT / "examples" / "quickstart" / "data" / "reflection.jsonl"


def run(code: str) -> str:
    """Name of the exception that a harmless program ends with, or ``ok``."""
    try:
        exec(compile(code, "test", "exec"), {"__name__": "__main__"})
    except Exception as error:
        return type(error).__name__
    return "ok"


def test_fences() -> None:
    text = (
        "First.\n```python\na = 1\n```\nthen\n```bash\nls\n```\n~~~\nb = 2\n~~~\n```\n>> not python\n```\n"
        "1. in a list\n   ```py\n   def f():\n       pass\n   ```\n```python\nunclosed"
    )
    fences = python_fences(text)
    assert [fence.code for fence in fences] == ["a = 1", "def f():\n    pass"]
    # Unmarked blocks count where nothing is marked, and only if they are Python.
    assert [fence.code for fence in python_fences(text.replace("python", "").replace("py", ""))][:2] == [
        "a = 1",
        "b = 2",
    ]
    assert text[: fences[0].start] == "First.\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("assert f(1)", True),
        ("def test():\n    assert f(1)\ntest()", True),
        ("self.assertEqual(f(1), 2)", True),
        ("print(f(1))", False),
        ("asserted(f(1))", False),
        ("assert f(", False),
        ("\0", False),
    ],
)
def test_has_tests(code: str, expected: bool) -> None:
    assert has_tests(code) is expected


def test_tests_of_a_sequence_leave_its_solution_out() -> None:
    first = (
        "from __future__ import annotations\nimport math\ndef helper(): return 1\ndef f(x): return x\nassert f(1) == 3"
    )
    second = "def f(x):\n    return x + 2\ncases = [(1, 3)]\nfor x, y in cases:\n    assert f(x) == y"
    tests = extract_tests("def f(x):\n    return 2 + x\ndef other(): pass", [first, second])
    assert tests.targets == {"f"}
    assert (
        tests.code
        == "import math\n\ndef helper():\n    return 1\ncases = [(1, 3)]\nfor x, y in cases:\n    assert f(x) == y"
    )


def test_an_answer_without_the_tested_function_has_no_targets() -> None:
    assert not extract_tests("def g(x): return x", ["def f(x): return x\nassert f(1) == 1"]).targets


PROGRAM = '''
@cache(10)
def f(values: list[int], limit: int = 5) -> int:
    """Sum of 1."""
    total = 0
    for value in values:
        if value < limit and not value == 2:
            total += value * 3
    print("done")
    return total
'''


def test_mutants_change_one_place_of_a_body() -> None:
    found = list(mutants(PROGRAM))
    assert [mutant.change for mutant in found[:6]] == [
        "return, line 10",
        "comparison, line 7",
        "constant, line 5",
        "arithmetic, line 8",
        "logic, line 7",
        "statement, line 5",
    ]
    codes = [mutant.code for mutant in found]
    assert len(set(codes)) == len(codes) == 13
    for part in ("@cache(10)", "limit: int=5", '"""Sum of 1."""'):
        assert all(part in code for code in codes)
    for part in (
        "return None",
        "value >= limit",
        "value != 2",
        "total = 1",
        "value + 3",
        "limit or not",
        "not not value",
    ):
        assert sum(part in code for code in codes) == 1, part


def test_every_quickstart_solution_has_a_mutant_that_its_tests_kill() -> None:
    checked = 0
    for line in QUICKSTART.read_text().splitlines()[::9]:
        sequence, _, answer = json.loads(line)["messages"][1:]
        programs = [block["content"] for block in sequence["content"] if block["type"] == "code"]
        if not has_tests(programs[-1]):
            continue
        [fence] = python_fences(answer["content"][0]["content"])
        tests = extract_tests(fence.code, programs)
        assert tests.targets
        assert run(f"{fence.code}\n{tests.code}") == "ok"
        assert run(f"{without_bodies(fence.code, tests.targets)}\n{tests.code}") == "NotImplementedError"
        assert "AssertionError" in (run(f"{mutant.code}\n{tests.code}") for mutant in mutants(fence.code))
        checked += 1
    assert checked > 10


@pytest.mark.parametrize(
    "text",
    [
        "Here is the corrected version of the code.",
        "I fixed the bug in the loop.",
        "As mentioned, the list is sorted.",
        "As explained above, it is linear.",
        "The previous attempt overlooked empty lists.",
        "# fixes an off-by-one error\nreturn x",
        "It now handles empty lists, and all tests pass.",
        "The code now works.",
        "I apologize for the confusion.",
        "The interpreter printed 4.",
        "After debugging, this is the result.",
        "This is the updated solution:",
    ],
)
def test_leftovers_are_found(text: str) -> None:
    assert leftover(text, "Write a function.")


@pytest.mark.parametrize(
    "text",
    [
        "The function walks the list and compares each element with the previous one.",
        "It returns a new list; the original list is not changed.",
        "The last run of equal letters is appended after the loop.",
        "Raise an error if the value is negative.",
        "Split at the first space, as shown in the example.",
        "A fixed window slides over the text; the initial value is 0.",
        "Each test value is now doubled.",
        "`correct_answers` counts the correct answers.",
    ],
)
def test_plain_explanations_are_not_leftovers(text: str) -> None:
    assert leftover(text, "Write a function.") is None


def test_the_problems_own_words_are_allowed() -> None:
    assert (
        leftover("Return the corrected version of the text.", "Write f(text): the Corrected\nversion of the text.")
        is None
    )


def test_no_quickstart_answer_has_leftovers() -> None:
    answers = [json.loads(line)["messages"][3]["content"][0]["content"] for line in QUICKSTART.read_text().splitlines()]
    assert not [found for answer in answers if (found := leftover(answer, ""))]
    assert all(re.search("```python", answer) for answer in answers)
