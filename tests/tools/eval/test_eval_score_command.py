"""Scoring: evalplus's own verdicts task by task, and programs that do harm harm nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from testkit.places import TESTS_DIR

BENCHMARKS = TESTS_DIR / "benchmarks"
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
# Takes three seconds once, which evalplus's limit of one second refuses.
SLOW = """
import time
def add(x, y):
    global slow
    while slow and time.process_time() < slow:
        pass
    slow = 0
    return x + y
slow = time.process_time() + 3
"""
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


Passed = dict[tuple[str, int], tuple[bool, bool]]
"""Whether a sample passes base and plus, by task and number."""


def by_hand(completions: Path, dataset: str, data: Path, cache: Path, ours: Passed, trials: int = 4) -> Passed:
    """What evalplus's own command says, with its own limits.

    These are of wall time, which a loaded machine does not keep: where it fails what passes here, it is asked again
    about these tasks alone, one sample at a time. Once it passes a sample, it was not the program that was slow.
    """
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", dataset, "--samples", str(completions)]
    variables = {f"{dataset.upper()}_OVERRIDE_PATH": str(data), "XDG_CACHE_HOME": str(cache)}
    subprocess.run(
        [*command, "--parallel", "2" if trials == 4 else "1"],
        env={**os.environ, **variables},
        capture_output=True,
        check=True,
    )
    said = json.loads(completions.with_name(f"{completions.stem}_eval_results.json").read_text())["eval"]
    found = {
        (task, number): (row["base_status"] == "pass", row["plus_status"] == "pass")
        for task, given in said.items()
        for number, row in enumerate(given)
    }
    tasks = {task for (task, number), passed in found.items() if passed < ours[task, number]}
    if tasks and trials > 1:
        again = completions.with_name(f"again-{trials}.jsonl")
        write(again, [sample for sample in rows(completions) if sample["task_id"] in tasks])
        fewer = write(data.with_name(f"fewer-{trials}.jsonl"), [row for row in rows(data) if row["task_id"] in tasks])
        for key, passed in by_hand(again, dataset, fewer, cache, ours, trials - 1).items():
            found[key] = (found[key][0] or passed[0], found[key][1] or passed[1])
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("dataset", FILES)
def test_verdicts_are_those_of_evalplus(dataset: str, tmp_path: Path, cache: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows(BENCHMARKS / FILES[dataset]))
    if WHOLE[dataset]:
        from reflectron.tools.benchmarks.catalogue import read_json_lines

        write(data, [row for _, row in read_json_lines(Path(WHOLE[dataset] or ""))])
    problems = rows(data)
    samples = [{"task_id": p["task_id"], "completion": p["canonical_solution"]} for p in problems]
    by_us = {**WRONG, "HumanEval/53 slow": SLOW}
    samples += [
        {"task_id": t.partition(" ")[0], "solution": code}
        for t, code in by_us.items()
        if t.startswith(("Human", "Mbpp")[dataset == "mbpp"])
    ]
    completions = write(tmp_path / "completions.jsonl", samples)
    ours = score(completions, dataset, data, cache)
    passed = {
        (task, n): (True, True) for task, count in Counter(s["task_id"] for s in samples).items() for n in range(count)
    }
    passed |= {(f["task_id"], f["sample"]): (f["base"] == "pass", f["plus"] == "pass") for f in ours["failed"]}
    theirs = by_hand(completions, dataset, data, cache, passed)
    assert passed == theirs
    at_limit = [(row["task_id"], row["sample"], row["longer"]) for row in ours["at_limit"]]
    assert at_limit == [("HumanEval/53", 2, {"base": "pass", "plus": "pass"})] * (dataset == "humaneval")
    canonical = {f["task_id"] for f in ours["failed"] if f["sample"] == 0}
    assert canonical == CANONICAL_FAILING & {task for task, _ in theirs}
    wrong = {f["task_id"] for f in ours["failed"] if f["sample"] == 1}
    if WHOLE[dataset]:
        # More inputs catch more.
        assert wrong >= FAILING[dataset]
        return
    assert wrong == FAILING[dataset], "what is equal to the expected answer without being of its type passes"


HOSTILE_PREAMBLE = """
import posix
def MESSAGE(size, content):
    return size.to_bytes(8, "little") + content
def OUT(suite, content):
    try:
        pipe = posix.open(f"answers.{suite}", posix.O_WRONLY | posix.O_NONBLOCK)
        posix.set_blocking(pipe, True)
        while content:
            content = content[posix.write(pipe, content):]
        posix.close(pipe)
    except OSError:
        posix._exit(0)
def SUITE():
    for name in posix.listdir("/proc/self/fd"):
        try:
            if posix.readlink(f"/proc/self/fd/{name}").endswith("answers.1"): return 1
        except OSError:
            pass
    return 0
"""


@pytest.mark.slow
def test_hostile_samples_fail_alone(tmp_path: Path, cache: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    hostile = yaml.safe_load((TESTS_DIR / "hostile" / "hostile_samples.yaml").read_text(encoding="utf-8"))
    task = {"task_id": "HumanEval/53"}
    right = {**task, "solution": "def add(x, y):\n    return x + y"}
    samples = [right]
    for attack in hostile.values():
        code = attack["code"].replace("VICTIM", str(victim)).replace("\ue000", "\udcff")
        samples += [{**task, "solution": HOSTILE_PREAMBLE + code}]
    # One program that computes nothing, for each task of the file.
    forged = rows(TESTS_DIR / "hostile" / "forged_pickles.jsonl")
    completions = write(tmp_path / "hostile.jsonl", [*samples, right, *forged])
    data = BENCHMARKS / FILES["humaneval"]
    result = score(completions, "humaneval", data, cache, "--partial", "--workers", "2")
    assert result["n_samples"] == len(samples) + 1 + len(forged)
    failed = {(failure["task_id"], failure["sample"]): failure for failure in result["failed"]}
    wrong = {}
    for number, (name, attack) in enumerate(hostile.items(), 1):
        failure = failed.get((task["task_id"], number), {"base": "pass", "plus": "pass"})
        passed = {suite for suite in ("base", "plus") if failure[suite] == "pass"} - set(attack.get("may_pass", []))
        if passed != set(attack.get("passes", [])):
            wrong[name] = failure
    assert wrong == {}
    assert ("HumanEval/53", 0) not in failed, "the right ones beside them pass"
    assert ("HumanEval/53", len(samples)) not in failed
    numbers = {(row["task_id"], len(samples) + 1 if row["task_id"] == "HumanEval/53" else 0) for row in forged}
    assert numbers <= failed.keys(), "a program that computes nothing passes nothing"
    assert victim.read_text() == "here"
    assert list(tmp_path.glob("victim.*")) == []
    texts = [text for failure in failed.values() for text in failure.values() if isinstance(text, str)]
    assert all(text.isprintable() and len(text) <= 300 for text in texts)
    named = {name: failed.get((task["task_id"], number)) for number, name in enumerate(hostile, 1)}
    assert named["hanging"]["base"] == "timeout"
    assert [named["patching"][key] for key in ("input", "expected", "got")] == ["[0, 1]", "1", "-7"]


# Base inputs, and an answer for each.
SIMILAR = "def similar_elements(a, b): return tuple(set(a) & set(b))"
# A list is no set before evalplus makes one of it, which takes hours where all its elements have the same hash.
QUADRATIC = "def similar_elements(a, b): return [n * (2**61 - 1) for n in range(200_000)]"


@pytest.mark.slow
def test_a_comparison_that_hangs_fails_its_sample_alone(tmp_path: Path) -> None:
    from reflectron.tools.benchmarks.benchmark import JudgeLimits
    from reflectron.tools.benchmarks.evalplus_judge import EvalplusJudge
    from reflectron.tools.benchmarks.expectations import Task

    inputs: tuple[list[Any], list[Any]] = ([[(3, 4), (4, 5)]], [[(1, 2), (2, 1)]])
    task = Task("mbpp", "Mbpp/2", "similar_elements", SIMILAR, 0, inputs, answer_form="set", expected_form="set")
    with EvalplusJudge(JudgeLimits(comparing_seconds=1), "bubblewrap", tmp_path) as judge:
        assert [verdict.status for verdict in judge.judge(task, SIMILAR)] == ["pass", "pass"]
        hanging = judge.judge(task, QUADRATIC)
        assert {verdict.got for verdict in hanging} == {"comparing its answers took more than 1 s of CPU time"}
        assert [verdict.status for verdict in judge.judge(task, SIMILAR)] == ["pass", "pass"]
    kept = next(tmp_path.glob("*.plus.gz"))
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    # Without a wall the way is the same.
    with EvalplusJudge(JudgeLimits(), "none", tmp_path) as judge:
        assert [verdict.status for verdict in judge.judge(task, SIMILAR)] == ["pass", "pass"]
        assert [verdict.status for verdict in judge.judge(task, SIMILAR.replace("&", "-"))] == ["fail", "fail"]
    assert kept.stat().st_size == len(whole), "damaged expected answers are made anew"


@pytest.mark.slow
def test_an_answer_without_numbers_is_not_close_to_any(tmp_path: Path) -> None:
    from reflectron.tools.benchmarks.benchmark import JudgeLimits
    from reflectron.tools.benchmarks.evalplus_judge import EvalplusJudge
    from reflectron.tools.benchmarks.expectations import Task

    task = Task("humaneval", "HumanEval/0", "f", "def f(x): return [x]", 0, ([[1.5]], [[2.5]]))
    with EvalplusJudge(JudgeLimits(), "bubblewrap", tmp_path) as judge:
        for code, status in {task.canonical: "pass", "def f(x): return [[]]": "fail"}.items():
            assert [verdict.status for verdict in judge.judge(task, code)] == [status] * 2, code


@pytest.mark.slow
def test_what_fails_before_a_program_starts_is_not_the_samples_doing(tmp_path: Path) -> None:
    from reflectron.tools.benchmarks.expectations import AnswerPipes, ProgramWithInputs
    from reflectron.tools.sandbox.plain_data import encode

    suites, seconds = [encode([[1]])], [[1.0]]
    program = ProgramWithInputs(
        code="", entry_point="f", suites=suites, seconds=seconds, suite_seconds=1, memory_bytes=32 << 20
    )
    with AnswerPipes(program, tmp_path) as pipes, pytest.raises(OSError, match="before the program was started"):
        pipes.run("bubblewrap")
