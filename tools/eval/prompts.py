"""A problem comes in, the text that a model continues goes out, and its output becomes a program that can be tested.

Prompts and post-processing are those behind the papers' numbers: ReflectionCoder's ``src/test.py`` (commit 6b6e2d4) and
Magicoder's ``experiments/text2code.py`` and ``ds_1000.py`` (commit 3ef43f0). No prompt starts with BOS by itself: the
student of a reflection run never saw it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reflectron.engine.data.tokenizer import MAGICODER_PROMPT
from reflectron.tools.eval.extraction import answer_program
from reflectron.tools.eval.problems import Dataset, Problem
from reflectron.tools.llm.fences import PYTHON, find_fences, without_thoughts

Style = Literal["reflection", "magicoder", "chat", "completion"]
STYLES: tuple[Style, ...] = get_args(Style)

FENCE = "```"
LANGUAGE_NAMES = {"java": "Java", "js": "Javascript", "cpp": "C++", "php": "PHP", "swift": "Swift", "rs": "Rust"}
"""MultiPL-E's languages that are supported, as ReflectionCoder's prompts call them."""
_FENCE_NAMES = {
    "java": ("java",),
    "js": ("javascript", "js", "typescript", "ts"),
    "cpp": ("cpp", "c++"),
    "php": ("php",),
    "swift": ("swift",),
    "rs": ("rust", "rs"),
}

_BLOCK_TAGS = ("<|text|>", "<|code|>", "<|endofblock|>", "<|endofmessage|>")
# What models append to the function that was asked for (ReflectionCoder).
_AFTER_FUNCTION = ("\n# Test", "\nif", "\nassert", "\nprint", f"\n{FENCE}")
# Where a base model goes on to the next top-level statement (evalplus 0.3.1, provider/utility.py).
_NEXT_DEFINITION = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
_NEXT_STATEMENT = {
    "humaneval": _NEXT_DEFINITION,
    "functions": _NEXT_DEFINITION,
    "mbpp": ('\n"""', "\nassert"),
}
_BEFORE_MAIN = {"cpp": ("\nint main",), "rs": ("\nfn main()",)}
# Their tests do not close the function.
_CLOSED_BY_US = ("js", "php")


@dataclass(frozen=True)
class Ask:
    """What is said to a model."""

    instruction: str
    """The user's turn."""
    response_prefix: str
    """How the model's answer begins; the model continues it."""


def make_ask(style: Style, dataset: Dataset, problem: Problem) -> Ask:
    """Words of ``style`` for one problem; ``completion`` has no user's turn."""
    if style == "completion":
        return Ask("", problem.prompt)
    if dataset == "multipl-e":
        return _multipl_e_ask(style, problem)
    if dataset == "ds1000":
        return _ds1000_ask(style, problem)
    if dataset == "mbpp":
        text, assertion = mbpp_parts(problem.prompt)
        if style == "magicoder":
            text = f"{text.removesuffix('.')}. Your code should satisfy the following assertion:"
            return Ask(f"{text}\n{FENCE}python\n{assertion}\n{FENCE}", f"{FENCE}python")
        text = f"{text}\nYour code should satisfy the following assertion:\n{FENCE}python\n{assertion}\n{FENCE}"
        return Ask(text, "" if style == "chat" else f"{FENCE}python\n")
    prompt = problem.prompt.strip()
    if style == "magicoder":
        text = f"Write a solution to the following problem:\n{FENCE}python\n{prompt}\n{FENCE}"
        return Ask(text, f"{FENCE}python\n{prompt}")
    text = f"Write a complete Python function for the problem.\n\n{prompt}"
    return Ask(text, "" if style == "chat" else f"{FENCE}python\n")


def mbpp_parts(prompt: str) -> tuple[str, str]:
    """Text and first assertion of an MBPP+ prompt, which is a docstring of one line of text and one assertion."""
    lines = prompt.replace('"""', "").strip().split("\n")
    return lines[0].strip(), lines[1] if len(lines) > 1 else ""


def _multipl_e_ask(style: Style, problem: Problem) -> Ask:
    language = LANGUAGE_NAMES[problem.record["language"]]
    prefix = f"{FENCE}{language.lower()}\n{problem.prompt}"
    if style == "magicoder":
        text = f"{FENCE}{language.lower()}\n{problem.prompt.strip()}\n{FENCE}"
        return Ask(f"Write a solution to the following problem:\n{text}", prefix)
    text = f"Write a complete {language} function for the problem.\n\n{problem.prompt.strip()}"
    return Ask(text, "" if style == "chat" else prefix)


def _ds1000_ask(style: Style, problem: Problem) -> Ask:
    prompt = problem.prompt.replace("<code>", f"{FENCE}python").replace("</code>", FENCE)
    return Ask(f'{prompt}\n\nComplete the Python code in "..."', "" if style == "chat" else f"{FENCE}python")


def render(style: Style, ask: Ask, tokenizer: Any) -> str:
    """The text to continue.

    Args:
        tokenizer: of transformers; only ``chat`` uses it, for its chat template.

    Raises:
        ValueError: when ``chat`` is asked of a tokenizer without a template.
    """
    if style == "reflection":
        user = f"<|user|><|text|>{ask.instruction}<|endofblock|><|endofmessage|>"
        return f"{user}<|assistant|><|text|>{ask.response_prefix}"
    if style == "magicoder":
        return MAGICODER_PROMPT.format(instruction=ask.instruction, response=ask.response_prefix)
    if style == "completion":
        return ask.response_prefix
    if not tokenizer.chat_template:
        raise ValueError("--prompt is 'chat', but the tokenizer has no chat template; choose another style")
    messages = [{"role": "user", "content": ask.instruction}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def stop_strings(style: Style, dataset: Dataset) -> tuple[str, ...]:
    """Where generation may stop because ``solution`` cuts there at the latest."""
    if style == "reflection":
        tags = ("<|endofblock|>", "<|endofmessage|>")
        return (*tags, FENCE) if dataset in ("multipl-e", "ds1000") else tags
    if style == "magicoder":
        return (FENCE,)
    if style == "completion":
        return _NEXT_STATEMENT.get(dataset, ())
    return ()


def solution(style: Style, dataset: Dataset, problem: Problem, raw: str) -> str:
    """The program that a model's output amounts to; the tests of MultiPL-E and DS-1000 are not part of it."""
    if dataset == "multipl-e":
        return _multipl_e_solution(style, problem, raw)
    if dataset == "ds1000":
        code = _code(style, raw, PYTHON)
        return code.split("END SOLUTION")[0].split("</code>")[0]
    if style == "completion":
        return problem.prompt + cut_at_first(raw, _NEXT_STATEMENT[dataset])
    if style == "chat":
        return answer_program(raw, problem.entry_point, problem.prompt)
    if style == "magicoder" and dataset == "mbpp":
        # In the place of evalplus's sanitizer, which Magicoder's MBPP numbers went through.
        return answer_program(raw.split(FENCE)[0], problem.entry_point, problem.prompt)
    return problem.prompt + _code(style, raw, PYTHON)


def _code(style: Style, raw: str, languages: Sequence[str]) -> str:
    """The code of an answer without a look at what it defines.

    Args:
        languages: what the block that counts may call itself in an answer of a chat.
    """
    if style == "reflection":
        return reflection_code(raw)
    if style != "chat":
        return raw.split(FENCE)[0]
    answer = without_thoughts(raw)
    fences = find_fences(answer)
    marked = [fence.code for fence in fences if fence.language in languages]
    unmarked = [fence.code for fence in fences if not fence.language]
    return textwrap.dedent((marked or unmarked or [fence.code for fence in fences] or [answer])[0])


def reflection_code(raw: str) -> str:
    """The code of an answer of ReflectionCoder, as its ``post_process``.

    That drops the first line of an answer without any fence, which only a truncated one is; here it stays.
    """
    for tag in _BLOCK_TAGS:
        raw = raw.replace(tag, "")
    fences = raw.count(FENCE)
    if fences % 2:
        raw = raw[: raw.rfind(FENCE)]
    elif fences:
        raw = raw.split(FENCE, 1)[1].partition("\n")[2]
    for stop in _AFTER_FUNCTION:
        raw = raw.split(stop, 1)[0]
    return raw.strip()


def cut_at_first(text: str, stops: tuple[str, ...]) -> str:
    """``text`` up to the earliest of ``stops``."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def _multipl_e_solution(style: Style, problem: Problem, raw: str) -> str:
    """Prompt and the model's body, left open where the tests close it."""
    language, stops = problem.record["language"], tuple(problem.record["stop_tokens"])
    if style == "completion":
        return problem.prompt + cut_at_first(raw, stops)
    for tag in _BLOCK_TAGS:
        raw = raw.replace(tag, "")
    code = _code("chat", raw, _FENCE_NAMES[language]) if style == "chat" else raw.split(FENCE)[0]
    # ReflectionCoder's: a model writes the function to its end and perhaps more functions, so the last end counts.
    for end in (*_BEFORE_MAIN.get(language, ()), *(("\n}",) if language in _CLOSED_BY_US else stops)):
        code = code.rpartition(end)[0] if end in code else code
    closing = "\n}" if language in _CLOSED_BY_US else ""
    return ("" if style == "chat" else problem.prompt) + code + closing
