"""Scoring: evalplus's own verdicts task by task, and programs that do harm harm nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = {"humaneval": "humaneval_plus_subset.jsonl", "mbpp": "mbpp_plus_subset.jsonl"}
# The whole sets, where somebody has them: REFLECTRON_TEST_HUMANEVAL=.../HumanEvalPlus-v0.1.10.jsonl.gz
WHOLE = {name: os.environ.get(f"REFLECTRON_TEST_{name.upper()}") for name in FILES}

# What a task is answered with by hand: one that is nearly right, so that only plus tests fail, and wrong ones.
WRONG = {
    "HumanEval/2": "def truncate_number(number): return number - int(number) if number < 1e6 else 0.0",
    "HumanEval/34": "def unique(l): return list(set(l))",
    "HumanEval/53": "def add(x, y): return x + y if x < 100 else 0",
    "HumanEval/162": "import hashlib\ndef string_to_md5(text): return hashlib.md5(text.encode()).hexdigest()",
    "Mbpp/2": "def similar_elements(a, b): return iter(set(a) & set(b))",
    "Mbpp/3": "def is_not_prime(n): return n % 2 == 0",
    "Mbpp/88": "from collections import defaultdict\ndef freq_count(l):\n  d = defaultdict(int)\n"
    "  for x in l: d[x] += 1\n  return d",
    "Mbpp/124": "import cmath\ndef angle_complex(a, b): return round(cmath.phase(a + b), 3)",
    "Mbpp/252": "class C(tuple): pass\nimport cmath\ndef convert(n): return C(cmath.polar(n))",
    "Mbpp/581": "def surface_Area(b, s): return 2 * b * s + b * b",
}
# Canonical solutions that evalplus 0.3.1 fails: the second one's expected answers take 780 MB.
CANONICAL_FAILING = {"HumanEval/32", "Mbpp/255"}
FAILING = {"humaneval": {"HumanEval/34", "HumanEval/53", "HumanEval/162"}, "mbpp": {"Mbpp/3", "Mbpp/124"}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def score(completions: Path, dataset: str, data: Path, cache: Path, *words: str) -> dict[str, Any]:
    out = completions.with_suffix(".score.json")
    command = [sys.executable, "-m", "reflectron.tools.cli", "eval", "score", completions, "--dataset", dataset]
    done = subprocess.run(
        [*command, "--data", data, "--json", out, *words],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "EVALPLUS_TIMEOUT_PER_TASK": "60"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def by_hand(completions: Path, dataset: str, data: Path, cache: Path) -> dict[str, list[tuple[str, str]]]:
    """Statuses on base and plus of every sample, from evalplus's own command."""
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", dataset, "--samples", str(completions)]
    variables = {f"{dataset.upper()}_OVERRIDE_PATH": str(data), "XDG_CACHE_HOME": str(cache)}
    subprocess.run(
        # Its limits are of wall time, which a loaded machine does not keep.
        [*command, "--min-time-limit", "60", "--parallel", "2"],
        env={**os.environ, **variables},
        capture_output=True,
        check=True,
    )
    found = json.loads(completions.with_name(f"{completions.stem}_eval_results.json").read_text())["eval"]
    return {task: [(row["base_status"], row["plus_status"]) for row in samples] for task, samples in found.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", FILES)
def test_verdicts_are_those_of_evalplus(dataset: str, tmp_path: Path, cache: Path) -> None:
    data = BENCHMARKS / FILES[dataset]
    if WHOLE[dataset]:
        data = tmp_path / "whole.jsonl"
        from reflectron.tools.eval.rows import read_json_lines

        write(data, [row for _, row in read_json_lines(Path(WHOLE[dataset] or ""))])
    problems = rows(data)
    samples = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in problems]
    samples += [
        {"task_id": t, "solution": code}
        for t, code in WRONG.items()
        if t.startswith(("Human", "Mbpp")[dataset == "mbpp"])
    ]
    completions = write(tmp_path / "completions.jsonl", samples)
    ours = score(completions, dataset, data, cache)
    theirs = by_hand(completions, dataset, data, cache)
    passes = {(f["task_id"], f["sample"]): (f["base"] == "pass", f["plus"] == "pass") for f in ours["failed"]}
    expected = {
        (task, number): (base == "pass", plus == "pass")
        for task, statuses in theirs.items()
        for number, (base, plus) in enumerate(statuses)
    }
    assert {sample: passes.get(sample, (True, True)) for sample in expected} == expected
    canonical = {f["task_id"] for f in ours["failed"] if f["sample"] == 0}
    assert canonical == CANONICAL_FAILING & set(theirs)
    wrong = {f["task_id"] for f in ours["failed"] if f["sample"] == 1}
    if WHOLE[dataset]:
        # More inputs catch more.
        assert wrong >= FAILING[dataset]
        return
    assert wrong == FAILING[dataset], "what is equal to the expected answer without being of its type passes"


HARMFUL = {
    "empty": "",
    "prose": "Here is the solution: it adds.",
    "hanging": """
def add(x, y):
    while True:
        try:
            pass
        except BaseException:
            pass
""",
    "memory": """
def add(x, y):
    held = []
    while True:
        held.append(bytearray(10**8))
""",
    "deleting": """
import os, pathlib, shutil
for remove in (shutil.rmtree, pathlib.Path.unlink):
    try:
        remove(pathlib.Path("VICTIM"))
    except BaseException:
        pass
def add(x, y):
    return x + y if pathlib.Path("VICTIM").exists() else 0
""",
    "forks": """
import posix
def add(x, y):
    while True:
        try:
            posix.fork()
        except OSError:
            pass
""",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import posix\nposix._exit(0)",
    "equal to all": """
class A:
    def __eq__(self, other):
        return True
def add(x, y):
    return A()
""",
    "equal number": """
class A(int):
    def __eq__(self, other):
        return True
def add(x, y):
    return A(-7)
""",
    "patching": """
import builtins, numpy, evalplus.eval
numpy.allclose = lambda *a, **k: True
builtins.AssertionError = Exception
evalplus.eval.unsafe_execute = None
def add(x, y):
    return -7
""",
    "forging": """
import posix
for n in (0, 1):
    pipe = posix.open(f"answers.{n}", posix.O_WRONLY | posix.O_NONBLOCK)
    posix.write(pipe, b'cos\\nsystem\\n(S"touch VICTIM.owned"\\ntR.' * 50)
def add(x, y):
    return None
""",
    "cyclic": """
def add(x, y):
    a = []
    a.append(a)
    return a
""",
}


@pytest.mark.slow
def test_harmful_programs_fail_without_harm(tmp_path: Path, cache: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    task = {"task_id": "HumanEval/53"}
    codes = [code.replace("VICTIM", str(victim)) for code in HARMFUL.values()]
    right = {**task, "solution": "def add(x, y):\n    return x + y"}
    samples = [right, *({**task, "solution": code} for code in codes), right]
    completions = write(tmp_path / "harmful.jsonl", samples)
    data = BENCHMARKS / FILES["humaneval"]
    result = score(completions, "humaneval", data, cache, "--partial", "--min-time-limit", "1", "--workers", "2")
    failed = {failure["sample"]: failure for failure in result["failed"]}
    assert sorted(failed) == list(range(1, len(HARMFUL) + 1)), "the right ones beside them pass"
    assert all(failure["base"] != "pass" for failure in failed.values())
    names = dict(zip(HARMFUL, range(1, len(HARMFUL) + 1), strict=True))
    assert failed[names["hanging"]]["base"] == "timeout"
    assert victim.read_text() == "here"
    assert list(tmp_path.glob("victim.*")) == []
    wrong = failed[names["patching"]]
    assert (wrong["input"], wrong["expected"], wrong["got"]) == ("[0, 1]", "1", "-7")
    alone = score(completions, "humaneval", data, cache, "--partial", "--min-time-limit", "1", "--workers", "1")
    status = [(failure["sample"], failure["base"], failure["plus"]) for failure in result["failed"]]
    assert [(failure["sample"], failure["base"], failure["plus"]) for failure in alone["failed"]] == status
