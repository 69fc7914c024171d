"""JSON lines that grow row by row and survive a stop: a last row that was cut short counts as not written."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal


def read_json_lines(
    path: Path, *, errors: Literal["strict", "surrogateescape"] = "strict"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row of every line that is not blank; ``.gz`` files are read as they are.

    Args:
        errors: what becomes of bytes that are no UTF-8.

    Raises:
        ValueError: naming the file and the line that is not a JSON object.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(errors=errors))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is not UTF-8: {error.reason} at byte {error.start}") from None
            except (ValueError, RecursionError) as error:
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


def write_text(path: Path, text: str) -> None:
    """Write a file complete or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
