"""JSON lines that grow row by row and survive a stop: a last row that was cut short counts as not written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.json_records import Undecodable
from reflectron.engine.data.sources import read_rows
from reflectron.engine.files import end_of_rows


def read_json_lines(path: Path, *, errors: Undecodable = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of every line that is not blank; compressed files and arrays are read as they are.

    Args:
        errors: what becomes of bytes that are no UTF-8.

    Raises:
        ValueError: naming the file and the line that is not a JSON object.
    """
    for record in read_rows(path):
        try:
            row = record.decoded(errors)
        except BadRecord as error:
            raise ValueError(f"{path}:{record.line} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{record.line} is {type(row).__name__}, expected an object")
        yield record.line, row


def drop_unfinished_row(path: Path) -> None:
    """Cut off what a stopped writer left behind the last whole line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(end_of_rows(file.fileno()))
