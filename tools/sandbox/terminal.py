"""What a program printed, as someone at a terminal would read it in the end: text, newlines and tabs, nothing else."""

from __future__ import annotations

import re

# ECMA-48: control sequences; strings with their terminator, such as a window's title; other escapes. Each in its 7-bit
# and its 8-bit form.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c|(?=\n)|$)"
    r"|\x1b[ -/]*[0-~]?"
)
_ERASE_LINE = re.compile(r"(?:\x1b\[|\x9b)[0-2]?K")
_ERASED = "\0"
# Controls, and what turns the direction of the text that follows or is no character.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """Text without escape sequences and control characters but newline and tab.

    After a carriage return the line is written over from its start, as progress bars do; other moves of the cursor are
    not followed.
    """
    text = _ERASE_LINE.sub(_ERASED, text.replace(_ERASED, ""))
    text = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return _CONTROLS.sub("", "\n".join(map(_line, text.split("\n"))))


def _line(text: str) -> str:
    """A line after all its carriage returns."""
    shown = ""
    # From the last backwards: each part shows where no later one is.
    for part in reversed(text.split("\r")):
        before, erased, after = part.rpartition(_ERASED)
        shown += (before.replace(_ERASED, "") + after)[len(shown) :]
        if erased:
            break
    return shown
