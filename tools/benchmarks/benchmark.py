"""What a benchmark is: its problems, how a model is asked, which program an answer holds, and how that is judged.

Every benchmark is a module of this folder that makes one ``Benchmark``, and ``catalogue`` lists them. Whatever
generates, scores, reports or decontaminates asks this object and knows no benchmark by name.

Prompts are those behind the papers' numbers: ReflectionCoder's ``src/test.py`` (commit 6b6e2d4) and Magicoder's
``experiments/text2code.py`` and ``ds_1000.py`` (commit 3ef43f0). No prompt starts with BOS by itself: the student of a
reflection run never saw it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import assert_never

from reflectron.engine.data.tokenizer import MAGICODER_PROMPT
from reflectron.engine.files import printable
from reflectron.tools.benchmarks.extraction import FENCE
from reflectron.tools.sandbox.wall import Breach, SandboxKind

Row = dict[str, Any]
"""A benchmark's row as it is published."""

Wording = Literal["reflection", "magicoder"]
"""Whose words ask for a solution."""
Style = Literal["reflection", "magicoder", "chat", "completion"]
"""``chat`` puts ReflectionCoder's words into the tokenizer's chat template; ``completion`` is the bare prompt."""
STYLES: tuple[Style, ...] = get_args(Style)

SUITES = ("base", "plus")
"""The tests of HumanEval and MBPP, and those that evalplus added; other benchmarks have the first alone."""
STATUSES = ("pass", "fail", "timeout")
"""evalplus's words."""
OF_TIME = ("wall_time", "cpu_time", "idle")
"""Breaches that count as a timeout, as they do for evalplus, whose limits are of the clock."""
LONGER_SECONDS = 10.0
"""CPU time of an input in a second trial, where the limit on it decided the first."""


@dataclass(frozen=True)
class BenchmarkProblem:
    """One task."""

    task_id: str
    """As published; ``DS-1000/<n>`` where the dataset only numbers its problems."""
    prompt: str
    """What a base model continues."""
    entry_point: str
    """Name of the function asked for; empty where the tests do not call one by name."""
    record: Row
    """The whole published row."""


@dataclass(frozen=True)
class ProgramSample:
    """One program for a task."""

    task_id: str
    number: int
    """Among those of its task, in the file's order."""
    code: str


@dataclass(frozen=True)
class SuiteVerdict:
    """How a sample did in one suite of tests: bounded, printable text, whatever the sample made up."""

    status: str
    """One of ``STATUSES``."""
    input: str = ""
    expected: str = ""
    got: str = ""
    """These three show the first input that failed, shortened; ``got`` may hold the error."""
    longer: str = ""
    """Status with ``LONGER_SECONDS`` of CPU time an input, where the limit on it decided; else empty."""

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.longer in ("", *STATUSES), self.longer
        for name in ("input", "expected", "got"):
            object.__setattr__(self, name, printable(getattr(self, name)))


def limit_verdict(breach: Breach) -> SuiteVerdict:
    """Return the verdict on a program that overstepped a limit of its sandbox."""
    return SuiteVerdict("timeout" if breach in OF_TIME else "fail", got=f"limit: {breach}")


Verdicts = tuple[SuiteVerdict, ...]
"""The verdicts of one sample, in the order of ``SUITES``."""


@dataclass(frozen=True, kw_only=True)
class JudgeLimits:
    """The limits of one sample's code."""

    input_seconds: float = 1.0
    """CPU time of one input, at least (evalplus: 1 s of the clock)."""
    suite_seconds: int = 60
    """CPU time of a suite (evalplus: 60 s of the clock)."""
    memory_bytes: int = 4 * 2**30
    """As evalplus."""
    comparing_seconds: int = 20
    """CPU time of comparing the answers of a suite, by a process of ours."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How the samples of a benchmark are judged."""

    limits: JudgeLimits
    kind: SandboxKind
    workers: int
    """Threads that prepare and judge."""
    java_classes: Path | None = None
    """The jar of javatuples 1.2, which some Java problems import."""


SampleJudge = Callable[[BenchmarkProblem, str], Verdicts]
"""Judges one program for a problem; called from several threads at once."""
JudgeOf = Callable[[Sequence[BenchmarkProblem], JudgeSettings], AbstractContextManager[SampleJudge]]
"""Prepares or checks what all samples of some problems need, and lends what judges them."""


def judge_with(judge: Callable[[BenchmarkProblem, str, JudgeSettings], SuiteVerdict]) -> JudgeOf:
    """Return the judge of a benchmark with one suite of tests that nothing needs to be prepared for."""
    return lambda problems, settings: nullcontext(lambda problem, code: (judge(problem, code, settings),))


Part = Literal["prompt", "description", "solution", "tests"]


@dataclass(frozen=True)
class TaskTexts:
    """The texts of one task that must not be trained on."""

    task_id: str
    parts: Mapping[Part, str]


@dataclass(frozen=True)
class Ask:
    """What is said to a model."""

    instruction: str
    """The user's turn; empty where a base model continues the problem."""
    response_prefix: str
    """How the model's answer begins; the model continues it. A chat's answer begins where the template ends."""


@dataclass(frozen=True)
class Download:
    """Where evalplus itself finds a benchmark's file."""

    variable: str
    """Environment variable that names it."""
    file: str
    """Its name in evalplus's cache."""


@dataclass(frozen=True)
class PublishedScore:
    """pass@1 of a paper's model in per cent, greedy, as its authors publish it."""

    model: str
    source: str
    pass_at_1: tuple[float, ...]
    """By suite."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All that the tools need to know of a benchmark."""

    name: str
    """On the command line and in files."""
    title: str
    """In tables."""
    fields: tuple[str, ...]
    """That every published row has."""
    problem: Callable[[Row], BenchmarkProblem]
    """The task of a row that has all ``fields``; a ``ValueError`` says what else is wrong with the row."""
    ask: Callable[[Wording, BenchmarkProblem], Ask]
    fenced_answer: bool = False
    """Whether a reflection model's answer ends where the fence that its prompt has opened is closed."""
    next_statement: tuple[str, ...] = ()
    """Where a base model begins the next top-level statement."""
    solution: Callable[[Style, BenchmarkProblem, str], str]
    """The program that a model's output amounts to."""
    judge: JudgeOf
    suites: tuple[str, ...] = SUITES[:1]
    """The suites of tests, each of which has a verdict."""
    group: Callable[[BenchmarkProblem], str] | None = None
    """What scores are broken down by, such as a language."""
    unavailable: Callable[[Sequence[BenchmarkProblem]], dict[str, str]] = lambda problems: {}
    """Groups that cannot be judged on this machine, and why; their samples are skipped."""
    download: Download | None = None
    published: tuple[PublishedScore, ...] = ()
    texts: Callable[[Row, int], TaskTexts | None] = lambda row, number: None
    """The texts of a row of this benchmark, plain or extended, by the row and its number; None for any other row."""


def make_ask(style: Style, benchmark: Benchmark, problem: BenchmarkProblem) -> Ask:
    """Return the words of ``style`` for one problem."""
    if style == "completion":
        return Ask("", problem.prompt)
    elif style == "reflection" or style == "chat":
        return benchmark.ask("reflection", problem)
    elif style == "magicoder":
        return benchmark.ask("magicoder", problem)
    else:
        assert_never(style)


def render(style: Style, ask: Ask, tokenizer: Any) -> str:
    """Return the text to continue.

    Args:
        tokenizer: of transformers; only ``chat`` uses it, for its chat template.

    Raises:
        ValueError: when ``chat`` is asked of a tokenizer without a template.
    """
    if style == "reflection":
        user = f"<|user|><|text|>{ask.instruction}<|endofblock|><|endofmessage|>"
        return f"{user}<|assistant|><|text|>{ask.response_prefix}"
    elif style == "magicoder":
        return MAGICODER_PROMPT.format(instruction=ask.instruction, response=ask.response_prefix)
    elif style == "completion":
        return ask.response_prefix
    elif style == "chat":
        if not tokenizer.chat_template:
            raise ValueError("--prompt is 'chat', but the tokenizer has no chat template; choose another style")
        messages = [{"role": "user", "content": ask.instruction}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text
    else:
        assert_never(style)


def stop_strings(style: Style, benchmark: Benchmark) -> tuple[str, ...]:
    """Return where generation may stop because ``Benchmark.solution`` cuts there at the latest."""
    if style == "reflection":
        tags = ("<|endofblock|>", "<|endofmessage|>")
        return (*tags, FENCE) if benchmark.fenced_answer else tags
    elif style == "magicoder":
        return (FENCE,)
    elif style == "completion":
        return benchmark.next_statement
    elif style == "chat":
        return ()
    else:
        assert_never(style)
