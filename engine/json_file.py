"""A JSON file that others wrote comes in, its object goes out, or one line that says what the file holds instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflectron.engine.text import printable


def read_object(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        OSError: when the file cannot be read.
        ValueError: naming the file, when it is not JSON or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    # Python's parser ends at nesting beyond its stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {printable(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
