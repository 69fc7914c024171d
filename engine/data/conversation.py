"""A raw record of any supported data set comes in, one ``Conversation`` of typed blocks goes out.

The schema is recognised by the record's columns; columns that are null count as absent. No content of a conversation
holds one of the seven tags, so that the structure of a rendered text is exactly the structure of its conversation.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal, cast

from reflectron.engine.data.tokenizer import TAGS
from reflectron.engine.text import printable

BlockType = Literal["text", "code", "execution"]
Role = Literal["user", "assistant"]
Kind = Literal["generation", "reflection", "privileged"]

_PAIRS = (("problem", "solution"), ("instruction", "response"), ("instruction", "output"))
_PRIVILEGED = ("prompt", "privileged_context", "completion")
_EXPECTED_COLUMNS = "messages; query, answer; " + "; ".join(", ".join(c) for c in (*_PAIRS, _PRIVILEGED))
_REFLECTION_ROLES = ["user", "assistant", "user", "assistant"]


class BadRecord(ValueError):
    """Why a record cannot be trained on: one line, ``<kind of fault>: <detail>``; rejects are counted by the kind.

    It may quote the record, so everything in it that no terminal or file should get is escaped.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, 1000))


@dataclass(frozen=True)
class Block:
    """A piece of a message: prose, a program, or what running the program printed."""

    type: BlockType
    content: str


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Conversation:
    """What one training sample is made of.

    ``reflection`` is user (reflection instruction), assistant (reflection sequence), user (instruction), assistant
    (final code). ``privileged`` is user (privileged context), user (prompt), assistant (completion).
    """

    kind: Kind
    messages: tuple[Message, ...]


def parse_record(record: object) -> Conversation:
    """Turn one record into a conversation.

    Schemas, by columns: ReflectionSeq and OpenAI ``messages``; CodeFeedback ``query``/``answer``; Magicoder
    ``problem``/``solution`` and ``instruction``/``response``; evol ``instruction``/``output``; ``prompt``/
    ``privileged_context``/``completion``. Other columns beside these are ignored.

    Raises:
        BadRecord: with the reason.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not an object: found {type(record).__name__}, expected named columns")
    columns = {name: value for name, value in record.items() if value is not None}
    if "messages" in columns:
        conversation = _from_messages(columns)
    elif {"query", "answer"} <= columns.keys():
        conversation = _from_code_feedback(columns)
    elif columns.keys() >= set(_PRIVILEGED):
        conversation = _from_privileged(columns)
    else:
        conversation = _from_pair(columns)
    _check_structure(conversation)
    return conversation


def _from_code_feedback(columns: dict[str, object]) -> Conversation:
    """Clean up exactly as the reference's ``src/data/download.py`` does."""
    query = html.unescape(_text(columns["query"], "query"))
    answer = html.unescape(_text(columns["answer"], "answer"))
    return _exchange(query, answer.replace("\r\n", "\n").replace("\t", "    ").strip())


def _from_privileged(columns: dict[str, object]) -> Conversation:
    prompt, context, completion = (_text(columns[name], name) for name in _PRIVILEGED)
    messages = (_message("user", context), _message("user", prompt), _message("assistant", completion))
    return Conversation("privileged", messages)


def _from_pair(columns: dict[str, object]) -> Conversation:
    for ask, answer in _PAIRS:
        if {ask, answer} <= columns.keys():
            if ask == "instruction" and columns.get("input"):
                raise BadRecord("unsupported column: 'input' is not empty, expected it to be part of 'instruction'")
            instruction = _text(columns[ask], ask)
            if ask == "problem":
                # Magicoder's preprocess_data.py words the problems of OSS-Instruct as an instruction.
                instruction = f"Write a solution to the following coding problem:\n{instruction}"
            return _exchange(instruction, _text(columns[answer], answer))
    found = ", ".join(sorted(map(str, columns))) or "none"
    raise BadRecord(f"unknown columns: found {found}; expected one of: {_EXPECTED_COLUMNS}")


def _from_messages(columns: dict[str, object]) -> Conversation:
    raw = columns["messages"]
    if not isinstance(raw, list) or not raw:
        raise BadRecord(f"no messages: 'messages' is {_short(raw)}, expected a list of messages")
    turns = [_turn(number, message) for number, message in enumerate(raw, 1)]
    if turns[0][0] == "system":
        if len(turns) == 1 or turns[1][0] != "user":
            raise BadRecord("unknown role: a system message must be followed by a user message")
        turns[1] = ("user", turns[0][1] + turns[1][1])
        del turns[0]
    for number, (role, _) in enumerate(turns, 1):
        if role not in ("user", "assistant"):
            raise BadRecord(f"unknown role: message {number} has {role!r}, expected user or assistant")
    messages = tuple(Message(cast(Role, role), blocks) for role, blocks in turns)
    return Conversation(_kind(columns.get("type"), raw), messages)


def _kind(declared: object, raw: list[dict[str, object]]) -> Kind:
    """Typed blocks need a ``type``; as in the reference, every type but ``generation`` is a reflection sample."""
    typed = any(isinstance(message["content"], list) for message in raw)
    if typed and not isinstance(declared, str):
        raise BadRecord(f"no type: 'type' is {_short(declared)}, expected 'generation' or 'reflection'")
    if typed:
        return "generation" if declared == "generation" else "reflection"
    return "reflection" if declared == "reflection" else "generation"


def _turn(number: int, message: object) -> tuple[str, tuple[Block, ...]]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRecord(f"not an object: {where} is {_short(message)}, expected role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise BadRecord(f"unknown role: {where} has {_short(role)}, expected user or assistant")
    if not isinstance(content, list):
        return role, (Block("text", _text(content, f"{where} content")),)
    if not content:
        raise BadRecord(f"empty message: {where} has no block")
    return role, tuple(_block(f"{where} block {i}", block) for i, block in enumerate(content, 1))


def _block(where: str, block: object) -> Block:
    if not isinstance(block, dict):
        raise BadRecord(f"not an object: {where} is {_short(block)}, expected type and content")
    kind = block.get("type")
    if kind not in ("text", "code", "execution"):
        raise BadRecord(f"unknown block type: {where} has {_short(kind)}, expected text, code or execution")
    return Block(kind, _text(block.get("content"), f"{where} content"))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"not a string: {where} is {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"not Unicode: {where} holds a lone surrogate") from None
    return value


def _exchange(ask: str, answer: str) -> Conversation:
    return Conversation("generation", (_message("user", ask), _message("assistant", answer)))


def _message(role: Role, text: str) -> Message:
    return Message(role, (Block("text", text),))


def _check_structure(conversation: Conversation) -> None:
    roles = [message.role for message in conversation.messages]
    if conversation.kind == "reflection" and roles != _REFLECTION_ROLES:
        found, expected = ", ".join(roles), ", ".join(_REFLECTION_ROLES)
        raise BadRecord(f"not the four parts of a reflection sample: found {found}; expected {expected}")
    if "assistant" not in roles:
        raise BadRecord("no supervised token: there is no assistant message")
    for number, message in enumerate(conversation.messages, 1):
        for block in message.blocks:
            # Only texts with the tags' common opening need the seven searches.
            tag = "<|" in block.content and next((tag for tag in TAGS if tag in block.content), None)
            if tag:
                raise BadRecord(f"tag in content: message {number} holds {tag}, which would forge structure")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
