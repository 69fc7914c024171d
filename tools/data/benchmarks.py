"""A benchmark's file or hub dataset comes in, the texts that must not be trained on go out.

The benchmark is recognised by its columns: HumanEval(+), MBPP(+), DS-1000, APPS, GSM8K, MultiPL-E. Each task gives the
problem's description and, where the benchmark publishes one, its solution; HumanEval's prompts also count as a whole,
because the descriptions of some are very short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import read_records
from reflectron.engine.text import printable

Part = Literal["prompt", "description", "solution", "tests"]
Row = dict[str, Any]

_DOCSTRING = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
# Where DS-1000's prompts turn from the question to the frame of the answer.
_DS1000_ANSWER = re.compile(r"\nA:\s*\n|BEGIN SOLUTION|SOLUTION START")


@dataclass(frozen=True)
class Fragment:
    """A text of one task of a benchmark."""

    benchmark: str
    task_id: str
    part: Part
    text: str


def load_benchmark(source: str) -> list[Fragment]:
    """The fragments of one benchmark.

    Args:
        source: a file that training could read; or a dataset of the hub as ``name``, ``name:configuration`` and
            ``name:configuration@split`` (split ``test`` by default).

    Raises:
        ValueError: when it cannot be read, or its columns are those of no known benchmark.
    """
    fragments: list[Fragment] = []
    for number, row in enumerate(_rows(source)):
        try:
            columns, read = _recognise(row, source)
            benchmark, task_id, parts = read(columns, number)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"benchmark {source}: row {number + 1} has a column of an unexpected type: {error}"
            ) from None
        fragments += [Fragment(benchmark, task_id, part, text) for part, text in parts if text.strip()]
    if not fragments:
        raise ValueError(f"benchmark {source} holds no task, expected at least one")
    return fragments


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


Reader = Callable[[Row, int], tuple[str, str, list[tuple[Part, str]]]]


def _recognise(row: object, source: str) -> tuple[Row, Reader]:
    for columns, reader in _READERS:
        if isinstance(row, dict) and columns <= row.keys():
            return row, reader
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    expected = "; ".join(", ".join(sorted(columns)) for columns, _ in _READERS)
    raise ValueError(f"benchmark {source}: unknown columns {found}; expected one of: {expected}")


def _human_eval(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    """Also MBPP+, whose prompt is one docstring with the first test in it."""
    plus = str(row["task_id"]).lower().startswith("mbpp")
    found = _DOCSTRING.findall(row["prompt"])
    # The entry point comes last; helpers with docstrings of their own may stand before it.
    docstring = found[-1][1] if found else row["prompt"]
    description = re.split(r"^assert " if plus else r"^\s*>>>", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    parts: list[tuple[Part, str]] = [("description", description), ("solution", row["canonical_solution"])]
    parts.append(("tests", row.get("assertion", "")) if plus else ("prompt", row["prompt"]))
    return "MBPP" if plus else "HumanEval", str(row["task_id"]), parts


def _mbpp(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    description = row.get("text") or row["prompt"]
    tests = "\n".join(row["test_list"])
    return "MBPP", f"Mbpp/{row['task_id']}", [("description", description), ("solution", row["code"]), ("tests", tests)]


def _ds1000(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    metadata = row.get("metadata")
    task = metadata.get("problem_id", number) if isinstance(metadata, dict) else number
    question = _DS1000_ANSWER.split(row["prompt"], maxsplit=1)[0].strip().removeprefix("Problem:")
    return "DS-1000", str(task), [("description", question), ("solution", row["reference_code"])]


def _apps(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    """Without the solutions: more than a hundred thousand, most of them ordinary code."""
    return "APPS", str(row.get("problem_id", number)), [("description", row["question"])]


def _gsm8k(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    return "GSM8K", str(number), [("description", row["question"]), ("solution", row["answer"].split("####")[0])]


def _multipl_e(row: Row, number: int) -> tuple[str, str, list[tuple[Part, str]]]:
    return "MultiPL-E", f"{row['language']}/{row['name']}", [("description", row["prompt"])]


# In this order: the columns of a later one may be among those of an earlier one.
_READERS: tuple[tuple[set[str], Reader], ...] = (
    ({"task_id", "prompt", "canonical_solution", "entry_point"}, _human_eval),
    ({"task_id", "code", "test_list"}, _mbpp),
    ({"prompt", "reference_code"}, _ds1000),
    ({"name", "language", "prompt", "tests"}, _multipl_e),
    ({"question", "solutions"}, _apps),
    ({"question", "answer"}, _gsm8k),
)
