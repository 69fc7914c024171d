"""MultiPL-E in the languages of this machine, DS-1000, problems of one's own: right programs pass, others do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reflectron.tools.cli import main
from reflectron.tools.eval.problems import Problem
from reflectron.tools.eval.programs import judge_program, missing_toolchains

# In the form of MultiPL-E's rows: prompt, body and tests make one program.
MULTIPL_E = {
    "js": (
        "function add(a, b) {\n",
        "  return a + b;\n}",
        "const assert = require('node:assert');\nassert(add(1, 2) == 3);",
    ),
    "cpp": (
        "#include<assert.h>\nlong add(long a, long b) {\n",
        "  return a + b;",
        "}\nint main() {\n  assert(add(1, 2) == 3);\n}",
    ),
    "rs": ("fn add(a: i64, b: i64) -> i64 {\n", "  return a + b;", "}\nfn main() {\n  assert_eq!(add(1, 2), 3);\n}"),
    "java": (
        "class Problem {\n  public static long add(long a, long b) {\n",
        "    return a + b;",
        "  }\n  public static void main(String[] args) {\n    assert(add(1, 2) == 3);\n  }\n}",
    ),
    "php": (
        "<?php\nfunction add($a, $b) {\n",
        "  return $a + $b;\n}",
        "if (add(1, 2) !== 3) { throw new Exception(); }",
    ),
    "swift": ("func add(a: Int, b: Int) -> Int {\n", "  return a + b", "}\nassert(add(a: 1, b: 2) == 3)"),
}
DS1000 = Problem(
    "DS-1000/0",
    "",
    "",
    {
        "metadata": {"library": "Numpy"},
        "code_context": "import numpy as np\ndef test_execution(code):\n    names = {'np': np}\n    exec(code, names)\n"
        "    assert names['result'].tolist() == [1, 2]\ndef test_string(code):\n    assert 'for' not in code\n",
    },
)


def problem(language: str) -> Problem:
    prompt, _, tests = MULTIPL_E[language]
    return Problem("HumanEval_0", prompt, "", {"language": language, "tests": tests, "stop_tokens": []})


@pytest.mark.slow
@pytest.mark.parametrize("language", MULTIPL_E)
def test_multipl_e(language: str) -> None:
    if missing := missing_toolchains([problem(language)]):
        pytest.skip(missing[language])
    prompt, body, _ = MULTIPL_E[language]
    right = judge_program(problem(language), prompt + body, "bubblewrap", None)
    assert right.status == "pass", right
    wrong = judge_program(problem(language), prompt + body.replace("+", "-"), "bubblewrap", None)
    broken = judge_program(problem(language), prompt + body + "(", "bubblewrap", None)
    assert (wrong.status, broken.status) == ("fail", "fail")


@pytest.mark.slow
def test_ds1000() -> None:
    judged = [
        judge_program(DS1000, code, "bubblewrap", None).status
        for code in ("result = np.array([1, 2])", "result = np.array([1])", "for i in (1,): result = np.array([1, 2])")
    ]
    assert judged == ["pass", "fail", "fail"]


OWN = {
    "task_id": "own/0",
    "prompt": 'def add(a, b):\n    """The sum of a and b."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}
ANSWERS = {
    "def add(a, b):\n    return a + b": "pass",
    "def add(a, b):\n    return 3": "fail",
    "def add(a, b):\n    return a + b\nimport sys; sys.exit(0)": "fail",
    "def add(a, b):\n    import os; os._exit(0)": "fail",
    "def add(a, b):\n    while True: pass": "timeout",
    "def add(a": "fail",
    "# \ud800": "fail",
}


@pytest.mark.slow
def test_problems_of_ones_own(tmp_path: Path) -> None:
    problems, completions, out = tmp_path / "mine.jsonl", tmp_path / "answers.jsonl", tmp_path / "score.json"
    rows = [OWN | {"task_id": f"own/{number}"} for number in range(len(ANSWERS))]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"task_id": f"own/{n}", "solution": OWN["prompt"] + code} for n, code in enumerate(ANSWERS)]
    completions.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    words = ["eval", "score", str(completions), "--dataset", str(problems), "--min-time-limit", "1", "--json", str(out)]
    assert main(words) == 0
    score = json.loads(out.read_text())
    assert (score["dataset"], score["pass_at_1"]) == ("mine.jsonl", {"base": pytest.approx(1 / len(ANSWERS))})
    statuses = {row["task_id"]: row["base"] for row in score["failed"]}
    assert [statuses.get(f"own/{n}", "pass") for n in range(len(ANSWERS))] == list(ANSWERS.values())
    assert "ended before its check did" in score["failed"][1]["got"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(name: str) -> str | None:
        return None if name in ("swiftc", "node") else f"/usr/bin/{name}"

    monkeypatch.setattr(shutil, "which", which)
    rows = [Problem("a", "", "", {"language": language}) for language in ("js", "cpp", "swift", "lua")]
    missing = missing_toolchains(rows)
    assert missing["js"] == "node is not installed"
    assert missing["swift"] == "swiftc is not installed"
    assert missing["lua"].startswith("not supported")
    assert "cpp" not in missing
