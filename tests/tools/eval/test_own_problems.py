"""Problems of one's own: what their tests can ask for works, and what a program does about its test gains nothing."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from reflectron.tools.benchmarks.benchmark import BenchmarkProblem, SuiteVerdict
from reflectron.tools.benchmarks.catalogue import load_problems
from reflectron.tools.benchmarks.own import OWN, check_tests, judge_function, mistakes_in_tests
from reflectron.tools.cli import main
from reflectron.tools.sandbox.wall import SandboxKind
from testkit.places import TESTS_DIR

BENCHMARKS = TESTS_DIR / "benchmarks"
# The whole set, where somebody has it: its rows have HumanEval's own tests.
WHOLE = os.environ.get("REFLECTRON_TEST_HUMANEVAL")

ADD = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(5, 5) == 10
"""


CASES = yaml.safe_load((Path(__file__).parent / "own_problems.yaml").read_text(encoding="utf-8"))


def problem(test: str, name: str = "f", prompt: str = "") -> BenchmarkProblem:
    return BenchmarkProblem(
        "own/0", prompt, name, {"task_id": "own/0", "prompt": prompt, "entry_point": name, "test": test}
    )


def judge(test: str, code: str, sandbox: SandboxKind, prompt: str = "") -> SuiteVerdict:
    return judge_function(problem(test, prompt=prompt), code, 1, sandbox)


def passes_its_own_tests(problems: list[BenchmarkProblem], sandbox: SandboxKind) -> None:
    check_tests(problems, sandbox, 2)
    with ThreadPoolExecutor(2) as pool:
        codes = [one.prompt + one.record["canonical_solution"] for one in problems]
        verdicts = list(pool.map(lambda one, code: judge_function(one, code, 5, sandbox), problems, codes))
    found = {one.task_id: verdict for one, verdict in zip(problems, verdicts, strict=True)}
    assert {task: verdict for task, verdict in found.items() if verdict.status != "pass"} == {}


def test_a_test_of_humaneval_that_uses_a_helper_of_the_prompt(sandbox: SandboxKind) -> None:
    problems = load_problems(OWN, BENCHMARKS / "humaneval_tests.jsonl")
    passes_its_own_tests([one for one in problems if one.task_id == "HumanEval/38"], sandbox)


@pytest.mark.slow
def test_canonical_solutions_pass_the_tests_of_humaneval(sandbox: SandboxKind) -> None:
    problems = load_problems(OWN, Path(WHOLE) if WHOLE else BENCHMARKS / "humaneval_tests.jsonl")
    assert len(problems) == (164 if WHOLE else 4)
    passes_its_own_tests(problems, sandbox)


@pytest.mark.slow
def test_no_program_forges_a_pass(sandbox: SandboxKind) -> None:
    codes = CASES["forgeries"]
    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(codes, pool.map(lambda code: judge(ADD, code, sandbox), codes.values()), strict=True))
    assert {name for name, verdict in verdicts.items() if verdict.status == "pass"} == set()
    assert all(verdict.got.isprintable() and verdict.got for verdict in verdicts.values()), verdicts
    assert verdicts["equals everything"].got == "the answer is no plain data: E"
    assert verdicts["a list of what equals everything"].got == "the answer is no plain data: E"
    assert "ended before its check did" in verdicts["leaves with success"].got


@pytest.mark.slow
def test_what_ends_a_loop_of_the_test_does_not_end_the_test(sandbox: SandboxKind) -> None:
    test = "def check(candidate):\n    assert all(map(lambda x: candidate(x) == x, [1, 2]))\n"
    verdict = judge(test, "def f(x): raise StopIteration", sandbox)
    assert (verdict.status, verdict.got) == ("fail", "raised RuntimeError: f raised StopIteration")


THREADED = """
import threading
def check(candidate):
    wrong = []
    def one(n):
        if candidate(n) != n: wrong.append(n)
    threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong
"""


@pytest.mark.slow
def test_an_error_in_a_thread_of_the_test_fails(sandbox: SandboxKind) -> None:
    assert judge(THREADED, "def f(x): return x", sandbox).status == "pass"
    for error in ("ValueError", "SystemExit"):
        verdict = judge(THREADED, f"def f(x): raise {error}", sandbox)
        assert (verdict.status, verdict.got) == ("fail", f"raised {error}")


@pytest.mark.slow
def test_a_program_that_stops_is_a_timeout(sandbox: SandboxKind) -> None:
    large = "def check(candidate): candidate(bytes(10 ** 7), 0)"
    cases = [
        (ADD, "import os, signal\ndef f(a, b): os.kill(os.getpid(), signal.SIGSTOP)"),
        (ADD, "import time\ndef f(a, b): time.sleep(1000)"),
        (ADD, "def f(a, b):\n    while True: pass"),
        # It says that it is ready, and takes in no call.
        (large, CASES["takes no call"]),
    ]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda case: judge(*case, sandbox), cases))
    assert [verdict.status for verdict in verdicts] == ["timeout"] * 4, verdicts
    assert verdicts[3].got == "the program takes no call"


@pytest.mark.slow
def test_what_a_test_can_ask_for(sandbox: SandboxKind) -> None:
    prompt = "class Empty(Exception): pass\ndef f(*a, **k) -> Unknown:\n"
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda case: judge(case["test"], case["program"], sandbox, prompt), CASES["works"].values())
        assert {name: v for name, v in zip(CASES["works"], verdicts, strict=True) if v.status != "pass"} == {}


def test_failures_say_what_was_asked_and_answered(sandbox: SandboxKind) -> None:
    wrong = judge(ADD, "def f(a, b): return 4", sandbox)
    assert wrong == SuiteVerdict("fail", "1, 2", "assert candidate(1, 2) == 3", "4")
    raised = judge(ADD, "def f(a, b): assert a > 3, 'small'", sandbox)
    assert raised == SuiteVerdict("fail", "1, 2", "assert candidate(1, 2) == 3", "raised AssertionError: small")


MISTAKES = {
    "def check(candidate): pass": "its test never calls f",
    "import nowhere_to_be_found\ndef check(candidate): candidate()": "before it calls f: ModuleNotFoundError",
    "def check(candidate): candidate(lambda x: x)": "calls f with what is no plain data: function",
    "class P(tuple): pass\ndef check(candidate): candidate(P((1, 2)))": "an instance of a subclass of tuple",
    "def check(candidate, capsys): pass": "before it calls f: TypeError",
    "def check(candidate):\n  x =": "before it calls f: SyntaxError",
    "import os\ndef check(candidate): os._exit(3)": "before it calls f: its process ends with exit code 3",
    "import os\ndef check(candidate): os._exit(0)": "before it calls f: its process ends with exit code 0",
}


def test_tests_that_cannot_work_are_named_at_the_beginning(
    sandbox: SandboxKind, capsys: pytest.CaptureFixture[str]
) -> None:
    found = mistakes_in_tests([problem(ADD), *map(problem, MISTAKES)], sandbox)
    assert len(found) == len(MISTAKES)
    for mistake, said in zip(found, MISTAKES.values(), strict=True):
        assert said in mistake.reason
    with pytest.raises(ValueError, match="no program can pass problem own/0: its test fails before it calls f"):
        check_tests([problem(ADD), problem("def check(candidate): 1 / 0")], sandbox, 1)
    check_tests([problem(ADD), problem("def check(candidate): pass")], sandbox, 1)
    assert "every program passes problem own/0: its test never calls f" in capsys.readouterr().err


@pytest.mark.slow
def test_scoring_stops_at_such_a_test_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, completions = tmp_path / "mine.jsonl", tmp_path / "answers.jsonl"
    problems.write_text(json.dumps(problem("def check(candidate): 1 / 0").record) + "\n")
    completions.write_text(json.dumps({"task_id": "own/0", "solution": "def f(): pass"}) + "\n")
    assert main(["eval", "score", str(completions), "--dataset", str(problems)]) == 2
    assert "no program can pass problem own/0: its test fails before it calls f" in capsys.readouterr().err
    assert (tmp_path / "answers.verdicts.jsonl").read_text() == ""
