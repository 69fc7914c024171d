"""Schemas with one column for the question and one for the answer; privileged ones add what only a teacher sees."""

from __future__ import annotations

import html
from collections.abc import Mapping

from reflectron.engine.data.conversation import BadRecord, Block, Conversation, Message, Role, checked_text

_CODE_FEEDBACK = ("query", "answer")
_PRIVILEGED = ("prompt", "privileged_context", "completion")
_PAIRS = (("problem", "solution"), ("instruction", "response"), ("instruction", "output"))
COLUMNS: tuple[tuple[str, ...], ...] = (_CODE_FEEDBACK, *_PAIRS, _PRIVILEGED)
"""The columns of each schema, which recognise it."""


def read(columns: Mapping[str, object]) -> Conversation | None:
    """Return the conversation of a record; None when the columns are those of no schema here.

    Raises:
        BadRecord: with the reason.
    """
    if columns.keys() >= set(_CODE_FEEDBACK):
        return _code_feedback(columns)
    if columns.keys() >= set(_PRIVILEGED):
        return _privileged(columns)
    for ask, answer in _PAIRS:
        if columns.keys() >= {ask, answer}:
            return _pair(columns, ask, answer)
    return None


def _code_feedback(columns: Mapping[str, object]) -> Conversation:
    """Clean up exactly as the reference's ``src/data/download.py`` does."""
    query = html.unescape(checked_text(columns["query"], "query"))
    answer = html.unescape(checked_text(columns["answer"], "answer"))
    return _exchange(query, answer.replace("\r\n", "\n").replace("\t", "    ").strip())


def _privileged(columns: Mapping[str, object]) -> Conversation:
    prompt, context, completion = (checked_text(columns[name], name) for name in _PRIVILEGED)
    messages = (_message("user", context), _message("user", prompt), _message("assistant", completion))
    return Conversation("privileged", messages)


def _pair(columns: Mapping[str, object], ask: str, answer: str) -> Conversation:
    if ask == "instruction" and columns.get("input"):
        raise BadRecord("unsupported column: 'input' is not empty, expected it to be part of 'instruction'")
    instruction = checked_text(columns[ask], ask)
    if ask == "problem":
        # Magicoder's preprocess_data.py words the problems of OSS-Instruct as an instruction.
        instruction = f"Write a solution to the following coding problem:\n{instruction}"
    return _exchange(instruction, checked_text(columns[answer], answer))


def _exchange(ask: str, answer: str) -> Conversation:
    return Conversation("generation", (_message("user", ask), _message("assistant", answer)))


def _message(role: Role, content: str) -> Message:
    return Message(role, (Block("text", content),))
