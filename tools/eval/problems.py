"""A file of problems comes in, its problems go out in the file's order.

Benchmarks are read as they are published: HumanEval+ and MBPP+ by evalplus, MultiPL-E by nuprl (rows name their
language), DS-1000 in the simplified format of April 2024. A file of one's own holds functions to be written, in the
fields of OpenAI's HumanEval. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reflectron.tools.eval.rows import read_json_lines

Benchmark = Literal["humaneval", "mbpp", "multipl-e", "ds1000"]
Dataset = Literal[Benchmark, "functions"]
"""``functions`` is what a file of one's own holds."""
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)

_EVALPLUS_FIELDS = ("prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
_FIELDS: dict[Dataset, tuple[str, ...]] = {
    "humaneval": ("task_id", *_EVALPLUS_FIELDS),
    "mbpp": ("task_id", *_EVALPLUS_FIELDS),
    "multipl-e": ("name", "language", "prompt", "tests", "stop_tokens"),
    "ds1000": ("prompt", "code_context", "metadata"),
    "functions": ("task_id", "prompt", "entry_point", "test"),
}
# The names that evalplus itself reads, and the files that it downloads into its cache.
_EVALPLUS_VARIABLE = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}
_EVALPLUS_FILE = {"humaneval": "HumanEvalPlus-v0.1.10.jsonl", "mbpp": "MbppPlus-v0.2.0.jsonl"}


@dataclass(frozen=True)
class ProblemFile:
    """Where problems are, and of which kind."""

    name: str
    """What they are called in tables and results: the benchmark, or the file's name."""
    dataset: Dataset
    path: Path


@dataclass(frozen=True)
class Problem:
    """One task."""

    task_id: str
    """As published; ``DS-1000/<n>`` where the dataset only numbers its problems."""
    prompt: str
    """What a base model continues."""
    entry_point: str
    """Name of the function asked for; empty where the tests do not call one by name."""
    record: dict[str, Any]
    """The whole published row."""


def load_problems(dataset: Dataset, path: Path) -> list[Problem]:
    """Read a file of problems, plain or ``.gz``.

    Raises:
        ValueError: naming the file and line of a row that is not of this dataset, or a task that comes twice.
    """
    problems: dict[str, Problem] = {}
    for number, row in read_json_lines(path):
        if missing := [name for name in _FIELDS[dataset] if name not in row]:
            expected = f"the fields {', '.join(_FIELDS[dataset])}"
            if dataset != "functions":
                expected = f"a row of {dataset} as it is published"
            raise ValueError(f"{path}:{number} has no {missing[0]!r}, expected {expected}")
        if dataset == "functions":
            _check_function(row, f"{path}:{number}")
        problem = _problem(dataset, row)
        if problem.task_id in problems:
            raise ValueError(f"{path}:{number} repeats task {problem.task_id}")
        problems[problem.task_id] = problem
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return list(problems.values())


def _check_function(row: dict[str, Any], where: str) -> None:
    for name in _FIELDS["functions"]:
        if not isinstance(row[name], str):
            raise ValueError(f"{where} has {name!r} of type {type(row[name]).__name__}, expected text")
    if not row["entry_point"].isidentifier():
        raise ValueError(f"{where} has entry_point {row['entry_point']!r}, expected a function's name")
    if "def check(" not in row["test"]:
        raise ValueError(f"{where} has a 'test' without `def check(candidate)`, which every sample would fail")


def _problem(dataset: Dataset, row: dict[str, Any]) -> Problem:
    if dataset == "multipl-e":
        return Problem(row["name"], row["prompt"], "", row)
    if dataset == "ds1000":
        return Problem(f"DS-1000/{row['metadata']['problem_id']}", row["prompt"], "", row)
    return Problem(row["task_id"], row["prompt"], row["entry_point"], row)


def add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """``--dataset`` and ``--data``, for ``find_problems``."""
    parser.add_argument(
        "--dataset", required=True, metavar="NAME|FILE", help=f"{', '.join(BENCHMARKS)}, or a file of your own"
    )
    parser.add_argument("--data", metavar="FILE", help="a benchmark's problems, as published, .jsonl or .jsonl.gz")


def find_problems(named: str, data: str | None) -> ProblemFile:
    """The file that ``--dataset`` and ``--data`` mean.

    Raises:
        ValueError: when there is none.
    """
    for benchmark in BENCHMARKS:
        if named == benchmark:
            return ProblemFile(benchmark, benchmark, find_data(benchmark, data))
    if not Path(named).is_file():
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"--dataset is {named!r}, expected one of {known}, or a file with HumanEval's fields")
    if data:
        raise ValueError(f"--data is {data}, expected none: --dataset {named} is a file itself")
    return ProblemFile(Path(named).name, "functions", Path(named))


def find_data(dataset: Benchmark, given: str | None) -> Path:
    """The benchmark's file: the one given, else evalplus's environment variable, else evalplus's download.

    Raises:
        ValueError: when there is none; it names what to fetch.
    """
    variable = _EVALPLUS_VARIABLE.get(dataset)
    named = given or (os.environ.get(variable) if variable else None)
    if named:
        if not Path(named).is_file():
            raise ValueError(f"{named} is not a file, expected the problems of {dataset} (--data)")
        return Path(named)
    if variable is None:
        raise ValueError(f"--data is missing, expected the file of {dataset} as it is published")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evalplus"
    file = _EVALPLUS_FILE[dataset]
    if (cache / file).is_file():
        return cache / file
    raise ValueError(
        f"--data is missing and {cache / file} is not there: get {file}.gz from the releases of "
        f"github.com/evalplus and name it with --data or {variable}"
    )
