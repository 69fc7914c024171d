"""Makes the data of the ablation: thousands of problems, their solutions as instruction samples, and reflection samples
whose programs were really run. The same seed gives the same bytes.

Every expected value and every execution block is what the interpreter gave; a problem is kept when its tests notice
each step that is omitted.

    python examples/ablation/make_problems.py --out outputs/ablation/data
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composition import Problem, diagnosis, draw, faulty, held_out_pairs

from reflectron.tools.benchmarks.benchmark import BenchmarkProblem, make_ask
from reflectron.tools.benchmarks.own import OWN

Record = dict[str, Any]

FILES = ("instruction", "reflection", "validation", "held_out")
CALLS = 12
_LONGEST_OUTPUT = 60
"""Characters of a value that a reflection sample shows."""
_RIGHT_AT_ONCE = 0.1
"""Share of reflection samples whose first program passes."""
_REFLECTION_INSTRUCTION = "Solve the problem, run the code with a test and repair it until it passes.\n\n"
_BEGINNINGS = ("Write it and test it.", "A first attempt with a test.", "One step a line, then a test.")
# What an assertion takes for equal is one value.
_BOOLEANS = {"False": "0", "True": "1"}
# Each program has names and output of its own; of a traceback its own line and the error remain.
_RUNNER = """
import contextlib, io, json, sys, traceback

def run(program):
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<program>"]
        print(f"Traceback (most recent call last), line {lines[-1]}:", file=output)
        print(traceback.format_exception_only(error)[-1], end="", file=output)
    return output.getvalue()

json.dump([run(program) for program in json.load(sys.stdin)], sys.stdout)
"""


@dataclass(frozen=True)
class Solved:
    """A problem with what its function gives, and a faulty version of it."""

    problem: Problem
    calls: tuple[str, ...]
    wants: tuple[str, ...]
    """``repr`` of the result of each call."""
    wrong: str
    failing: int
    """Index of a call for which ``wrong`` gives something else."""


def run_all(programs: Sequence[str]) -> list[str]:
    """What each program prints, all in one interpreter; they are made of this folder's tables alone."""
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _RUNNER]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, timeout=600, check=True)
    outputs: list[str] = json.loads(done.stdout)
    return outputs


def solve_all(problems: Sequence[Problem], rng: random.Random) -> list[Solved]:
    """Run solutions and faulty versions; problems that are too easy to get right by accident are dropped."""
    calls = [[f"{p.name}({p.source.draw(rng)!r})" for _ in range(CALLS)] for p in problems]
    versions = [[p.code, *faulty(p, rng)] for p in problems]
    programs = [_probe(code, c) for codes, c in zip(versions, calls, strict=True) for code in codes]
    outputs = iter(run_all(programs))
    solved = []
    for problem, c, codes in zip(problems, calls, versions, strict=True):
        want, *got = [tuple(_BOOLEANS.get(value, value) for value in next(outputs).splitlines()) for _ in codes]
        steps = len(problem.uses) - 1
        if len(set(want)) < (2 if "any(" in problem.code or "all(" in problem.code else 4) or want in got[:steps]:
            continue
        code, values = rng.choice([pair for pair in zip(codes[1:], got, strict=True) if pair[1] != want])
        failing = [i for i, (w, g) in enumerate(zip(want, values, strict=True)) if w != g]
        solved.append(
            Solved(problem, tuple(c), want, code, min(failing, key=lambda i: len(c[i] + want[i] + values[i])))
        )
    return solved


def _probe(code: str, calls: Sequence[str]) -> str:
    lines = [f"try:\n    print(repr({call}))\nexcept Exception as e:\n    print(type(e).__name__)" for call in calls]
    return "\n".join([code, *lines])


def make(count: int, held_out: bool, seed: int) -> list[Solved]:
    """Different problems, of compositions that are held out or of those that are not."""
    rng = random.Random(f"{seed}/{held_out}")
    reserved = held_out_pairs(seed)
    made: dict[str, Solved] = {}
    while len(made) < count:
        drawn = (draw(rng) for _ in range(count - len(made) + 20))
        problems = [p for p in drawn if bool(reserved & set(p.pairs)) == held_out]
        for solved in solve_all(problems, rng):
            made.setdefault(f"{solved.problem.source.name}{solved.problem.lines}", solved)
    return list(made.values())[:count]


def instruction_sample(solved: Solved) -> Record:
    """The problem and the function."""
    answer = _block("text", f"```python\n{solved.problem.code}\n```")
    messages = [_message("user", _block("text", instruction(solved.problem))), _message("assistant", answer)]
    return {"messages": messages, "type": "generation"}


def instruction(problem: Problem) -> str:
    """The words with which ``reflectron eval`` asks."""
    asked = BenchmarkProblem("", problem.prompt, problem.name, {})
    return make_ask("reflection", OWN, asked).instruction


def reflection_samples(solved: Sequence[Solved], rng: random.Random) -> Iterator[Record]:
    """A faulty program, what it prints, what is wrong, the right program, what it prints; then the problem anew."""
    tested = [(_tested(s, s.wrong), _tested(s, s.problem.code)) for s in solved]
    outputs = run_all([program for programs in tested for program in programs])
    for s, (wrong, right), i in zip(solved, tested, range(0, len(outputs), 2), strict=True):
        failed, passed = outputs[i : i + 2]
        assert "Traceback" in failed, wrong
        assert passed == "ok\n", right
        blocks = [_block("text", rng.choice(_BEGINNINGS))]
        if rng.random() >= _RIGHT_AT_ONCE:
            blocks += [_block("code", wrong), _block("execution", failed), _block("text", _analysis(s, failed))]
        blocks += [_block("code", right), _block("execution", passed)]
        asked, answer = instruction_sample(s)["messages"]
        request = _message("user", _block("text", _REFLECTION_INSTRUCTION + instruction(s.problem)))
        yield {"messages": [request, _message("assistant", *blocks), asked, answer], "type": "reflection"}


def _tested(solved: Solved, code: str) -> str:
    call, want = solved.calls[solved.failing], solved.wants[solved.failing]
    return f"{code}\n\nr = {call}\nassert r == {want}, r\nprint('ok')"


def _analysis(solved: Solved, output: str) -> str:
    error = output.splitlines()[-1]
    name, _, value = error.partition(": ")
    want = solved.wants[solved.failing]
    seen = f"It gives {value or 'nothing'} instead of {want}." if name == "AssertionError" else f"It raises {name}."
    return f"{seen} {diagnosis(solved.problem, solved.wrong)}"


def row(number: int, solved: Solved) -> Record:
    """The problem in HumanEval's fields."""
    checks = [
        f"    assert candidate({c[c.index('(') + 1 : -1]}) == {w}"
        for c, w in zip(solved.calls, solved.wants, strict=True)
    ]
    return {
        "task_id": f"ablation/{number}",
        "prompt": solved.problem.prompt,
        "entry_point": solved.problem.name,
        "canonical_solution": solved.problem.code,
        "test": "\n".join(["def check(candidate):", *checks]),
    }


def _message(role: str, *blocks: Record) -> Record:
    return {"role": role, "content": list(blocks)}


def _block(kind: str, content: str) -> Record:
    return {"type": kind, "content": content}


def generate(instructions: int, reflections: int, validations: int, tests: int, seed: int) -> dict[str, list[Record]]:
    """The records of every file; reflection samples are of problems that instruction samples are of as well."""
    training = make(instructions, False, seed)
    held_out = make(validations + tests, True, seed)
    short = [s for s in training if len(s.wants[s.failing]) <= _LONGEST_OUTPUT]
    if len(short) < reflections:
        raise ValueError(f"--reflections is {reflections}, expected at most {len(short)}: problems with short results")
    return {
        "instruction": [instruction_sample(solved) for solved in training],
        "reflection": list(reflection_samples(short[:reflections], random.Random(f"{seed}/reflection"))),
        "validation": [instruction_sample(solved) for solved in held_out[:validations]],
        "held_out": [row(number, solved) for number, solved in enumerate(held_out[validations:])],
    }


def main() -> None:
    """Parse arguments, write the files and say what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the four files")
    parser.add_argument("--instructions", type=int, default=4000, help="training problems (default: %(default)s)")
    parser.add_argument(
        "--reflections", type=int, default=500, help="of these with a reflection (default: %(default)s)"
    )
    parser.add_argument("--validations", type=int, default=100, help="held-out samples (default: %(default)s)")
    parser.add_argument("--tests", type=int, default=200, help="held-out problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    made = generate(args.instructions, args.reflections, args.validations, args.tests, args.seed)
    for name, records in made.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}.jsonl: {len(records)} records")


if __name__ == "__main__":
    main()
