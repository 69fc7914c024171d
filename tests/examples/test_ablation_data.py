"""The ablation's problems: the same bytes for the same seed, true outputs, and nothing held out that was trained on."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from reflectron.engine.data.conversation import Conversation
from reflectron.engine.data.sources import parse_record
from reflectron.tools.benchmarks.benchmark import BenchmarkProblem, make_ask
from reflectron.tools.benchmarks.catalogue import load_problems
from reflectron.tools.benchmarks.own import OWN
from reflectron.tools.data.reflection.programs import has_tests
from testkit.places import ROOT

FOLDER = ROOT / "examples" / "ablation"
COUNTS = {"instructions": 24, "reflections": 8, "validations": 3, "tests": 12}

# By hand, independent of the generator: lines of an operation, the list before, the list or value after.
EXAMPLES = [
    ("keep_multiples", "3", [3, 4, -6, 0], [3, -6, 0]),
    ("keep_below", "4", [3, 4, -6], [3, -6]),
    ("keep_longer", "2", ["an", "sea"], ["sea"]),
    ("keep_without", "a", ["an", "ox"], ["ox"]),
    ("modulo", "4", [9, -1], [1, 3]),
    ("divide", "4", [9, -1], [2, -1]),
    ("distance", "4", [9, 1], [5, 3]),
    ("backwards", "", ["sea"], ["aes"]),
    ("prepend", "-", ["ox"], ["-ox"]),
    ("counts", "a", ["banana", "ox"], [3, 0]),
    ("sort_down", "", [1, 3, 2], [3, 2, 1]),
    ("every", "2", [5, 6, 7, 8], [5, 7]),
    ("unique", "", [2, 1, 2], [2, 1]),
    ("last", "", [2, 1], [1]),
    ("max", "5", [], 5),
    ("all_below", "5", [4, 5], False),
    ("text", "+", [1, 2], "1+2"),
    ("longest", "", ["ox", "sea", "tea"], "sea"),
    ("member", "a", ["banana", "sea"], 4),
]


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in ("operations", "composition", "make_problems")}


@pytest.fixture(scope="module")
def composition(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["composition"]


@pytest.fixture(scope="module")
def make_problems(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["make_problems"]


@pytest.fixture(scope="module")
def made(make_problems: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return make_problems.generate(**COUNTS, seed=3)


def conversations(records: list[dict[str, Any]]) -> list[Conversation]:
    return [parse_record(record) for record in records]


def test_same_seed_same_records(make_problems: ModuleType, made: dict[str, Any]) -> None:
    assert make_problems.generate(**COUNTS, seed=3) == made
    assert make_problems.generate(**COUNTS, seed=4) != made


def test_more_reflections_than_problems_are_refused(make_problems: ModuleType) -> None:
    with pytest.raises(ValueError, match="--reflections is 9, expected at most"):
        make_problems.generate(instructions=4, reflections=9, validations=1, tests=1, seed=3)


def test_each_file_holds_its_kind(made: dict[str, Any]) -> None:
    assert [len(made[name]) for name in ("instruction", "reflection", "validation", "held_out")] == [24, 8, 3, 12]
    for name, kind in (("instruction", "generation"), ("reflection", "reflection"), ("validation", "generation")):
        assert {conversation.kind for conversation in conversations(made[name])} == {kind}


def test_held_out_pairs_are_in_no_training_problem(make_problems: ModuleType, composition: ModuleType) -> None:
    reserved = composition.held_out_pairs(3)
    training, held_out = (make_problems.make(12, part, 3) for part in (False, True))
    assert not any(reserved & set(solved.problem.pairs) for solved in training)
    assert all(reserved & set(solved.problem.pairs) for solved in held_out)


@pytest.mark.parametrize("seed", range(4))
def test_every_operation_is_trained_on_in_every_place(composition: ModuleType, seed: int) -> None:
    every = composition.pairs()
    trained = set(every) - composition.held_out_pairs(seed)
    for place in (0, 1):
        assert {pair[place] for pair in trained} == {pair[place] for pair in every}


def test_reflections_are_of_instructed_problems(made: dict[str, Any]) -> None:
    instructed = [conversation.messages for conversation in conversations(made["instruction"])]
    for conversation in conversations(made["reflection"]):
        assert conversation.messages[2:] in instructed


def test_executions_are_what_the_interpreter_gives(make_problems: ModuleType, made: dict[str, Any]) -> None:
    rounds = set()
    for conversation in conversations(made["reflection"]):
        blocks = conversation.messages[1].blocks
        programs = [block.content for block in blocks if block.type == "code"]
        outputs = [block.content for block in blocks if block.type == "execution"]
        assert all(map(has_tests, programs))
        assert make_problems.run_all(programs) == outputs
        assert outputs[-1] == "ok\n"
        assert all(output.startswith("Traceback (most recent call last), line ") for output in outputs[:-1])
        (answer,) = re.fullmatch(
            r"```python\n(.*)\n```", conversation.messages[3].blocks[0].content, re.DOTALL
        ).groups()
        assert programs[-1].startswith(answer + "\n\n")
        rounds.add(len(programs))
    assert 2 in rounds


def test_analysis_names_the_repaired_line(composition: ModuleType) -> None:
    rng = random.Random(1)
    seen = set()
    for problem in (composition.draw(rng) for _ in range(60)):
        right = problem.code.split("\n")
        for wrong in composition.faulty(problem, rng):
            if wrong == problem.code:
                continue
            text = composition.diagnosis(problem, wrong)
            seen.add(text.split()[0])
            if repair := re.fullmatch(r"To .*, line (\d+) must be `(.*)`\.", text):
                lines = wrong.split("\n")
                lines[int(repair[1]) - 1] = "    " + repair[2]
                assert lines == right
    assert seen == {"The", "To"}


def test_programs_do_not_share_names(make_problems: ModuleType) -> None:
    assert make_problems.run_all(["x = 1", "print(x)", "print(1)\n1 / 0"]) == [
        "",
        "Traceback (most recent call last), line 1:\nNameError: name 'x' is not defined\n",
        "1\nTraceback (most recent call last), line 2:\nZeroDivisionError: division by zero\n",
    ]


def test_solutions_pass_their_tests_and_faults_do_not(make_problems: ModuleType, made: dict[str, Any]) -> None:
    tests = [f"{row['test']}\ncheck({row['entry_point']})\nprint('end')" for row in made["held_out"]]
    right = [row["canonical_solution"] for row in made["held_out"]]
    # Each step omitted in turn, which every problem's tests must notice.
    wrong = [re.sub(r"\n    xs = [^\n]*(?=\n    return)", "", code) for code in right]
    assert all(a != b for a, b in zip(right, wrong, strict=True))
    assert make_problems.run_all([f"{c}\n{t}" for c, t in zip(right, tests, strict=True)]) == ["end\n"] * len(tests)
    assert "end\n" not in make_problems.run_all([f"{c}\n{t}" for c, t in zip(wrong, tests, strict=True)])


def test_held_out_problems_are_asked_as_the_training_ones(
    make_problems: ModuleType, made: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made["held_out"]), encoding="utf-8")
    problems = load_problems(OWN, file)
    assert [problem.task_id for problem in problems] == [f"ablation/{number}" for number in range(12)]
    solved = make_problems.make(1, False, 3)[0]
    problem = BenchmarkProblem("", solved.problem.prompt, solved.problem.name, {})
    trained_on = conversations(made["instruction"])[0].messages
    assert make_ask("reflection", OWN, problem).instruction == trained_on[0].blocks[0].content


@pytest.mark.parametrize(("name", "constant", "before", "after"), EXAMPLES, ids=[name for name, *_ in EXAMPLES])
def test_operations_do_what_they_say(
    modules: dict[str, ModuleType], name: str, constant: str, before: list[Any], after: object
) -> None:
    operations = modules["operations"]
    at_end = [operation for operation in operations.RESULTS if operation.name == name]
    operation = (at_end or [operation for operation in operations.STEPS if operation.name == name])[0]
    line = operation.line.replace("$k", constant)
    code = "\n    ".join(["def f(xs):", line, *([] if at_end else ["return xs"])])
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["f"](before) == after
