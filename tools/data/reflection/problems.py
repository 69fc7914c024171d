"""Records of data files come in, problems to solve go out, each text once; what is no problem is named.

Any file that training reads is read here: its instructions are the problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.records import parse_record
from reflectron.engine.data.sources import Record, read_records
from reflectron.engine.data.tokenizer import TAGS
from reflectron.tools.data.corpus import require_unicode
from reflectron.tools.data.reflection.dialogue import Problem
from reflectron.tools.llm.request import content_hash

COLUMNS = ("instruction", "problem", "query", "question", "prompt")


@dataclass(frozen=True)
class Reject:
    """A record that gives no problem."""

    source: str
    reason: str
    """``<kind>: <detail>``."""


def read_problems(files: Sequence[DataFile], column: str | None) -> Iterator[Problem | Reject]:
    """The problems of ``files``, in order.

    Args:
        column: of the problem's text; without it the first of ``COLUMNS``, or the first user turn of ``messages``.

    Raises:
        ValueError: when a file cannot be read.
    """
    first_source: dict[str, str] = {}
    for file in files:
        for record in read_records(file):
            source = f"{file.path}:{record.line}"
            try:
                problem = Problem(*_text(record, column), source)
            except BadRecord as error:
                yield Reject(source, str(error))
                continue
            if (first := first_source.setdefault(problem.key, source)) != source:
                yield Reject(source, f"duplicate: the same problem as {first}")
            else:
                yield problem


def _text(record: Record, column: str | None) -> tuple[str, str]:
    """Key and text."""
    columns = record.decoded()
    if not isinstance(columns, dict):
        raise BadRecord(f"not an object: found {type(columns).__name__}, expected named columns")
    names = (column,) if column is not None else COLUMNS
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is not None:
        text = columns[name]
    elif column is None and columns.get("messages") is not None:
        text = _first_turn(columns)
    else:
        raise BadRecord(f"no problem: found columns {', '.join(map(str, columns))}; expected {' or '.join(names)}")
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"no problem: {name or 'the first message'} holds no text")
    require_unicode(text, name or "the first message")
    if tag := next((tag for tag in TAGS if tag in text), None):
        raise BadRecord(f"tag in content: the problem holds {tag}, which would forge structure")
    return content_hash(text.strip()), text.strip()


def _first_turn(columns: dict[str, object]) -> str:
    """Of a reflection sample the instruction of the second turn, which is the problem itself."""
    conversation = parse_record(columns)
    users = [message for message in conversation.messages if message.role == "user"]
    turn = users[-1] if conversation.kind == "reflection" else users[0]
    return "".join(block.content for block in turn.blocks)
