"""The schema of a record is recognised by its columns, and the record becomes one checked ``Conversation``.

Each family of schemas is a module of ``schemas``, with the columns that tell it and a function from columns to a
conversation; a new one is a module there and a line in ``parse_record``.
"""

from __future__ import annotations

from reflectron.engine.data.conversation import BadRecord, Conversation, checked, present
from reflectron.engine.data.schemas import messages, pairs

_EXPECTED_COLUMNS = "; ".join(("messages", *(", ".join(columns) for columns in pairs.COLUMNS)))


def parse_record(record: object) -> Conversation:
    """Turn one record into a conversation.

    Schemas, by columns: ReflectionSeq and OpenAI ``messages``; CodeFeedback ``query``/``answer``; Magicoder
    ``problem``/``solution`` and ``instruction``/``response``; evol ``instruction``/``output``; ``prompt``/
    ``privileged_context``/``completion``. Columns that are null count as absent; others beside these are ignored.

    Raises:
        BadRecord: with the reason.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not an object: found {type(record).__name__}, expected named columns")
    columns = present(record)
    if "messages" in columns:
        return checked(messages.read(columns))
    if (found := pairs.read(columns)) is not None:
        return checked(found)
    for schema in (("messages",), *pairs.COLUMNS):
        if missing := [name for name in schema if name in record and name not in columns]:
            raise BadRecord(f"missing value: {missing[0]} is {record[missing[0]]}, expected a text")
    names = ", ".join(sorted(map(str, columns))) or "none"
    raise BadRecord(f"unknown columns: found {names}; expected one of: {_EXPECTED_COLUMNS}")
