"""The benchmarks that there are, their problems from files, and the texts of their tasks that must not be trained on.

Files are read as they are published: HumanEval+ and MBPP+ by evalplus, MultiPL-E by nuprl (rows name their language),
DS-1000 in the simplified format of April 2024. A file of one's own holds functions to be written. Nothing is downloaded
but a hub dataset that decontamination asks for by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.json_records import Undecodable
from reflectron.engine.data.sources import read_records, read_rows
from reflectron.engine.files import printable
from reflectron.tools.benchmarks.benchmark import Benchmark, BenchmarkProblem, Part, Row, TaskTexts
from reflectron.tools.benchmarks.ds1000 import DS1000
from reflectron.tools.benchmarks.humaneval import HUMANEVAL
from reflectron.tools.benchmarks.mbpp import MBPP
from reflectron.tools.benchmarks.multipl_e import MULTIPL_E
from reflectron.tools.benchmarks.own import OWN

BENCHMARKS = (HUMANEVAL, MBPP, MULTIPL_E, DS1000)
"""A new one is a module like theirs and its name here.

A row that several take for theirs belongs to the first.
"""


@dataclass(frozen=True)
class ProblemFile:
    """Where problems are, and of which benchmark."""

    name: str
    """What they are called in results: the benchmark, or the file's name."""
    benchmark: Benchmark
    path: Path


def find_problems(named: str, data: str | None) -> ProblemFile:
    """Return the file that ``--dataset`` and ``--data`` mean.

    Raises:
        ValueError: when there is none.
    """
    for benchmark in BENCHMARKS:
        if named == benchmark.name:
            return ProblemFile(benchmark.name, benchmark, find_data(benchmark, data))
    if not Path(named).is_file():
        known = ", ".join(benchmark.name for benchmark in BENCHMARKS)
        raise ValueError(f"--dataset is {named!r}, expected one of {known}, or a file with HumanEval's fields")
    if data:
        raise ValueError(f"--data is {data}, expected none: --dataset {named} is a file itself")
    return ProblemFile(Path(named).name, OWN, Path(named))


def find_data(benchmark: Benchmark, given: str | None) -> Path:
    """Return the benchmark's file: the one given, else evalplus's environment variable, else evalplus's download.

    Raises:
        ValueError: when there is none; it names what to fetch.
    """
    download = benchmark.download
    named = given or (os.environ.get(download.variable) if download else None)
    if named:
        if not Path(named).is_file():
            raise ValueError(f"{named} is not a file, expected the problems of {benchmark.name} (--data)")
        return Path(named)
    if download is None:
        raise ValueError(f"--data is missing, expected the file of {benchmark.name} as it is published")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evalplus" / download.file
    if cached.is_file():
        return cached
    raise ValueError(
        f"--data is missing and {cached} is not there: get {download.file}.gz from the releases of "
        f"github.com/evalplus and name it with --data or {download.variable}"
    )


def load_problems(benchmark: Benchmark, path: Path) -> list[BenchmarkProblem]:
    """Read a file of problems, plain or ``.gz``, in the file's order.

    Raises:
        ValueError: naming the file and line of a row that is not of this benchmark, or a task that comes twice.
    """
    problems: dict[str, BenchmarkProblem] = {}
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        if missing := [name for name in benchmark.fields if name not in row]:
            raise ValueError(
                f"{where} has no {missing[0]!r}, expected a row of {benchmark.title} with the fields "
                f"{', '.join(benchmark.fields)}"
            )
        try:
            problem = benchmark.problem(row)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
        if problem.task_id in problems:
            raise ValueError(f"{where} repeats task {problem.task_id}")
        problems[problem.task_id] = problem
    if not problems:
        raise ValueError(f"{path} holds no problem")
    return list(problems.values())


def read_json_lines(path: Path, *, errors: Undecodable = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and row of every line that is not blank; compressed files and arrays are read as they are.

    Args:
        errors: what becomes of bytes that are no UTF-8.

    Raises:
        ValueError: naming the file and the line that is not a JSON object.
    """
    for record in read_rows(path):
        try:
            row = record.decoded(errors)
        except BadRecord as error:
            raise ValueError(f"{path}:{record.line} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{record.line} is {type(row).__name__}, expected an object")
        yield record.line, row


def suite_name(dataset: str, suite: str) -> str:
    """Return what a suite is called in tables.

    Args:
        dataset: ``ProblemFile.name``.
    """
    title = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}.get(dataset, dataset)
    return f"{title}+" if suite == "plus" else title


@dataclass(frozen=True)
class Fragment:
    """A text of one task of a benchmark."""

    benchmark: str
    """Its title."""
    task_id: str
    part: Part
    text: str


def load_benchmark(source: str) -> list[Fragment]:
    """Return the texts of one benchmark, which is recognised by its columns.

    Args:
        source: a file that training could read; or a dataset of the hub as ``name``, ``name:configuration`` and
            ``name:configuration@split`` (split ``test`` by default).

    Raises:
        ValueError: when it cannot be read, or its columns are those of no known benchmark.
    """
    fragments: list[Fragment] = []
    for number, row in enumerate(_rows(source)):
        try:
            found = _texts_of(row, number)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"benchmark {source}: row {number + 1} has a column of an unexpected type: {error}"
            ) from None
        if found is None:
            columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            known = ", ".join(title for title, _ in _READERS)
            raise ValueError(f"benchmark {source}: unknown columns {columns}; expected one of the benchmarks {known}")
        title, texts = found
        fragments += [Fragment(title, texts.task_id, part, text) for part, text in texts.parts.items() if text.strip()]
    if not fragments:
        raise ValueError(f"benchmark {source} holds no task, expected at least one")
    return fragments


def _texts_of(row: object, number: int) -> tuple[str, TaskTexts] | None:
    if isinstance(row, dict):
        for title, read in _READERS:
            if (texts := read(row, number)) is not None:
                return title, texts
    return None


def _rows(source: str) -> Iterator[object]:
    if not Path(source).exists():
        yield from _hub_rows(source)
        return
    for record in read_records(DataFile(path=source)):
        try:
            yield record.decoded()
        except BadRecord as error:
            raise ValueError(f"benchmark {source} cannot be read: line {record.line}: {error}") from None


def _hub_rows(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition("@")
    name, _, configuration = name.partition(":")
    try:
        yield from datasets.load_dataset(name, configuration or None, split=split or "test")
    # The package raises more than a dozen types here: connection, missing repository, missing split.
    except Exception as error:
        reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        raise ValueError(f"benchmark {source} is no file, and could not be loaded from the hub ({reason})") from error


def _apps_texts(row: Row, number: int) -> TaskTexts | None:
    if not row.keys() >= {"question", "solutions"}:
        return None
    # Without the solutions: more than a hundred thousand, most of them ordinary code.
    return TaskTexts(str(row.get("problem_id", number)), {"description": row["question"]})


def _gsm8k_texts(row: Row, number: int) -> TaskTexts | None:
    if not row.keys() >= {"question", "answer"}:
        return None
    return TaskTexts(str(number), {"description": row["question"], "solution": row["answer"].split("####")[0]})


# The last two are only ever decontaminated against; APPS has the columns of GSM8K, too.
_READERS: tuple[tuple[str, Callable[[Row, int], TaskTexts | None]], ...] = (
    *((benchmark.title, benchmark.texts) for benchmark in BENCHMARKS),
    ("APPS", _apps_texts),
    ("GSM8K", _gsm8k_texts),
)
