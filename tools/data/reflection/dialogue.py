"""Two ways to prompt a generator: as a chat model that writes fenced code, or in ReflectionCoder's own tags.

A dialogue turns the blocks of a sequence into the next request, and an answer into blocks. It holds no state: the same
blocks ask the same request. The prompts follow the intent of ReflectionCoder's construction (arXiv 2405.17057, section
3.1), whose own prompts are not published: write, test by assertions, run, analyse, repair; then answer as if at the
first attempt. A changed prompt changes its fingerprint, and with it what is asked anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import assert_never

from reflectron.engine.data.conversation import Block, Conversation, Message
from reflectron.engine.data.tokenization import render
from reflectron.engine.data.tokenizer import TAGS
from reflectron.engine.files import write_text
from reflectron.tools.data.reflection.programs import has_tests, python_fences
from reflectron.tools.llm.request import PromptTemplate, Request

_BLOCK = re.compile(r"\s*<\|(text|code)\|>(.*)", re.DOTALL)
_ENDS = ("<|endofblock|>", "<|endofmessage|>")
REFLECTION_INSTRUCTION = PromptTemplate(
    "reflection-instruction-1",
    "Solve the task below in Python. Write the code together with assert statements that test it, run it, and when it "
    "fails, analyse the error and repair the code until all tests pass.\n\n$problem",
)
"""The first user turn: it is sent, and it is what the training sample shows."""
SYSTEM = PromptTemplate(
    "reflection-system-1",
    "You are a careful Python programmer with a code interpreter.\n"
    "\n"
    "In each turn, first explain in a few sentences what you are about to do, then give exactly one block of code "
    "between ```python and ```. The block is run as soon as it ends, and its output is shown to you; never write the "
    "output yourself.\n"
    "\n"
    "Each block is a complete program: the solution as functions or classes with the names that the task gives, and "
    "below them top-level assert statements that call the solution with concrete arguments and compare its results "
    "with values that you worked out from the task, ordinary and edge cases alike. The program reads no input, no "
    "files and no network, and it ends by itself.\n"
    "\n"
    "When a run fails, explain which value or step is wrong and why, then give the whole repaired program with its "
    "tests. Do not weaken or remove a test to make it pass; change one only if it contradicts the task, and say so.",
)
FAILED = PromptTemplate(
    "reflection-failed-1",
    "The interpreter printed:\n\n```\n$output\n```\n\nAnalyse the cause, then give the whole repaired program with its "
    "tests.",
)
UNTESTED = PromptTemplate(
    "reflection-untested-1",
    "The interpreter printed:\n\n```\n$output\n```\n\nNo assert statement has been run yet. Give the whole program "
    "with assert statements that test the solution.",
)
ANSWER = PromptTemplate(
    "reflection-answer-1",
    "All tests pass. Now answer the original task anew, for a reader who sees nothing of the above: the complete "
    "solution in one block between ```python and ```, without the tests, and if it helps the reader a short "
    "explanation of how it works. Do not mention tests, runs, errors or earlier versions.\n\nThe task:\n\n$problem",
)
CHAT_TEMPLATES = (SYSTEM, REFLECTION_INSTRUCTION, FAILED, UNTESTED, ANSWER)
TAG_TEMPLATES = (REFLECTION_INSTRUCTION,)
_TOKENIZER = "tokenizer.json"
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


class UnusableStep(Exception):
    """An answer that is no step of a sequence: ``<kind>: <detail>``."""


@dataclass(frozen=True)
class ReflectionProblem:
    """A task to solve."""

    key: str
    """Content hash of the text."""
    text: str
    source: str
    """File and line of its record."""

    def instruction(self) -> str:
        """Return the first user turn of its reflection sample."""
        return REFLECTION_INSTRUCTION.fill(problem=self.text)


class GeneratorDialogue(Protocol):
    """One way to speak to a generator."""

    template: str
    """Fingerprint of the prompts."""

    def reflect(self, problem: ReflectionProblem, blocks: Sequence[Block]) -> Request:
        """Ask for the next step of a reflection sequence."""

    def step(self, text: str) -> list[Block]:
        """Read the blocks of the answer to ``reflect``; none when the generator has ended its turn.

        Raises:
            UnusableStep: with the reason.
        """

    def answer(
        self, problem: ReflectionProblem, blocks: Sequence[Block], said: Sequence[Block], sample: int
    ) -> Request:
        """Ask for the one-off answer, or for its next part after ``said``."""

    def part(self, text: str) -> list[Block]:
        """Read the blocks of the answer to ``answer``; none when the generator has ended its turn.

        Raises:
            UnusableStep: with the reason.
        """

    one_part: bool
    """Whether an answer comes in one part."""


def fingerprint(templates: tuple[PromptTemplate, ...]) -> str:
    """Return one fingerprint of several templates."""
    return " ".join(template.fingerprint for template in templates)


class Chat:
    """Any instruction-tuned model behind ``/chat/completions``.

    A turn is what stands before the first fenced Python, and that code. What follows is cut off: the model wrote it
    without having seen what its code prints.
    """

    template = fingerprint(CHAT_TEMPLATES)
    one_part = True

    def reflect(self, problem: ReflectionProblem, blocks: Sequence[Block]) -> Request:
        """Ask for an attempt; the last user turn tells what the interpreter printed."""
        return self._request("reflect", problem, self._history(problem, blocks), 0)

    def step(self, text: str) -> list[Block]:
        """Read prose and code."""
        fences = python_fences(text)
        if not fences or not fences[0].code.strip():
            raise UnusableStep("no code: a turn of the sequence has no block of Python")
        fence = fences[0]
        prose = text[: fence.start].strip()
        return [*([Block("text", prose)] if prose else []), Block("code", fence.code)]

    def answer(
        self, problem: ReflectionProblem, blocks: Sequence[Block], said: Sequence[Block], sample: int
    ) -> Request:
        """Ask in the same conversation, whose last run passed."""
        history = self._history(problem, blocks)[:-1]
        return self._request("answer", problem, [*history, _user(ANSWER.fill(problem=problem.text))], sample)

    def part(self, text: str) -> list[Block]:
        """Read the whole answer as one text, as in the published data."""
        return [Block("text", text.strip())]

    def _request(self, stage: str, problem: ReflectionProblem, messages: list[dict[str, str]], sample: int) -> Request:
        return Request(problem=problem.key, stage=stage, template=self.template, input=tuple(messages), sample=sample)

    def _history(self, problem: ReflectionProblem, blocks: Sequence[Block]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": SYSTEM.text}, _user(problem.instruction())]
        said, tested = "", False
        for block in blocks:
            if block.type == "text":
                said = f"{block.content}\n\n"
            elif block.type == "code":
                tested = has_tests(block.content)
                messages.append({"role": "assistant", "content": f"{said}```python\n{block.content}\n```"})
                said = ""
            elif block.type == "execution":
                template = FAILED if tested else UNTESTED
                messages.append(_user(template.fill(output=block.content.strip() or "(nothing)")))
            else:
                assert_never(block.type)
        return messages


class Tags:
    """A checkpoint trained on reflection sequences, behind ``/completions``: it writes one tagged block a request.

    The server must send special tokens as text. That a code block has ended is when the interpreter runs it: no
    training target ever asks the model for ``<|execution|>``.
    """

    template = fingerprint(TAG_TEMPLATES)
    one_part = False

    def reflect(self, problem: ReflectionProblem, blocks: Sequence[Block]) -> Request:
        """Ask for the next block of the first assistant turn."""
        return self._request("reflect", problem, _open_turn(_messages(problem, blocks)), 0)

    def step(self, text: str) -> list[Block]:
        """Read one block."""
        for end in _ENDS:
            text = text.split(end)[0]
        if not text.strip():
            return []
        if (match := _BLOCK.fullmatch(text)) is None:
            raise UnusableStep(
                "no tag: a block opens with neither <|text|> nor <|code|>; a server that hides special tokens "
                "needs skip_special_tokens=false or visible tags, see docs/data_factory.md"
            )
        if match[1] == "code" and not match[2].strip():
            raise UnusableStep("no code: a code block is empty")
        return [Block("text" if match[1] == "text" else "code", match[2])]

    def answer(
        self, problem: ReflectionProblem, blocks: Sequence[Block], said: Sequence[Block], sample: int
    ) -> Request:
        """Ask for the next block of the second assistant turn."""
        asked = Message("user", (Block("text", problem.text),))
        messages = (*_messages(problem, blocks), asked, Message("assistant", tuple(said)))
        return self._request("answer", problem, _open_turn(messages), sample)

    def part(self, text: str) -> list[Block]:
        """Read one block."""
        return self.step(text)

    def _request(self, stage: str, problem: ReflectionProblem, prompt: str, sample: int) -> Request:
        return Request(
            problem=problem.key, stage=stage, template=self.template, input=prompt, sample=sample, stop=_ENDS
        )


def show_tags(checkpoint: Path, folder: Path) -> None:
    """Link a checkpoint's files into a new folder, with a tokenizer whose tags are not special.

    A server that removes special tokens from its answers, as ``transformers serve`` does, would hide the seven tags
    that ``Tags`` reads. In the new folder they are plain added tokens, with the same ids.

    Raises:
        ValueError: when the tokenizer has no tags, or the folder exists.
    """
    if not (checkpoint / _TOKENIZER).is_file():
        raise ValueError(f"{checkpoint / _TOKENIZER} is missing, expected a checkpoint exported by `reflectron train`")
    tokenizer = _read(checkpoint / _TOKENIZER)
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    if missing := [tag for tag in TAGS if tag not in added]:
        raise ValueError(
            f"{checkpoint / _TOKENIZER} has no token {missing[0]}, expected a tokenizer with the seven tags"
        )
    for tag in TAGS:
        added[tag]["special"] = False
    if folder.exists():
        raise ValueError(f"{folder} exists, expected a new folder")
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name not in (_TOKENIZER, *_CONFIGS):
            (folder / file.name).symlink_to(file.resolve())
    _write(folder / _TOKENIZER, tokenizer)
    for name in _CONFIGS:
        if (checkpoint / name).is_file():
            _write(folder / name, _without_special(_read(checkpoint / name), TAGS))


def _messages(problem: ReflectionProblem, blocks: Sequence[Block]) -> tuple[Message, ...]:
    return (Message("user", (Block("text", problem.instruction()),)), Message("assistant", tuple(blocks)))


def _open_turn(messages: tuple[Message, ...]) -> str:
    """Render the conversation, its last turn still open."""
    return render(Conversation("reflection", messages)).removesuffix("<|endofmessage|>")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _without_special(config: dict[str, Any], tags: tuple[str, ...]) -> dict[str, Any]:
    for token in config.get("added_tokens_decoder", {}).values():
        token["special"] = token["special"] and token["content"] not in tags
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(listed := config.get(key), list):
            config[key] = [token for token in listed if _content(token) not in tags]
    return config


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
