"""HumanEval, with the tests that evalplus added: functions to be completed, judged as evalplus judges them.

The papers' numbers here and in ``mbpp`` are what the authors' repositories state, but for one row that is a slip:
ReflectionCoder's README gives its CL-34B model the numbers of Magicoder-S-CL-7B. What stands here instead is measured
on the completions that the authors publish beside it. Their tables of MultiPL-E and DS-1000 are in the papers only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

from typing_extensions import assert_never

from reflectron.tools.benchmarks.benchmark import (
    SUITES,
    Ask,
    Benchmark,
    BenchmarkProblem,
    Download,
    JudgeSettings,
    Part,
    PublishedScore,
    Row,
    SampleJudge,
    Style,
    TaskTexts,
    Wording,
)
from reflectron.tools.benchmarks.evalplus_judge import judged_by_evalplus
from reflectron.tools.benchmarks.expectations import make_task
from reflectron.tools.benchmarks.extraction import FENCE, answer_program, cut_at_first, reflection_code

FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
"""The fields of a row as evalplus publishes it."""
NEXT_DEFINITION = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
"""Where a base model begins the next top-level statement (evalplus 0.3.1, provider/utility.py)."""
REFLECTIONCODER = "arXiv 2405.17057; table in the README of SenseLLM/ReflectionCoder, commit 6b6e2d4"
MEASURED = (
    "evalplus 0.3.1, at its own time limits, on the completions in SenseLLM/ReflectionCoder, commit 6b6e2d4; "
    "its README repeats Magicoder-S-CL-7B's 70.7 (66.5) and 68.4 (56.6) here, a slip"
)
MAGICODER = "arXiv 2312.02120; table in the README of ise-uiuc/magicoder, commit 3ef43f0"

_DOCSTRING = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_COLUMNS = {"task_id", "prompt", "canonical_solution", "entry_point"}


def function_problem(row: Row) -> BenchmarkProblem:
    """Return the problem of a row in the fields of OpenAI's HumanEval."""
    return BenchmarkProblem(row["task_id"], row["prompt"], row["entry_point"], row)


def ask_for_function(wording: Wording, problem: BenchmarkProblem) -> Ask:
    """Return the words that ask for a function whose head and docstring are the prompt."""
    prompt = problem.prompt.strip()
    if wording == "magicoder":
        text = f"Write a solution to the following problem:\n{FENCE}python\n{prompt}\n{FENCE}"
        return Ask(text, f"{FENCE}python\n{prompt}")
    elif wording == "reflection":
        return Ask(f"Write a complete Python function for the problem.\n\n{prompt}", f"{FENCE}python\n")
    else:
        assert_never(wording)


def function_solution(style: Style, problem: BenchmarkProblem, raw: str, stops: Sequence[str] = NEXT_DEFINITION) -> str:
    """Return the prompt with the function that a model wrote after it.

    Args:
        stops: where a base model begins the next top-level statement.
    """
    if style == "completion":
        return problem.prompt + cut_at_first(raw, stops)
    elif style == "chat":
        return answer_program(raw, problem.entry_point, problem.prompt)
    elif style == "magicoder":
        return problem.prompt + raw.split(FENCE)[0]
    elif style == "reflection":
        return problem.prompt + reflection_code(raw)
    else:
        assert_never(style)


def docstring_of(row: Row) -> str | None:
    """Return the description in the prompt of a row with HumanEval's columns; None for another row.

    MBPP+ has these columns, too.
    """
    if not row.keys() >= _COLUMNS:
        return None
    found = _DOCSTRING.findall(row["prompt"])
    # The entry point comes last; helpers with docstrings of their own may stand before it.
    return str(found[-1][1] if found else row["prompt"])


def _judge(problems: Sequence[BenchmarkProblem], settings: JudgeSettings) -> AbstractContextManager[SampleJudge]:
    rows = [(problem, problem.record["base_input"], problem.record["plus_input"]) for problem in problems]
    return judged_by_evalplus([make_task(HUMANEVAL.name, one, (base, plus)) for one, base, plus in rows], settings)


def _texts(row: Row, number: int) -> TaskTexts | None:
    docstring = docstring_of(row)
    if docstring is None or str(row["task_id"]).lower().startswith("mbpp"):
        return None
    description = re.split(r"^\s*>>>", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    # The descriptions of some are very short, so that prompts also count as a whole.
    parts: dict[Part, str] = {
        "description": description,
        "solution": row["canonical_solution"],
        "prompt": row["prompt"],
    }
    return TaskTexts(str(row["task_id"]), parts)


HUMANEVAL = Benchmark(
    name="humaneval",
    title="HumanEval",
    fields=FIELDS,
    problem=function_problem,
    ask=ask_for_function,
    next_statement=NEXT_DEFINITION,
    solution=function_solution,
    judge=_judge,
    suites=SUITES,
    download=Download("HUMANEVAL_OVERRIDE_PATH", "HumanEvalPlus-v0.1.10.jsonl"),
    published=(
        PublishedScore("ReflectionCoder-CL-7B", REFLECTIONCODER, (75.0, 68.9)),
        PublishedScore("ReflectionCoder-CL-34B", MEASURED, (78.0, 73.8)),
        PublishedScore("ReflectionCoder-DS-6.7B", REFLECTIONCODER, (80.5, 74.4)),
        PublishedScore("ReflectionCoder-DS-33B", REFLECTIONCODER, (82.9, 76.8)),
        PublishedScore("Magicoder-CL-7B", MAGICODER, (60.4, 55.5)),
        PublishedScore("Magicoder-S-CL-7B", MAGICODER, (70.7, 66.5)),
        PublishedScore("Magicoder-DS-6.7B", MAGICODER, (66.5, 60.4)),
        PublishedScore("Magicoder-S-DS-6.7B", MAGICODER, (76.8, 70.7)),
    ),
    texts=_texts,
)
