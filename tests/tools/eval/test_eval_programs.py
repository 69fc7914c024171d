"""MultiPL-E in the languages of this machine and DS-1000: right programs pass, others do not."""

from __future__ import annotations

import shutil

import pytest

from reflectron.tools.benchmarks import ds1000
from reflectron.tools.benchmarks.benchmark import BenchmarkProblem, JudgeLimits, JudgeSettings, SuiteVerdict
from reflectron.tools.benchmarks.multipl_e import judge_program, missing_toolchains

SETTINGS = JudgeSettings(limits=JudgeLimits(), kind="bubblewrap", workers=1)
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
# Programs that leave with 0 before their tests have begun.
EARLY = {
    "js": lambda prompt, body: f"process.exit(0);\n{prompt}{body}",
    "cpp": lambda prompt, body: f"#include<cstdlib>\nstatic int left = (std::_Exit(0), 0);\n{prompt}{body}",
    "rs": lambda prompt, body: prompt + "std::process::exit(0)",
    "java": lambda prompt, body: prompt + "    System.exit(0); return 0;",
    "php": lambda prompt, body: prompt + body + "\nexit(0);",
    "swift": lambda prompt, body: f"import Foundation\nexit(0)\n{prompt}{body}",
}
DS1000 = BenchmarkProblem(
    "DS-1000/0",
    "",
    "",
    {
        "metadata": {"library": "Numpy"},
        "code_context": "import numpy as np\ndef test_execution(code):\n    names = {'np': np}\n    exec(code, names)\n"
        "    assert names['result'].tolist() == [1, 2]\ndef test_string(code):\n    assert 'for' not in code\n",
    },
)


def problem(language: str) -> BenchmarkProblem:
    prompt, _, tests = MULTIPL_E[language]
    return BenchmarkProblem("HumanEval_0", prompt, "", {"language": language, "tests": tests, "stop_tokens": []})


@pytest.mark.slow
@pytest.mark.parametrize("language", MULTIPL_E)
def test_multipl_e(language: str) -> None:
    if missing := missing_toolchains([problem(language)]):
        pytest.skip(missing[language])
    prompt, body, _ = MULTIPL_E[language]
    right = judge_program(problem(language), prompt + body, SETTINGS)
    assert right.status == "pass", right
    wrong = judge_program(problem(language), prompt + body.replace("+", "-"), SETTINGS)
    broken = judge_program(problem(language), prompt + body + "(", SETTINGS)
    assert (wrong.status, broken.status) == ("fail", "fail")
    early = judge_program(problem(language), EARLY[language](prompt, body), SETTINGS)
    assert early == SuiteVerdict("fail", got="the program ended before its tests did")


@pytest.mark.slow
def test_ds1000() -> None:
    judged = [
        ds1000.judge_program(DS1000, code, SETTINGS).status
        for code in ("result = np.array([1, 2])", "result = np.array([1])", "for i in (1,): result = np.array([1, 2])")
    ]
    assert judged == ["pass", "fail", "fail"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import os; print(os.read(0, 99).decode())'])",
        "import os, re\nprint(re.findall('[0-9a-f]{32}', open('problem.py').read()))\nos._exit(0)",
        "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(1)",
        "result = np.array([1, 2]); import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_ds1000_counts_no_program_that_ends_early(code: str) -> None:
    verdict = ds1000.judge_program(DS1000, code, SETTINGS)
    assert verdict.status != "pass"
    assert "ended before its tests did" in verdict.got or verdict.status == "timeout", verdict


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def which(name: str) -> str | None:
        return None if name in ("swiftc", "node") else f"/usr/bin/{name}"

    monkeypatch.setattr(shutil, "which", which)
    rows = [BenchmarkProblem("a", "", "", {"language": language}) for language in ("js", "cpp", "swift", "lua")]
    missing = missing_toolchains(rows)
    assert missing["js"] == "node is not installed"
    assert missing["swift"] == "swiftc is not installed"
    assert missing["lua"].startswith("not supported")
    assert "cpp" not in missing
