"""Samples of MultiPL-E and DS-1000 come in, each runs with its tests in one program, in a sandbox.

A program passes when it exits with 0, as the benchmarks' own scripts have it (MultiPL-E ``evaluation/src/eval_*.py``,
DS-1000 ``test_ds1000.py``), and has come to the end of its tests, which they do not ask for: one that exits early with
0 fails here. Only toolchains that are installed are used; which are missing is said.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.text import printable
from reflectron.tools.eval.problems import Dataset, Problem
from reflectron.tools.eval.samples import Sample
from reflectron.tools.eval.verdict import Verdict, Verdicts, limit_verdict
from reflectron.tools.sandbox.process import Limits, Outcome, SandboxKind, run_sandboxed, sandbox_folder

# Of the clock; what counts is the CPU time, so that a loaded machine passes what an idle one passes.
_PATIENCE = 5
MEMORY_BYTES = 4 << 30
"""What one program may use, address space included."""

# Without these a JVM reserves more address space than that.
_SMALL_JVM = ("-Xmx1g", "-XX:CompressedClassSpaceSize=64m", "-XX:ReservedCodeCacheSize=64m")


@dataclass(frozen=True)
class Toolchain:
    """How programs of a language are run: every step must exit with 0."""

    file: str
    steps: tuple[tuple[str, ...], ...]
    cpu_seconds: int = 60

    @property
    def programs(self) -> list[str]:
        """What must be installed."""
        return [step[0] for step in self.steps if not step[0].startswith("./")]


_CLASSES = "/sandbox:/sandbox/javatuples.jar"
TOOLCHAINS = {
    "java": Toolchain(
        "Problem.java",
        (
            ("javac", *(f"-J{option}" for option in _SMALL_JVM), "-encoding", "UTF8", "-cp", _CLASSES, "Problem.java"),
            ("java", *_SMALL_JVM, "-ea", "-cp", _CLASSES, "EndOfTests"),
        ),
    ),
    "js": Toolchain("problem.js", (("node", "problem.js"),)),
    "cpp": Toolchain("problem.cpp", (("g++", "-std=c++17", "problem.cpp", "-o", "problem"), ("./problem",))),
    "php": Toolchain("problem.php", (("php", "problem.php"),)),
    "swift": Toolchain("problem.swift", (("swiftc", "problem.swift", "-o", "problem"), ("./problem",))),
    "rs": Toolchain("problem.rs", (("rustc", "problem.rs", "-o", "problem"), ("./problem",))),
}
"""By MultiPL-E's name of the language."""

# What a program does where its tests end: it says what it finds on its standard input.
_END_OF_TESTS = {
    "java": "class EndOfTests { public static void main(String[] args) throws Throwable { Problem.main(args);"
    " for (int mark; (mark = System.in.read()) >= 0;) System.out.write(mark); System.out.flush(); } }",
    "js": ";require('fs').writeSync(1, require('fs').readFileSync(0));",
    "cpp": ";for (int mark; (mark = std::getchar()) != EOF;) std::putchar(mark);",
    "php": "fwrite(STDOUT, stream_get_contents(STDIN));",
    "swift": "while let mark = readLine() { print(mark) }",
    "rs": ";std::io::copy(&mut std::io::stdin(), &mut std::io::stdout()).unwrap();",
}

# The mark is out of reach of a program that replaces itself by another one.
_RUN_PYTHON = """
import os
def main():
    mark, said = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with open("problem.py", encoding="utf-8") as file:
        program = compile(file.read(), "problem.py", "exec")
    exec(program, {"__name__": "__main__"})
    os.write(said, os.read(mark, 64))
main()
"""
_PYTHON = Toolchain("problem.py", ((sys.executable, "-I", "-c", _RUN_PYTHON),), cpu_seconds=120)


def with_toolchain(problems: Sequence[Problem], samples: Sequence[Sample]) -> list[Sample]:
    """The samples of MultiPL-E that can be run here; prints which languages are skipped.

    Raises:
        ValueError: when there is none.
    """
    missing = missing_toolchains(problems)
    for language, what in missing.items():
        print(f"{printable(language)} is left out: {what}")
    languages = {problem.task_id: problem.record["language"] for problem in problems}
    left = [sample for sample in samples if languages[sample.task_id] not in missing]
    if not left:
        raise ValueError("nothing can be scored: no toolchain of these problems is installed")
    return left


def shares_by_group(
    dataset: Dataset, problems: Sequence[Problem], samples: Sequence[Sample], verdicts: Sequence[Verdicts]
) -> dict[str, float]:
    """Share of samples that pass, by language (MultiPL-E) or library (DS-1000); others have no groups."""
    if dataset not in ("multipl-e", "ds1000"):
        return {}
    groups = {p.task_id: p.record.get("language") or p.record["metadata"]["library"] for p in problems}
    passed: dict[str, list[bool]] = {}
    for sample, (verdict, *_) in zip(samples, verdicts, strict=True):
        passed.setdefault(groups[sample.task_id], []).append(verdict.status == "pass")
    return {group: sum(values) / len(values) for group, values in passed.items()}


def missing_toolchains(problems: Sequence[Problem]) -> dict[str, str]:
    """Language -> what is not installed, of the languages of MultiPL-E problems."""
    missing = {}
    for language in dict.fromkeys(problem.record["language"] for problem in problems):
        if language not in TOOLCHAINS:
            missing[language] = f"not supported; supported are {', '.join(TOOLCHAINS)}"
        elif absent := [name for name in TOOLCHAINS[language].programs if _found(name) is None]:
            missing[language] = f"{absent[0]} is not installed"
    return missing


def judge_program(problem: Problem, code: str, kind: SandboxKind, java_classes: Path | None) -> Verdict:
    """Run one sample with its tests; it passes when it exits with 0 and has come to the end of its tests.

    Args:
        java_classes: the jar of javatuples 1.2, which MultiPL-E's Java problems import.
    """
    language = problem.record.get("language")
    toolchain = TOOLCHAINS[language] if language else _PYTHON
    program = multipl_e_program(problem, code) if language else ds1000_program(problem, code)
    # In no file and in no memory of the program's before its tests have ended, unless it reads its standard input.
    mark = secrets.token_hex(16)
    with sandbox_folder() as folder:
        (folder / toolchain.file).write_bytes(program.encode(errors="replace"))
        if language == "java" and java_classes is not None:
            shutil.copyfile(java_classes, folder / "javatuples.jar")
        for step in toolchain.steps:
            outcome = _run(step, folder, toolchain, kind, mark if step is toolchain.steps[-1] else "")
            if outcome.ended != "exited" or outcome.returncode:
                return _verdict(outcome)
    return Verdict("pass") if mark in outcome.stdout else Verdict("fail", got="the program ended before its tests did")


def multipl_e_program(problem: Problem, code: str) -> str:
    """Answer and tests of a MultiPL-E problem, with what says that the tests have ended."""
    language, tests = problem.record["language"], problem.record["tests"]
    end = _END_OF_TESTS[language]
    if language in ("cpp", "rs"):
        # Their tests are the body of `main`, which ends with the file.
        before, brace, after = tests.rpartition("}")
        tests = f"{before}{end}{brace}{after}"
    elif language == "php" and tests.rstrip().endswith("?>"):
        tests = f"{tests}<?php {end}"
    else:
        tests = f"{tests}\n{end}\n"
    include = "#include <cstdio>\n" if language == "cpp" else ""
    return f"{include}{code}\n{tests}"


def ds1000_program(problem: Problem, code: str) -> str:
    """The test of a DS-1000 problem with an answer in it."""
    context = problem.record["code_context"]
    checks = "test_string(code)\n" if "test_string(" in context else ""
    return f"{context}\ncode = {code!r}\ntest_execution(code)\n{checks}"


def _run(step: Sequence[str], folder: Path, toolchain: Toolchain, kind: SandboxKind, stdin: str) -> Outcome:
    program = step[0]
    found = None if program.startswith("./") else _found(program)
    limits = Limits(
        wall_seconds=_PATIENCE * toolchain.cpu_seconds,
        cpu_seconds=toolchain.cpu_seconds,
        memory_bytes=MEMORY_BYTES,
        processes=256,
    )
    argv = [str(found or program), *step[1:]]
    environment = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    visible = _visible(found)
    return run_sandboxed(
        kind, argv, folder=folder, limits=limits, stdin=stdin, read_only=visible, environment=environment
    )


def _found(program: str) -> Path | None:
    """Where a program is, past rustup's stand-in, which needs a home of its own."""
    path = shutil.which(program)
    if path is None:
        return None
    if program == "rustc":
        root = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True, check=False)
        return Path(root.stdout.strip()) / "bin" / "rustc" if root.returncode == 0 else None
    return Path(path)


def _visible(program: Path | None) -> list[Path]:
    """What a program needs to be seen beside the system's folders: its installation, and a JDK's settings in /etc."""
    if program is None:
        return []
    home = Path(os.path.realpath(program)).parent.parent
    settings = {Path(os.path.realpath(path)).parent for path in home.glob("conf/**/*")}
    return [path for path in (home, program.parent.parent, *sorted(settings)) if not path.is_relative_to("/usr")]


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.ended != "exited" and outcome.ended != "signal":
        return limit_verdict(outcome.ended)
    said = (outcome.stderr or outcome.stdout).strip()
    return Verdict("fail", got=said[-300:] or f"exit code {outcome.returncode}")
