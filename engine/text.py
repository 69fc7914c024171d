"""Text that others wrote (a library's error, a server's reply, a program's answer), made fit to be shown and recorded.

What comes out has no control characters, so it moves no cursor, sets no terminal's title and forges no second line, and
it is valid Unicode, so it can be written to any file.
"""

import unicodedata

_SHOWN_CHARACTERS = 300


def printable(text: object, most: int = _SHOWN_CHARACTERS) -> str:
    """Return ``str(text)`` on one line, with everything that is not printable escaped as Python escapes it.

    Line breaks and tabs become single spaces. Characters that reorder or hide others (bidirectional marks, zero-width
    and private ones, lone surrogates) are escaped as well, which is what ``str.isprintable`` calls not printable.

    Args:
        most: characters at most, those of the mark of a cut included.
    """
    # Cut first: escaping a reply of gigabytes would cost several times its size.
    whole = str(text)
    words = " ".join(whole[: 2 * most].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    if len(shown) <= most and len(whole) <= 2 * most:
        return shown
    return shown[: most - 1] + "…"


def visible(text: str) -> str:
    """Return the text of any number of lines, with every character escaped that moves a cursor, hides or reorders
    others.

    Line ends, tabs and the spaces of other scripts stay. Lone surrogates are escaped, so that any stream can take it.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"


def one_line(error: BaseException) -> str:
    """Type and first line of what it says, and the last where the first is but a place: so Triton's compiler speaks."""
    try:
        lines = str(error).strip().splitlines() or [""]
    except Exception:
        # An error whose text is no text, as model-written code raises.
        lines = [""]
    said = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return printable(f"{type(error).__name__}: {said}")
