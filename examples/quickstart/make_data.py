"""Makes the quickstart's data files from the table of problems: JSON lines, the same bytes for the same seed.

Every execution block, every result named in a text and every expected value comes from running the code shown, in a
fresh interpreter. An attempt that does not fail, or a solution that does, stops the generation.

    python examples/quickstart/make_data.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from problems import PROBLEMS, Problem

Record = dict[str, Any]
Check = Literal["assert", "mixed", "print"]

FILES = ("reflection", "instruction", "instruction_query_answer", "validation")
SAMPLES_PER_PROBLEM = 9
LONGEST_REFLECTION = 480
"""Words, signs and line ends of a reflection sample; within 512 tokens of the shipped tokenizer."""
_WORDS = ("apple", "river", "stone", "cloud", "tiger", "maple", "piano", "lemon", "robot", "candle", "garden", "winter")
_REFLECTION_INSTRUCTIONS = (
    "Write code to solve the problem, test it, and fix it until it works.",
    "Solve the problem step by step: write code, run it, and repair what fails.",
    "Write a program for the task, check it by running it, and correct your mistakes.",
)
_QUESTIONS = (
    "Write a Python function `$signature` that $task.",
    "Implement `$signature` in Python: a function that $task.",
    "I need a Python function `$signature`. It $task.",
    "The function `$signature` $task. Write it in Python.",
)
_FAILURES = (
    "`$call` gives $got instead of $want. $diagnosis",
    "Expected $want for `$call`, but it is $got. $diagnosis",
    "The result of `$call` is $got and should be $want. $diagnosis",
)
_TYPED_KINDS = ("solution", "demonstration", "output")
_PAIR_KINDS = ("solution", "output", "repair")
_SUCCESSES = ("All checks pass.", "Now everything is right.", "The results are as expected.")


@dataclass(frozen=True)
class FailedAttempt:
    """Code that fails, and what a reader needs to see that."""

    code: str
    diagnosis: str
    calls: tuple[str, ...]
    """Up to the first that fails."""
    got: str
    """``repr`` of the result of that call, or the name of the exception that it raises."""
    want: str


@dataclass(frozen=True)
class Instance:
    """A problem with all its parameters filled in and its results computed."""

    question: str
    behaviour: str
    """What the solution does, as a sentence."""
    idea: str
    attempts: tuple[FailedAttempt, ...]
    solution: str
    calls: tuple[str, ...]
    wants: tuple[str, ...]
    """``repr`` of the solution's result for each call."""


@functools.cache
def run(program: str) -> str:
    """What ``program`` prints; of a traceback only the program's own last line and the error remain."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", program]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=False)
    if done.returncode == 0:
        return done.stdout
    line = re.findall(r'File "<string>", line (\d+)', done.stderr)[-1]
    error = done.stderr.strip().splitlines()[-1]
    return f"{done.stdout}Traceback (most recent call last), line {line}:\n{error}\n"


def results(code: str, calls: Sequence[str]) -> tuple[str, ...]:
    """``repr`` of each call's value, or the name of the exception that it raises."""
    probe = "try:\n    print(repr({}))\nexcept Exception as error:\n    print(type(error).__name__)"
    return tuple(run("\n".join([code, *(probe.format(call) for call in calls)])).splitlines())


def with_checks(code: str, calls: Sequence[str], wants: Sequence[str], check: Check) -> str:
    """``code`` followed by lines that test it; there may be more ``wants`` than ``calls``."""
    asserts = [f"assert {call} == {want}" for call, want in zip(calls, wants, strict=False)]
    prints = [f"print({call})" for call in calls]
    lines = {
        "assert": [*asserts, "print('ok')"],
        "mixed": [prints[0], *asserts[1:]],
        "print": prints,
    }[check]
    return "\n".join([code, "", *lines])


def instantiate(problem: Problem, values: dict[str, object], rng: random.Random) -> Instance:
    """Fill in the templates and run the code.

    Raises:
        ValueError: when the solution raises, or an attempt gives the right result for every call.
    """
    numbers = {f"n{i}": n for i, n in enumerate(rng.sample(range(11, 60), 5), 1)}
    words = {f"w{i}": word for i, word in enumerate(rng.sample(_WORDS, 4), 1)}
    values = {**numbers, **words, **values}

    def fill(template: str, **more: str) -> str:
        return Template(template).substitute(values, **more)

    calls = tuple(f"{values['f']}({fill(arguments)})" for arguments in problem.calls)
    solution = fill(problem.solution)
    wants = results(solution, calls)
    if "Traceback" in run(with_checks(solution, calls, wants, "assert")):
        raise ValueError(f"the solution of {problem.names[0]} with {values} is {wants}, expected a value for each call")
    attempts = tuple(
        _attempt(fill(attempt.code), fill(attempt.diagnosis), calls, wants) for attempt in problem.attempts
    )
    signature, task = f"{values['f']}({problem.arguments})", fill(problem.task)
    question = fill(rng.choice(_QUESTIONS), signature=signature, task=task)
    return Instance(question, f"`{values['f']}` {task}.", fill(problem.idea), attempts, solution, calls, wants)


def _attempt(code: str, diagnosis: str, calls: tuple[str, ...], wants: tuple[str, ...]) -> FailedAttempt:
    for i, (got, want) in enumerate(zip(results(code, calls), wants, strict=True)):
        if got != want:
            return FailedAttempt(code, diagnosis, calls[: i + 1], got, want)
    raise ValueError(f"an attempt passes all of {', '.join(calls)}, expected a failure:\n{code}")


def reflection_sample(instance: Instance, rng: random.Random) -> Record:
    """Attempts with their output and diagnosis, then the solution; in the second turn the solution alone.

    A sixth of the samples succeed at once; earlier attempts are omitted where the sample would be too long.
    """
    last = len(instance.attempts)
    first = last if rng.random() < 1 / 6 else rng.randrange(last)
    check: Check = rng.choice(("assert", "assert", "mixed", "print"))
    request = f"{rng.choice(_REFLECTION_INSTRUCTIONS)}\n\n{instance.question}"
    final = _fenced(instance.solution)
    room = LONGEST_REFLECTION - _size(request + instance.question + final)
    sequence = _reflection_sequence(instance, first, check, rng)
    while sum(_size(block["content"]) for block in sequence) > room and first < last:
        first += 1
        sequence = _reflection_sequence(instance, first, check, rng)
    messages = [
        _message("user", _block("text", request)),
        _message("assistant", *sequence),
        _message("user", _block("text", instance.question)),
        _message("assistant", _block("text", final)),
    ]
    return {"messages": messages, "type": "reflection"}


def _reflection_sequence(instance: Instance, first: int, check: Check, rng: random.Random) -> list[Record]:
    blocks = [_block("text", instance.idea)]
    for attempt in instance.attempts[first:]:
        blocks += _executed(attempt.code, attempt.calls, instance.wants, check)
        blocks.append(_block("text", _failure(attempt, rng)))
    blocks += _executed(instance.solution, instance.calls, instance.wants, check)
    if rng.random() < 0.7:
        blocks.append(_block("text", rng.choice(_SUCCESSES)))
    return blocks


def _size(text: str) -> int:
    return len(re.findall(r"[A-Za-z]+|\S|\n", text))


def _executed(code: str, calls: Sequence[str], wants: Sequence[str], check: Check) -> list[Record]:
    program = with_checks(code, calls, wants, check)
    return [_block("code", program), _block("execution", run(program))]


def _failure(attempt: FailedAttempt, rng: random.Random) -> str:
    template = "`$call` raises $got. $diagnosis" if attempt.got.endswith("Error") else rng.choice(_FAILURES)
    return Template(template).substitute(vars(attempt), call=attempt.calls[-1])


def generation_sample(instance: Instance, kind: str) -> Record:
    """Typed blocks. ``demonstration`` shows a program with its output, the other kinds are one question and answer."""
    if kind == "demonstration":
        program = f"{instance.solution}\n\nprint({instance.calls[0]})"
        blocks = [_block("text", instance.idea), _block("code", program), _block("execution", run(program))]
        messages = [_message("user", _block("text", instance.question)), _message("assistant", *blocks)]
    else:
        query, answer = question_and_answer(instance, kind)
        messages = [_message("user", _block("text", query)), _message("assistant", _block("text", answer))]
    return {"messages": messages, "type": "generation"}


def question_and_answer(instance: Instance, kind: str) -> tuple[str, str]:
    """``solution``: write the function; ``output``: what does this print; ``repair``: find the fault."""
    if kind == "solution":
        return instance.question, f"{_fenced(instance.solution)}\n\n{instance.idea}"
    if kind == "output":
        program = "\n".join([instance.solution, "", *(f"print({call})" for call in instance.calls)])
        query = f"What does this code print, and why?\n\n{_fenced(program)}"
        return query, f"It prints:\n\n```\n{run(program)}```\n\n{instance.behaviour}"
    attempt = instance.attempts[-1]
    query = f"{instance.behaviour} What is wrong here?\n\n{_fenced(attempt.code)}"
    return query, f"{attempt.diagnosis} Corrected:\n\n{_fenced(instance.solution)}"


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _message(role: str, *blocks: Record) -> Record:
    return {"role": role, "content": list(blocks)}


def _block(kind: str, content: str) -> Record:
    return {"type": kind, "content": content}


def settings(problem: Problem) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Parameter values for training and for validation; the first parameter's last value is in the latter only."""
    fields = {**problem.parameters, "f": problem.names}
    every = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    name, choices = next(iter(problem.parameters.items()))
    return (
        [values for values in every if values[name] != choices[-1]],
        [values for values in every if values[name] == choices[-1]],
    )


def problem_samples(problem: Problem, number: int, seed: int) -> dict[str, list[Record]]:
    """All samples of one problem, by file; they depend on nothing but the arguments.

    Args:
        number: place of the problem in the table; it spreads the kinds of samples evenly.
    """
    rng = random.Random(f"{seed}/{problem.names[0]}")
    training, validation = settings(problem)
    samples: dict[str, list[Record]] = {name: [] for name in FILES}
    for i, values in enumerate(rng.sample(training, SAMPLES_PER_PROBLEM), number):
        instance = instantiate(problem, values, rng)
        if i % 2:
            samples["reflection"].append(reflection_sample(instance, rng))
        elif i % 4:
            samples["instruction"].append(generation_sample(instance, rng.choice(_TYPED_KINDS)))
        else:
            query, answer = question_and_answer(instance, rng.choice(_PAIR_KINDS))
            samples["instruction_query_answer"].append({"query": query, "answer": answer})
    if number % 4 < 2:
        instance = instantiate(problem, rng.choice(validation), rng)
        held_out = reflection_sample(instance, rng) if number % 4 else generation_sample(instance, "solution")
        samples["validation"].append(held_out)
    return samples


def generate(seed: int) -> dict[str, list[Record]]:
    """The records of every file, in a random order."""
    samples: dict[str, list[Record]] = {name: [] for name in FILES}
    for number, problem in enumerate(PROBLEMS):
        for name, records in problem_samples(problem, number, seed).items():
            samples[name] += records
    for name, records in samples.items():
        random.Random(f"{seed}/{name}").shuffle(records)
    return samples


def write(folder: Path, seed: int) -> None:
    """Write all files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in generate(seed).items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{name}.jsonl: {len(records)} records")


def main() -> None:
    """Write the data files."""
    parser = argparse.ArgumentParser(description="Write the quickstart's data files.")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "data", help="folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
