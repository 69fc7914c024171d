"""JSON lines that grow row by row and survive a stop: a last row that was cut short counts as not written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of every line that is not blank; ``.gz`` files are read as they are.

    Raises:
        ValueError: naming the file and the line that is not a JSON object.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} is {type(row).__name__}, expected an object")
            yield number, row


def drop_unfinished_row(path: Path) -> None:
    """Cut off what a stopped writer left behind the last whole line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
