"""MBPP, with the tests that evalplus added: functions to be written from a line of text and one assertion."""

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
from reflectron.tools.benchmarks.expectations import AnswerForm, make_task
from reflectron.tools.benchmarks.extraction import FENCE, answer_program
from reflectron.tools.benchmarks.humaneval import (
    FIELDS,
    MAGICODER,
    MEASURED,
    REFLECTIONCODER,
    docstring_of,
    function_problem,
    function_solution,
)

# evalplus 0.3.1, provider/utility.py.
_NEXT_STATEMENT = ('\n"""', "\nassert")


def _ask(wording: Wording, problem: BenchmarkProblem) -> Ask:
    # The prompt is a docstring of one line of text and one assertion.
    lines = problem.prompt.replace('"""', "").strip().split("\n")
    text, assertion = lines[0].strip(), lines[1] if len(lines) > 1 else ""
    block = f"{FENCE}python\n{assertion}\n{FENCE}"
    if wording == "magicoder":
        text = f"{text.removesuffix('.')}. Your code should satisfy the following assertion:"
        return Ask(f"{text}\n{block}", f"{FENCE}python")
    elif wording == "reflection":
        return Ask(f"{text}\nYour code should satisfy the following assertion:\n{block}", f"{FENCE}python\n")
    else:
        assert_never(wording)


def _solution(style: Style, problem: BenchmarkProblem, raw: str) -> str:
    if style == "magicoder":
        # In the place of evalplus's sanitizer, which Magicoder's MBPP numbers went through.
        return answer_program(raw.split(FENCE)[0], problem.entry_point, problem.prompt)
    return function_solution(style, problem, raw, _NEXT_STATEMENT)


def _judge(problems: Sequence[BenchmarkProblem], settings: JudgeSettings) -> AbstractContextManager[SampleJudge]:
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS, MBPP_OUTPUT_SET_EQ_TASKS

    tasks = []
    for problem in problems:
        base, plus = (
            mbpp_deserialize_inputs(problem.task_id, problem.record[suite]) for suite in ("base_input", "plus_input")
        )
        form: AnswerForm = "set" if problem.entry_point in MBPP_OUTPUT_SET_EQ_TASKS else "whole"
        expected: AnswerForm = "presence" if problem.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS else form
        tasks.append(make_task(MBPP.name, problem, (base, plus), form, expected))
    return judged_by_evalplus(tasks, settings)


def _texts(row: Row, number: int) -> TaskTexts | None:
    if row.keys() >= {"task_id", "code", "test_list"}:
        tests, description = "\n".join(row["test_list"]), row.get("text") or row["prompt"]
        parts: dict[Part, str] = {"description": description, "solution": row["code"], "tests": tests}
        return TaskTexts(f"Mbpp/{row['task_id']}", parts)
    docstring = docstring_of(row)
    if docstring is None or not str(row["task_id"]).lower().startswith("mbpp"):
        return None
    description = re.split(r"^assert ", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    solution, tests = row["canonical_solution"], row.get("assertion", "")
    return TaskTexts(str(row["task_id"]), {"description": description, "solution": solution, "tests": tests})


MBPP = Benchmark(
    name="mbpp",
    title="MBPP",
    fields=FIELDS,
    problem=function_problem,
    ask=_ask,
    next_statement=_NEXT_STATEMENT,
    solution=_solution,
    judge=_judge,
    suites=SUITES,
    download=Download("MBPP_OVERRIDE_PATH", "MbppPlus-v0.2.0.jsonl"),
    published=(
        PublishedScore("ReflectionCoder-CL-7B", REFLECTIONCODER, (72.2, 61.4)),
        PublishedScore("ReflectionCoder-CL-34B", MEASURED, (80.2, 67.5)),
        PublishedScore("ReflectionCoder-DS-6.7B", REFLECTIONCODER, (81.5, 69.6)),
        PublishedScore("ReflectionCoder-DS-33B", REFLECTIONCODER, (84.1, 72.0)),
        PublishedScore("Magicoder-CL-7B", MAGICODER, (64.2, 52.6)),
        PublishedScore("Magicoder-S-CL-7B", MAGICODER, (68.4, 56.6)),
        PublishedScore("Magicoder-DS-6.7B", MAGICODER, (75.4, 61.9)),
        PublishedScore("Magicoder-S-DS-6.7B", MAGICODER, (75.7, 64.4)),
    ),
    texts=_texts,
)
