"""MultiPL-E: HumanEval's functions in other languages, as nuprl publishes them, a program and its tests in one file.

Only toolchains that are installed are used; samples in other languages are skipped. The programs are run as MultiPL-E's
own ``evaluation/src/eval_*.py`` run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from reflectron.tools.benchmarks.extraction import BLOCK_TAGS, FENCE, cut_at_first, marked_block
from reflectron.tools.benchmarks.programs import Toolchain, run_with_tests

# Without these a JVM reserves more address space than a program may use.
_SMALL_JVM = ("-Xmx1g", "-XX:CompressedClassSpaceSize=64m", "-XX:ReservedCodeCacheSize=64m")
_CLASSES = "/sandbox:/sandbox/javatuples.jar"


@dataclass(frozen=True, kw_only=True)
class _Language:
    name: str
    """As ReflectionCoder's prompts call it."""
    fences: tuple[str, ...]
    """The names of its blocks in a chat's answer."""
    toolchain: Toolchain
    end: str
    """Copies the standard input to the standard output, where the tests end."""
    head: str = ""
    """What ``end`` needs."""
    main: str = ""
    """How the function begins whose body the tests are, to the end of the file."""
    tests_close: bool = True
    """Whether the tests close the function that is asked for."""


_LANGUAGES = {
    "java": _Language(
        name="Java",
        fences=("java",),
        toolchain=Toolchain(
            "Problem.java",
            (
                ("javac", *(f"-J{o}" for o in _SMALL_JVM), "-encoding", "UTF8", "-cp", _CLASSES, "Problem.java"),
                ("java", *_SMALL_JVM, "-ea", "-cp", _CLASSES, "EndOfTests"),
            ),
        ),
        end="class EndOfTests { public static void main(String[] args) throws Throwable { Problem.main(args);"
        " for (int mark; (mark = System.in.read()) >= 0;) System.out.write(mark); System.out.flush(); } }",
    ),
    "js": _Language(
        name="Javascript",
        fences=("javascript", "js", "typescript", "ts"),
        toolchain=Toolchain("problem.js", (("node", "problem.js"),)),
        end=";require('fs').writeSync(1, require('fs').readFileSync(0));",
        tests_close=False,
    ),
    "cpp": _Language(
        name="C++",
        fences=("cpp", "c++"),
        toolchain=Toolchain("problem.cpp", (("g++", "-std=c++17", "problem.cpp", "-o", "problem"), ("./problem",))),
        end=";for (int mark; (mark = std::getchar()) != EOF;) std::putchar(mark);",
        head="#include <cstdio>\n",
        main="\nint main",
    ),
    "php": _Language(
        name="PHP",
        fences=("php",),
        toolchain=Toolchain("problem.php", (("php", "problem.php"),)),
        end="fwrite(STDOUT, stream_get_contents(STDIN));",
        tests_close=False,
    ),
    "swift": _Language(
        name="Swift",
        fences=("swift",),
        toolchain=Toolchain("problem.swift", (("swiftc", "problem.swift", "-o", "problem"), ("./problem",))),
        end="while let mark = readLine() { print(mark) }",
    ),
    "rs": _Language(
        name="Rust",
        fences=("rust", "rs"),
        toolchain=Toolchain("problem.rs", (("rustc", "problem.rs", "-o", "problem"), ("./problem",))),
        end=";std::io::copy(&mut std::io::stdin(), &mut std::io::stdout()).unwrap();",
        main="\nfn main()",
    ),
}


def judge_program(problem: BenchmarkProblem, code: str, settings: JudgeSettings) -> SuiteVerdict:
    """Run one sample with its tests."""
    language = _language(problem)
    files = {"javatuples.jar": settings.java_classes} if language == "java" and settings.java_classes else {}
    return run_with_tests(_with_tests(problem, code), _LANGUAGES[language].toolchain, settings.kind, files)


def missing_toolchains(problems: Sequence[BenchmarkProblem]) -> dict[str, str]:
    """Return what is not installed, by language of the problems."""
    missing = {}
    for language in dict.fromkeys(map(_language, problems)):
        if language not in _LANGUAGES:
            missing[language] = f"not supported; supported are {', '.join(_LANGUAGES)}"
        elif absent := _LANGUAGES[language].toolchain.missing:
            missing[language] = f"{absent} is not installed"
    return missing


def _with_tests(problem: BenchmarkProblem, code: str) -> str:
    """Return answer and tests in one program that says when the tests have ended."""
    language, tests = _LANGUAGES[_language(problem)], problem.record["tests"]
    if language.main:
        before, brace, after = tests.rpartition("}")
        tests = f"{before}{language.end}{brace}{after}"
    elif tests.rstrip().endswith("?>"):
        # PHP ends there.
        tests = f"{tests}<?php {language.end}"
    else:
        tests = f"{tests}\n{language.end}\n"
    return f"{language.head}{code}\n{tests}"


def _problem(row: Row) -> BenchmarkProblem:
    return BenchmarkProblem(row["name"], row["prompt"], "", row)


def _language(problem: BenchmarkProblem) -> str:
    return str(problem.record["language"])


def _ask(wording: Wording, problem: BenchmarkProblem) -> Ask:
    language = _LANGUAGES[_language(problem)].name
    prefix = f"{FENCE}{language.lower()}\n{problem.prompt}"
    if wording == "magicoder":
        text = f"{FENCE}{language.lower()}\n{problem.prompt.strip()}\n{FENCE}"
        return Ask(f"Write a solution to the following problem:\n{text}", prefix)
    elif wording == "reflection":
        return Ask(f"Write a complete {language} function for the problem.\n\n{problem.prompt.strip()}", prefix)
    else:
        assert_never(wording)


def _solution(style: Style, problem: BenchmarkProblem, raw: str) -> str:
    """Return prompt and body, left open where the tests close it; a chat repeats the prompt itself."""
    language, stops = _LANGUAGES[_language(problem)], tuple(problem.record["stop_tokens"])
    prompt, text = problem.prompt, raw
    for tag in BLOCK_TAGS:
        text = text.replace(tag, "")
    if style == "completion":
        return prompt + cut_at_first(raw, stops)
    elif style == "chat":
        prompt, code = "", marked_block(text, language.fences)
    elif style == "reflection" or style == "magicoder":
        code = text.split(FENCE)[0]
    else:
        assert_never(style)
    # ReflectionCoder's: a model writes the function to its end and perhaps more functions, so the last end counts.
    for end in (*filter(None, [language.main]), *(stops if language.tests_close else ("\n}",))):
        code = code.rpartition(end)[0] if end in code else code
    return prompt + code + ("" if language.tests_close else "\n}")


def _texts(row: Row, number: int) -> TaskTexts | None:
    if not row.keys() >= {"name", "language", "prompt", "tests"}:
        return None
    return TaskTexts(f"{row['language']}/{row['name']}", {"description": row["prompt"]})


MULTIPL_E = Benchmark(
    name="multipl-e",
    title="MultiPL-E",
    fields=("name", "language", "prompt", "tests", "stop_tokens"),
    problem=_problem,
    ask=_ask,
    fenced_answer=True,
    solution=_solution,
    judge=judge_with(judge_program),
    group=_language,
    unavailable=missing_toolchains,
    texts=_texts,
)
