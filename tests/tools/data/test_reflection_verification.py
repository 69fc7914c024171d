"""Verdicts on answers, from true runs in the sandbox."""

from __future__ import annotations

import pytest

from reflectron.tools.data.reflection.execution import sandbox_runner, verify
from reflectron.tools.data.reflection.programs import extract_tests
from reflectron.tools.sandbox.wall import SandboxLimits

pytestmark = pytest.mark.slow

SCRIPT = "reflectron/tools/data/reflection/trial.py"
ANSWER = "def half(x):\n    return x // 2"


@pytest.mark.parametrize(
    ("program", "fate"),
    [
        ("x = 1", "passed"),
        ("assert False, 'several\\nlines: of text'", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "ended before its tests"),
        ("raise SystemExit(3)", "exit code 3"),
        ("while True: pass", "wall_time"),
        ("import json\njson.loads('{')", "json.decoder.JSONDecodeError"),
    ],
)
def test_fates(program: str, fate: str) -> None:
    run = sandbox_runner("bubblewrap", SandboxLimits(wall_seconds=1.0 if "while" in program else 60.0, cpu_seconds=60))
    for ended in (run(program, ""), run("", program)):
        assert (ended.passed, ended.reason or "passed") == (fate == "passed", fate)


# Each ends before the tests could fail, and looks for what would pass for their end.
FORGERIES = {
    "reads its source": f"import os, sys\nsys.stderr.write(open('{SCRIPT}').read() + str(os.listdir()))\nos._exit(0)",
    "writes all it can find": """
import gc, os, sys
for fd in range(3, 16):
    for text in [object for object in gc.get_objects() if isinstance(object, str)][:99] + ["passed"]:
        try:
            os.write(fd, (repr(text) + "\\n").replace("'", '"').encode())
        except OSError:
            pass
os._exit(0)
""",
    "says that it passed": """
import os
for fd in range(3, 16):
    try:
        os.write(fd, b'{"passed": true, "reason": ""}\\n' * 4)
    except OSError:
        pass
os._exit(0)
""",
    "exits in the function": "import sys\ndef half(x):\n    sys.exit(0)",
    "exits at once in the function": "import os\ndef half(x):\n    os._exit(0)",
    "exits from a hook": "import os, sys\nsys.excepthook = lambda *args: os._exit(0)\ndef half(x): return 0",
    "runs without assertions": f"import os, sys\nif __debug__: os.execv(sys.executable, ['-', '-O', '{SCRIPT}'])",
    "raises what is called like a success": "class passed(Exception): pass\ndef half(x): raise passed",
    "nonsense": "import os\nfor fd in (3, 4, 5):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n    except OSError: 0",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_ends_early_does_not_pass(name: str) -> None:
    run = sandbox_runner("bubblewrap", SandboxLimits(wall_seconds=60, cpu_seconds=60))
    assert run(FORGERIES[name], "assert half(5) == 2").passed is False


def test_tests_are_not_there_before_the_code_has_run() -> None:
    code = """
import gc, os
word = "marked" + "_word"
found = [object for object in gc.get_objects() if isinstance(object, (str, bytes)) and word in str(object)]
paths = [os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names]
files = [path for path in paths if word in open(path, errors="replace").read()]
seen = len(found) + len(files)
"""
    run = sandbox_runner("bubblewrap", SandboxLimits(wall_seconds=60, cpu_seconds=60))
    assert run(code, "marked_word = seen\nassert not marked_word").passed


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert half(5) == 2", None),
        ("assert half(5) == 3", "tests fail on the answer: AssertionError"),
        ("assert half(5) or True", "vacuous tests: no assertion fails for any of 3 mutants"),
        ("assert half", "tests call nothing: half may raise and they still pass"),
    ],
)
def test_verdicts(tests: str, reason: str | None) -> None:
    run = sandbox_runner("bubblewrap", SandboxLimits(wall_seconds=60, cpu_seconds=60))
    verdict = verify(ANSWER, extract_tests(ANSWER, [f"{ANSWER}\n{tests}"]), 8, run)
    assert verdict.reason == reason
    assert (verdict.killed_by is None) == (reason is not None)
