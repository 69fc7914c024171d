"""What scoring reads, keeps and counts; running code is for the slow tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reflectron.tools.benchmarks.benchmark import ProgramSample, SuiteVerdict
from reflectron.tools.benchmarks.catalogue import BENCHMARKS, find_data, find_problems, load_problems
from reflectron.tools.benchmarks.ds1000 import DS1000
from reflectron.tools.benchmarks.humaneval import HUMANEVAL
from reflectron.tools.benchmarks.mbpp import MBPP
from reflectron.tools.benchmarks.own import OWN
from reflectron.tools.eval.score import describe, read_samples, summarize
from testkit.places import TESTS_DIR

FOLDER = TESTS_DIR / "benchmarks"
PASS, FAIL = SuiteVerdict("pass"), SuiteVerdict("fail", "[1]", "2", "3")


def test_plus_counts_what_passes_both() -> None:
    samples = [ProgramSample(task, 0, "") for task in ("HumanEval/0", "HumanEval/1", "HumanEval/2", "HumanEval/3")]
    result = summarize("humaneval", samples, [(PASS, PASS), (PASS, FAIL), (FAIL, PASS), (FAIL, FAIL)])
    assert result["pass_at_1"] == {"base": 0.5, "plus": 0.25}
    assert result["n_passed"] == {"base": 2, "plus": 1}
    assert result["passed"]["plus"] == {"HumanEval/0": 1, "HumanEval/1": 0, "HumanEval/2": 0, "HumanEval/3": 0}
    assert [(f["task_id"], f["suite"]) for f in result["failed"]] == [
        ("HumanEval/1", "plus"),
        ("HumanEval/2", "base"),
        ("HumanEval/3", "base"),
    ]
    assert "HumanEval 50.0   HumanEval+ 25.0" in describe(result)
    assert "HumanEval/1 (plus fail)  input [1]  expected 2  got 3" in describe(result)


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    # 10 samples of two tasks, 3 and 0 of which pass: 1 - C(7, k) / C(10, k), halved by the other task.
    samples = [ProgramSample(f"Mbpp/{task}", n, "") for task in (2, 3) for n in range(10)]
    verdicts = [(PASS, PASS) if n < 3 else (FAIL, FAIL) for n in range(20)]
    result = summarize("mbpp", samples, verdicts)
    assert result["pass_at_k"].keys() == {"1", "10"}
    assert result["pass_at_k"]["1"]["plus"] == pytest.approx(0.3 / 2)
    assert result["pass_at_k"]["10"]["plus"] == pytest.approx(1 / 2)
    assert (result["n_tasks"], result["n_samples"]) == (2, 20)


def test_one_suite() -> None:
    result = summarize(
        "ds1000", [ProgramSample("DS-1000/0", 0, ""), ProgramSample("DS-1000/1", 0, "")], [(PASS,), (FAIL,)]
    )
    assert result["pass_at_1"] == {"base": 0.5}


def test_completions_follow_the_prompt_and_solutions_stand_alone(tmp_path: Path) -> None:
    problems = load_problems(HUMANEVAL, FOLDER / "humaneval_plus_subset.jsonl")[:1]
    task = problems[0].task_id
    file = tmp_path / "c.jsonl"
    file.write_text(
        json.dumps({"task_id": task, "completion": "a"}) + "\n" + json.dumps({"task_id": task, "solution": "b"})
    )
    samples = read_samples(file, problems, partial=False)
    assert [(s.number, s.code) for s in samples] == [(0, problems[0].prompt + "a"), (1, "b")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"task_id": "HumanEval/999", "solution": ""}', "which the dataset does not have"),
        ('{"task_id": "HumanEval/2"}', "neither a text 'solution' nor a text 'completion'"),
        ('{"task_id": "HumanEval/2", "solution": ""}', "no completion for 11 of 12 tasks"),
        ("[1]", "c.jsonl:1 is int"),
        ("{", "c.jsonl:1 is not JSON"),
    ],
)
def test_mistakes_in_completions(tmp_path: Path, line: str, said: str) -> None:
    problems = load_problems(HUMANEVAL, FOLDER / "humaneval_plus_subset.jsonl")
    (tmp_path / "c.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        read_samples(tmp_path / "c.jsonl", problems, partial=False)


def test_benchmarks_are_told_apart_and_published_scores_have_every_suite() -> None:
    assert (
        len({benchmark.name for benchmark in BENCHMARKS}) == len({one.title for one in BENCHMARKS}) == len(BENCHMARKS)
    )
    for benchmark in BENCHMARKS:
        assert all(len(paper.pass_at_1) == len(benchmark.suites) for paper in benchmark.published)
        assert set(benchmark.suites) <= {"base", "plus"}


def test_data_is_found_where_evalplus_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MBPP_OVERRIDE_PATH", raising=False)
    with pytest.raises(ValueError, match=r"get MbppPlus-v0.2.0.jsonl.gz"):
        find_data(MBPP, None)
    cached = tmp_path / "evalplus" / "MbppPlus-v0.2.0.jsonl"
    cached.parent.mkdir()
    cached.touch()
    assert find_data(MBPP, None) == cached
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(FOLDER / "mbpp_plus_subset.jsonl"))
    assert find_data(MBPP, None) == FOLDER / "mbpp_plus_subset.jsonl"
    with pytest.raises(ValueError, match="no 'code_context'"):
        load_problems(DS1000, FOLDER / "mbpp_plus_subset.jsonl")


ROW = {"task_id": "own/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(candidate):\n    pass\n"}


def test_a_file_of_ones_own_is_a_set_of_problems(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    found = find_problems(str(file), None)
    assert (found.name, found.benchmark, found.path) == ("mine.jsonl", OWN, file)
    (problem,) = load_problems(found.benchmark, found.path)
    assert (problem.task_id, problem.entry_point) == ("own/0", "f")
    with pytest.raises(ValueError, match="--data is x, expected none"):
        find_problems(str(file), "x")
    with pytest.raises(ValueError, match="--dataset is 'humanevil', expected one of humaneval, mbpp"):
        find_problems("humanevil", None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": "assert f(1) == 1"}, r"mine.jsonl:1 has a 'test' without `def check\(candidate\)`"),
        ({"test": ["assert"]}, "mine.jsonl:1 has 'test' of type list, expected text"),
        ({"test": None, "tests": ""}, "mine.jsonl:1 has 'test' of type NoneType"),
        ({"entry_point": "f(x)"}, r"has entry_point 'f\(x\)', expected a function's name"),
    ],
)
def test_mistakes_in_ones_own_problems(tmp_path: Path, change: dict[str, object], said: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW | change) + "\n")
    with pytest.raises(ValueError, match=said):
        load_problems(OWN, file)
