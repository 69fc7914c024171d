"""Lists of messages: ReflectionSeq, whose contents are typed blocks, and OpenAI chat with its parts and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from reflectron.engine.data.conversation import (
    BadRecord,
    Block,
    Conversation,
    Kind,
    Message,
    Role,
    checked_text,
    present,
    shown_value,
)

# What OpenAI and servers like it put beside the text: training without it would teach another conversation.
_UNSUPPORTED = (
    *("tool_calls", "function_call", "tool_call_id", "refusal", "audio", "images", "annotations"),
    *("reasoning", "reasoning_content", "thinking"),
)
_UNSUPPORTED_COLUMNS = ("tools", "functions", "images", "audios", "videos")


@dataclass(frozen=True)
class _Turn:
    """A message whose role has not been looked at."""

    role: str
    blocks: tuple[Block, ...]
    is_typed: bool
    """Whether the content is ReflectionSeq's blocks, not text or OpenAI's parts."""
    supervised: bool


def read(columns: Mapping[str, object]) -> Conversation:
    """Return the conversation of a record that has ``messages``.

    Raises:
        BadRecord: with the reason.
    """
    raw = columns["messages"]
    if not isinstance(raw, list) or not raw:
        raise BadRecord(f"no messages: 'messages' is {shown_value(raw)}, expected a list of messages")
    for name in _UNSUPPORTED_COLUMNS:
        if columns.get(name):
            raise BadRecord(f"unsupported column: {name!r} is not empty, expected a conversation of text alone")
    turns = _with_system([_turn(number, message) for number, message in enumerate(raw, 1)])
    messages = tuple(
        Message(_role(number, turn.role), turn.blocks, turn.supervised) for number, turn in enumerate(turns, 1)
    )
    return Conversation(_kind(columns.get("type"), any(turn.is_typed for turn in turns)), messages)


def _with_system(turns: list[_Turn]) -> list[_Turn]:
    """Make a system message the first block of the user's turn behind it."""
    if turns[0].role != "system":
        return turns
    if len(turns) == 1 or turns[1].role != "user":
        raise BadRecord("unknown role: a system message must be followed by a user message")
    system, user, *others = turns
    return [_Turn("user", system.blocks + user.blocks, system.is_typed or user.is_typed, True), *others]


def _role(number: int, role: str) -> Role:
    if role not in ("user", "assistant"):
        raise BadRecord(f"unknown role: message {number} has {role!r}, expected user or assistant")
    return cast(Role, role)


def _kind(declared: object, is_typed: bool) -> Kind:
    """Read ``type``, which typed blocks need; all but ``generation`` are reflection samples, as in the reference."""
    if is_typed and not isinstance(declared, str):
        raise BadRecord(f"no type: 'type' is {shown_value(declared)}, expected 'generation' or 'reflection'")
    if is_typed:
        return "generation" if declared == "generation" else "reflection"
    return "reflection" if declared == "reflection" else "generation"


def _turn(number: int, message: object) -> _Turn:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRecord(f"not an object: {where} is {shown_value(message)}, expected role and content")
    columns = present(message)
    role, content = columns.get("role"), columns.get("content")
    if not isinstance(role, str):
        raise BadRecord(f"unknown role: {where} has {shown_value(role)}, expected user or assistant")
    for name in _UNSUPPORTED:
        if columns.get(name):
            raise BadRecord(f"unsupported key: {where} has {name!r}, expected role and content alone")
    supervised = _is_supervised(where, role, columns.get("weight"))
    if not isinstance(content, list):
        return _Turn(role, (Block("text", checked_text(content, f"{where} content")),), False, supervised)
    if not content:
        raise BadRecord(f"empty message: {where} has no block")
    blocks = [_block(f"{where} block {i}", block) for i, block in enumerate(content, 1)]
    typed = {is_typed for _, is_typed in blocks}
    if len(typed) > 1:
        raise BadRecord(f"mixed blocks: {where} has blocks with 'content' beside parts with 'text', expected one kind")
    return _Turn(role, tuple(block for block, _ in blocks), typed.pop(), supervised)


def _is_supervised(where: str, role: str, weight: object) -> bool:
    """OpenAI's ``weight``: 0 keeps an assistant's message out of the loss; nothing weighs in between."""
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRecord(f"unsupported weight: {where} has {shown_value(weight)}, expected 0 or 1")
    if role != "assistant" and weight:
        raise BadRecord(f"unsupported weight: {where} is the {role}'s and has 1, expected none: it is never learnt")
    return bool(weight)


def _block(where: str, block: object) -> tuple[Block, bool]:
    """Return a block, and whether it is ReflectionSeq's (``content``) and not OpenAI's text part (``text``)."""
    if not isinstance(block, dict):
        raise BadRecord(f"not an object: {where} is {shown_value(block)}, expected type and content")
    columns = present(block)
    kind = columns.pop("type", None)
    if kind not in ("text", "code", "execution"):
        raise BadRecord(f"unknown block type: {where} has {shown_value(kind)}, expected text, code or execution")
    name = "text" if kind == "text" and "content" not in columns and "text" in columns else "content"
    if others := columns.keys() - {name}:
        raise BadRecord(f"unknown key: {where} has {shown_value(min(map(str, others)))} beside its type and {name}")
    content = checked_text(columns.get(name), f"{where} {name}")
    return Block(kind, content), name == "content"
