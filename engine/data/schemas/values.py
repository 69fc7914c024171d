"""Values of a record's columns come in, texts go out: what each schema does with a value that is missing or no text."""

from __future__ import annotations

from collections.abc import Mapping

from reflectron.engine.data.conversation import BadRecord


def present(columns: Mapping[str, object]) -> dict[str, object]:
    """The columns that hold a value: null is none, and neither is the NaN that pandas writes for it."""
    return {name: value for name, value in columns.items() if not (value is None or is_nan(value))}


def is_nan(value: object) -> bool:
    """Whether ``value`` is the number that differs from itself."""
    return isinstance(value, float) and value != value


def text(value: object, where: str) -> str:
    """``value``, which is text that any file can hold.

    Raises:
        BadRecord: when it is not.
    """
    if not isinstance(value, str):
        raise BadRecord(f"not a string: {where} is {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair; a tokenizer cannot take it.
        raise BadRecord(f"not Unicode: {where} holds a lone surrogate") from None
    return value


def short(value: object) -> str:
    """A value as a reason shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
