"""Secrets come in once; every text that a server or a library wrote passes ``hide`` before it is recorded or shown.

A server may send a key back: in its error, a header, an address or the answer itself, spelt as it was sent or escaped
for JSON, HTML or an address, in base64 or hexadecimal.
"""

from __future__ import annotations

import base64
import re
import urllib.parse
from collections.abc import Iterable

HIDDEN = "<api key>"
_LEAST_CHARACTERS = 8
"""What is shorter is no secret but a placeholder such as EMPTY, and may be a word of an answer."""


class Secrets:
    """Replaces secrets by ``<api key>``.

    Args:
        words: the secrets; empty ones are skipped.
    """

    def __init__(self, words: Iterable[str]) -> None:
        known = sorted({word for word in words if word}, key=len, reverse=True)
        self._anywhere = _pattern(known)
        self._in_answers = _pattern([word for word in known if len(word) >= _LEAST_CHARACTERS])

    def hide(self, text: str) -> str:
        """The text of an error, a header or an address without any secret."""
        return self._anywhere.sub(HIDDEN, text) if self._anywhere else text

    def hide_in_answer(self, text: str) -> str:
        """An answer without the secrets that cannot stand in it by chance."""
        return self._in_answers.sub(HIDDEN, text) if self._in_answers else text


def secrets_of_url(url: str) -> list[str]:
    """What an address says to its server alone: user, password and the values of its query."""
    parts = urllib.parse.urlsplit(url)
    userinfo, _, _ = parts.netloc.rpartition("@")
    found = [*userinfo.split(":", 1), *(pair.partition("=")[2] for pair in parts.query.split("&"))]
    return [word for raw in found for word in (raw, urllib.parse.unquote(raw)) if word]


def shown_url(url: str) -> str:
    """An address as it may be shown and recorded: with ``<api key>`` for user, password and values of the query."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "an address that cannot be read"
    userinfo, at, host = parts.netloc.rpartition("@")
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={HIDDEN}" if equals else HIDDEN for name, equals, _ in pairs)
    return urllib.parse.urlunsplit((parts.scheme, f"{HIDDEN if userinfo else ''}{at}{host}", parts.path, query, ""))


def _pattern(words: list[str]) -> re.Pattern[str] | None:
    spellings = [spelling for word in words for spelling in (_escaped(word), *_encoded(word))]
    return re.compile("|".join(spellings), re.IGNORECASE) if spellings else None


def _escaped(word: str) -> str:
    """Every character as it is, or escaped for an address, JSON, Python or HTML, also twice over."""
    return "".join(_spellings(char) for char in word)


def _spellings(char: str) -> str:
    code = ord(char)
    percent = "".join(f"%(?:25){{0,3}}{byte:02x}" for byte in char.encode(errors="replace"))
    html = f"&(?:amp;){{0,3}}#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});"
    # A bounded number of backslashes: an unbounded one is quadratic in a text of backslashes.
    slashed = rf"\\{{1,8}}(?:u{code:04x}|x{code:02x})"
    bare = re.escape(char) if char.isalnum() else rf"\\{{0,8}}{re.escape(char)}"
    return f"(?:{bare}|{percent}|{slashed}|{html})"


def _encoded(word: str) -> list[str]:
    """The key inside base64, wherever it begins in what was encoded, and in hexadecimal."""
    content = word.encode(errors="replace")
    found = [content.hex()]
    for before, touched in ((b"", 0), (b"-", 2), (b"--", 3)):
        # Characters that hold bits of neighbours are no part of the key's own spelling.
        own = base64.b64encode(before + content)[touched : (len(before) + len(content)) * 8 // 6].decode()
        found += [own, own.replace("+", "-").replace("/", "_")]
    return [re.escape(text) for text in dict.fromkeys(found) if len(text) >= _LEAST_CHARACTERS]
