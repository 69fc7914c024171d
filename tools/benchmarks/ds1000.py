"""DS-1000 in the simplified format of April 2024: questions about Python's data-science libraries.

An answer is put into the problem's own test program, which is run as DS-1000's ``test_ds1000.py`` runs it.
"""

from __future__ import annotations

import re

from typing_extensions import assert_never

from reflectron.tools.benchmarks.benchmark import (
    Ask,
    Benchmark,
    BenchmarkProblem,
    JudgeSettings,
    Row,
    Style,
    SuiteVerdict,
    TaskTexts,
    Wording,
    judge_with,
)
from reflectron.tools.benchmarks.extraction import FENCE, marked_block, reflection_code
from reflectron.tools.benchmarks.programs import PYTHON_TOOLCHAIN, run_with_tests
from reflectron.tools.llm.fences import PYTHON

# Where prompts turn from the question to the frame of the answer.
_ANSWER = re.compile(r"\nA:\s*\n|BEGIN SOLUTION|SOLUTION START")


def judge_program(problem: BenchmarkProblem, code: str, settings: JudgeSettings) -> SuiteVerdict:
    """Run one sample with its tests."""
    return run_with_tests(_with_tests(problem, code), PYTHON_TOOLCHAIN, settings.kind)


def _with_tests(problem: BenchmarkProblem, code: str) -> str:
    """Return a problem's test program with an answer in it."""
    context = problem.record["code_context"]
    checks = "test_string(code)\n" if "test_string(" in context else ""
    return f"{context}\ncode = {code!r}\ntest_execution(code)\n{checks}"


def _problem(row: Row) -> BenchmarkProblem:
    return BenchmarkProblem(f"DS-1000/{row['metadata']['problem_id']}", row["prompt"], "", row)


def _library(problem: BenchmarkProblem) -> str:
    return str(problem.record["metadata"]["library"])


def _ask(wording: Wording, problem: BenchmarkProblem) -> Ask:
    # Both papers' words.
    prompt = problem.prompt.replace("<code>", f"{FENCE}python").replace("</code>", FENCE)
    return Ask(f'{prompt}\n\nComplete the Python code in "..."', f"{FENCE}python")


def _solution(style: Style, problem: BenchmarkProblem, raw: str) -> str:
    if style == "reflection":
        code = reflection_code(raw)
    elif style == "chat":
        code = marked_block(raw, PYTHON)
    elif style == "magicoder" or style == "completion":
        code = raw.split(FENCE)[0]
    else:
        assert_never(style)
    return code.split("END SOLUTION")[0].split("</code>")[0]


def _texts(row: Row, number: int) -> TaskTexts | None:
    if not row.keys() >= {"prompt", "reference_code"}:
        return None
    metadata = row.get("metadata")
    task = metadata.get("problem_id", number) if isinstance(metadata, dict) else number
    question = _ANSWER.split(row["prompt"], maxsplit=1)[0].strip().removeprefix("Problem:")
    return TaskTexts(str(task), {"description": question, "solution": row["reference_code"]})


DS1000 = Benchmark(
    name="ds1000",
    title="DS-1000",
    fields=("prompt", "code_context", "metadata"),
    problem=_problem,
    ask=_ask,
    fenced_answer=True,
    solution=_solution,
    judge=judge_with(judge_program),
    group=_library,
    texts=_texts,
)
