"""What every schema of records is read into: a ``Conversation`` of typed blocks, or a ``BadRecord`` that says why not.

No content of a conversation holds one of the seven tags, so that the structure of a rendered text is exactly the
structure of its conversation; and every conversation has supervised content. Schemas take the values of a record's
columns through ``present`` and ``checked_text``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reflectron.engine.data.tokenizer import TAGS
from reflectron.engine.files import printable

BlockType = Literal["text", "code", "execution"]
Role = Literal["user", "assistant"]
Kind = Literal["generation", "reflection", "privileged"]

_REFLECTION_ROLES = ["user", "assistant", "user", "assistant"]
_REASON_CHARACTERS = 500


class BadRecord(ValueError):
    """Why a record cannot be trained on: one line, ``<kind of fault>: <detail>``; rejects are counted by the kind.

    It may quote the record, so everything in it that no terminal or file should get is escaped.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, _REASON_CHARACTERS))


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
    supervised: bool = True
    """Whether an assistant's turn is trained on; no user's turn ever is."""

    @property
    def is_empty(self) -> bool:
        """Whether the turn holds nothing to learn: no character but whitespace outside of execution blocks."""
        return not any(block.content.strip() for block in self.blocks if block.type != "execution")


@dataclass(frozen=True)
class Conversation:
    """What one training sample is made of.

    ``reflection`` is user (reflection instruction), assistant (reflection sequence), user (instruction), assistant
    (final code). ``privileged`` is user (privileged context), user (prompt), assistant (completion).
    """

    kind: Kind
    messages: tuple[Message, ...]


def checked(conversation: Conversation) -> Conversation:
    """Return the conversation, as it is.

    Raises:
        BadRecord: when its structure is not that of its kind, it holds nothing to learn, or a content holds a tag.
    """
    roles = [message.role for message in conversation.messages]
    if conversation.kind == "reflection" and roles != _REFLECTION_ROLES:
        found, expected = ", ".join(roles), ", ".join(_REFLECTION_ROLES)
        raise BadRecord(f"not the four parts of a reflection sample: found {found}; expected {expected}")
    if "assistant" not in roles:
        raise BadRecord("no supervised token: there is no assistant message")
    _check_supervision(conversation)
    for number, message in enumerate(conversation.messages, 1):
        for block in message.blocks:
            # Only texts with the tags' common opening need the seven searches.
            tag = "<|" in block.content and next((tag for tag in TAGS if tag in block.content), None)
            if tag:
                raise BadRecord(f"tag in content: message {number} holds {tag}, which would forge structure")
    return conversation


def _check_supervision(conversation: Conversation) -> None:
    answers = [(n, m) for n, m in enumerate(conversation.messages, 1) if m.role == "assistant"]
    if not any(message.supervised for _, message in answers):
        raise BadRecord("no supervised token: every assistant message has weight 0")
    if conversation.kind != "generation":
        # Distillation learns the last turn, whatever the next-token loss does; the reflection sequence may be empty.
        answers = answers[-1:]
        number, last = answers[0]
        if not last.supervised:
            raise BadRecord(f"unsupported weight: message {number} has 0, but distillation always learns the last turn")
    for number, message in answers:
        if message.supervised and message.is_empty:
            raise BadRecord(f"empty answer: message {number} has nothing to learn")


def present(columns: Mapping[str, object]) -> dict[str, object]:
    """Return the columns that hold a value: null is none, and neither is the NaN that pandas writes for it."""
    return {name: value for name, value in columns.items() if not (value is None or is_nan(value))}


def is_nan(value: object) -> bool:
    """Return whether ``value`` is the number that differs from itself."""
    return isinstance(value, float) and value != value


def checked_text(value: object, where: str) -> str:
    """Return ``value``, which is text that any file can hold.

    Raises:
        BadRecord: when it is not.
    """
    if not isinstance(value, str):
        raise BadRecord(f"not a string: {where} is {shown_value(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; a tokenizer cannot take it.
        raise BadRecord(f"not Unicode: {where} holds a lone surrogate") from None
    return value


def shown_value(value: object) -> str:
    """Return a value as a reason shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
