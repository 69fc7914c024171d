"""A file of completions comes in, programs for tasks go out in the file's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.text import printable
from reflectron.tools.eval.problems import Problem
from reflectron.tools.eval.rows import read_json_lines

MOST_SOURCE_BYTES = 16 << 20
"""No program is longer; hundreds of times what a model's longest answer takes."""


@dataclass(frozen=True)
class Sample:
    """One program for a task."""

    task_id: str
    number: int
    """Among those of its task, in the file's order."""
    code: str


def read_samples(path: Path, problems: Sequence[Problem], *, partial: bool) -> list[Sample]:
    """Completions as evalplus reads them: a ``solution`` is a program, a ``completion`` follows the prompt.

    A sample whose text is no valid UTF-8 keeps what it has, as lone surrogates, for ``unfit`` to name.

    Raises:
        ValueError: naming the line that is no completion, or how many tasks have none (unless ``partial``).
    """
    prompts = {problem.task_id: problem.prompt for problem in problems}
    counts: dict[str, int] = {}
    samples = []
    for number, row in read_json_lines(path, errors="surrogateescape"):
        task_id = row.get("task_id")
        if not isinstance(task_id, str) or task_id not in prompts:
            shown = printable(repr(task_id))
            raise ValueError(f"{path}:{number} has task_id {shown}, which the data set does not have")
        code = row.get("solution")
        if code is None and isinstance(row.get("completion"), str):
            code = prompts[task_id] + row["completion"]
        if not isinstance(code, str):
            raise ValueError(f"{path}:{number} has neither a text 'solution' nor a text 'completion'")
        samples.append(Sample(task_id, counts.setdefault(task_id, 0), code))
        counts[task_id] += 1
    missing = [task_id for task_id in prompts if task_id not in counts]
    if missing and not (partial and samples):
        raise ValueError(
            f"{path} has no completion for {len(missing)} of {len(prompts)} tasks, such as {printable(missing[0])}; "
            "--partial scores the others"
        )
    return samples


def unfit(code: str) -> str:
    """Why a text cannot be handed to any interpreter or compiler; empty where it can."""
    try:
        size = len(code.encode())
    except UnicodeEncodeError as error:
        return f"the program is no valid Unicode: {error.object[error.start]!r} at character {error.start}"
    return f"the program has {size} bytes, more than {MOST_SOURCE_BYTES}" if size > MOST_SOURCE_BYTES else ""
