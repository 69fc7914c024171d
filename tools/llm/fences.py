"""Find the fenced blocks of code in a model's answer, and cut off what it only thought."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>```+|~~~+)[ \t]*(?P<language>[\w+.#-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=mark)[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
PYTHON = ("python", "py", "python3")
"""The names by which blocks of Python are marked."""

# What reasoning models put around their drafts; the opening tag often stands in the prompt and not in the answer.
_THOUGHT = r"think|thinking|thought|reasoning"
# Not where code speaks of the tag: there a quotation mark follows, which the mark of a fence is not.
# The last is what is left of gpt-oss's channels where a server takes the special tokens out.
_THOUGHT_END = re.compile(
    rf"</(?:{_THOUGHT})>(?![\"']|`(?!``))|\[/THINK\]|<\|channel\|>final<\|message\|>|\A\s*analysis(?s:.*)assistantfinal",
    re.IGNORECASE,
)
_THOUGHT_START = re.compile(rf"\s*(?:<(?:{_THOUGHT})>|\[THINK\]|<\|channel\|>analysis<\|message\|>)", re.IGNORECASE)


@dataclass(frozen=True)
class Fence:
    """A block of code in a text."""

    start: int
    """Index of its first character in the text, that of the mark included."""
    language: str
    """The language in lower case; empty where the block names none."""
    code: str
    """The code, without the indentation of the list that the block may stand in."""
    closed: bool
    """Whether the block has an end; an answer that was cut off has none."""


def find_fences(text: str) -> list[Fence]:
    """Return the fenced blocks of a text as CommonMark has them: one without an end goes to the end of the text."""
    found = []
    for match in _FENCE.finditer(text):
        code = _dedent(match["code"].strip("\n"), match["indent"])
        found.append(Fence(match.start(), match["language"].lower(), code, match.end("code") < match.end()))
    return found


def without_thoughts(text: str) -> str:
    """Return what follows the last end of a thought; nothing where a thought has begun and never ends."""
    ends = list(_THOUGHT_END.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    return "" if _THOUGHT_START.match(text) else text


def _dedent(code: str, indent: str) -> str:
    """Remove the indentation of the list that a block stands in."""
    return "\n".join(line.removeprefix(indent) for line in code.split("\n"))
