"""Read the bytes of a server's reply into a ``Reply`` without secrets, or an ``AttemptFailed`` of a named kind.

The body is read here and not by a library's models: any field may be missing or of any type, a number of any size, the
text in any encoding or compressed a thousandfold. A server may send a key back, in its error, a header, an address or
the answer itself, spelt as it was sent or escaped for JSON, HTML or an address, in base64 or hexadecimal: every text
that a server or a library wrote passes ``Secrets.hide`` before it is recorded or shown.
"""

from __future__ import annotations

import base64
import email.utils
import json
import math
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import assert_never

from reflectron.engine.files import one_line, printable

Protocol = Literal["chat", "completions"]
FailureKind = Literal[
    "timeout",
    "connection",
    "rate limited",
    "server error",
    "bad json",
    "too long",
    "empty",
    "bad request",
    "not found",
    "not authorised",
]
RETRIED: frozenset[FailureKind] = frozenset(
    {"timeout", "connection", "rate limited", "server error", "bad json", "too long", "empty"}
)
"""The next attempt may go well. The others fail their request at once."""
FINAL: frozenset[FailureKind] = frozenset({"bad request", "empty"})
"""About the request itself: once its attempts are used up, another run would fare no better."""
REFUSED: frozenset[FailureKind] = frozenset({"not found", "not authorised"})
"""Not about one request but about all; some in a row end the run."""
_MOST_TOKENS = 1 << 30
"""A server that reports more for one request is not believed."""
_LONGEST_CONTENT_ENCODING = 3
_CHARSETS = {
    **dict.fromkeys(("iso-8859-1", "iso8859-1", "latin-1", "latin1", "windows-1252", "cp1252", "us-ascii"), "cp1252"),
    **{name: name for name in ("utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be")},
}
_SHOWN_CHARACTERS = 64_000
"""Characters searched for secrets, many times what is shown: a cut must not leave half a secret."""
_MOST_MEMBERS = 16
"""A gzip body of more members is rejected."""
_MOST_DIGITS = 300
"""An integer with more is as good as infinite, and Python rejects those beyond some thousand digits."""
_TIMED_OUT = (408, 504, 524)
"""Statuses of a proxy that gave up waiting; the model may still be writing."""
HIDDEN = "<api key>"
_LEAST_CHARACTERS = 8
"""A shorter word is no secret but a placeholder such as EMPTY, and may be a word of an answer."""


@dataclass(frozen=True)
class Received:
    """A response as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    """Not yet decompressed; longer than the limit when there was more."""


@dataclass(frozen=True)
class Reply:
    """An answer of the server; a field that it did not send is None."""

    text: str
    finish_reason: str | None
    usage: tuple[int, int] | None
    """Prompt and completion tokens."""
    fingerprint: str | None


class AttemptFailed(Exception):
    """Raised for an attempt that gave no answer."""

    def __init__(
        self,
        kind: FailureKind,
        message: str,
        retry_after: float | None = None,
        *,
        reached: bool = False,
        received: int | None = None,
        usage: tuple[int, int] | None = None,
        finish_reason: str | None = None,
    ) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind: FailureKind = kind
        self.retry_after = retry_after
        """Seconds that the server asks to wait: finite, not negative."""
        self.reached = reached
        """Whether the model may have written something for it, to be paid for."""
        self.received = received
        """Bytes of that; None when nobody knows."""
        self.usage, self.finish_reason = usage, finish_reason
        """As the server reported them."""


def read_reply(received: Received, protocol: Protocol, most_bytes: int, secrets: Secrets) -> Reply:
    """Read the answer out of a response.

    Args:
        most_bytes: of the body, both as it came and decompressed.
        secrets: replaced in every text that is returned or raised.

    Raises:
        AttemptFailed: when there is none.
    """
    if not 200 <= received.status < 300:
        raise _refused(received, most_bytes, secrets)
    body = _decompressed(received, most_bytes)
    text = _text(body, received.headers)
    content = _parsed(text, body, secrets)
    try:
        choice = _choice(content)
        answer = _answer(choice, protocol)
    except _Unexpected as error:
        shown = printable(secrets.hide(text[:_SHOWN_CHARACTERS]), 200)
        message = f"{error} in {shown!r}"
        raise AttemptFailed("bad json", message, reached=True, received=len(body), usage=_usage(content)) from None
    finish_reason = _short(choice.get("finish_reason"), secrets)
    # A turn that the model ends at once is an answer for who continues a raw prompt.
    if not (answer or "").strip() and (protocol == "chat" or finish_reason != "stop"):
        raise AttemptFailed(
            "empty",
            f"no text, finish_reason is {finish_reason!r}",
            finish_reason=finish_reason,
            reached=True,
            received=len(body),
            usage=_usage(content),
        )
    fingerprint = _short(content.get("system_fingerprint"), secrets)
    return Reply(secrets.hide_in_answer(answer or ""), finish_reason, _usage(content), fingerprint)


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
        """Return the text of an error, a header or an address without any secret."""
        return self._anywhere.sub(HIDDEN, text) if self._anywhere else text

    def hide_in_answer(self, text: str) -> str:
        """Return an answer without the secrets that cannot stand in it by chance."""
        return self._in_answers.sub(HIDDEN, text) if self._in_answers else text


class _Unexpected(Exception):
    """Raised for a field that is not what the interface says."""


def _decompressed(received: Received, most_bytes: int) -> bytes:
    body = received.body
    names = [name.strip().lower() for name in received.headers.get("content-encoding", "").split(",")]
    layers = [name for name in names if name not in ("", "identity")]
    if len(body) > most_bytes:
        raise AttemptFailed("too long", f"more than {most_bytes:,} bytes", reached=True)
    if len(layers) > _LONGEST_CONTENT_ENCODING or any(name not in ("gzip", "x-gzip", "deflate") for name in layers):
        message = "a Content-Encoding that was not asked for"
        raise AttemptFailed("bad json", message, reached=True, received=len(body))
    for name in reversed(layers):
        try:
            body = _inflated(body, name, most_bytes)
        except (zlib.error, EOFError) as error:
            raise AttemptFailed(
                "bad json", f"{name}: {one_line(error)}", reached=True, received=len(received.body)
            ) from None
        if len(body) > most_bytes:
            message = f"more than {most_bytes:,} bytes when decompressed"
            raise AttemptFailed("too long", message, reached=True)
    return body


def _inflated(content: bytes, name: str, most_bytes: int) -> bytes:
    """Decompress all members of a body, one byte beyond ``most_bytes`` at most."""
    # Deflate is sent with and without zlib's header.
    bare = name == "deflate" and (not content or content[0] & 0x0F != 8)
    parts: list[bytes] = []
    size = 0
    while content and size <= most_bytes:
        if len(parts) == _MOST_MEMBERS:
            raise EOFError("the compressed body does not end")
        stream = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        parts.append(stream.decompress(content, most_bytes + 1 - size))
        size += len(parts[-1])
        if not stream.eof and size <= most_bytes:
            raise EOFError("the compressed body is cut short")
        content = stream.unused_data
    return b"".join(parts)


def _text(body: bytes, headers: Mapping[str, str]) -> str:
    """Decode a body: JSON is Unicode, and its first bytes tell which; a charset is believed where they do not."""
    charset = headers.get("content-type", "").lower().partition("charset=")[2].strip(" \"'").partition(";")[0]
    names = [json.detect_encoding(body), *([_CHARSETS[charset]] if charset in _CHARSETS else [])]
    for name in names:
        try:
            return body.decode(name).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            reason = one_line(error)
    raise AttemptFailed("bad json", reason, reached=True, received=len(body))


def _parsed(text: str, body: bytes, secrets: Secrets) -> dict[str, Any]:
    try:
        content = json.loads(text, parse_int=_integer)
        if not isinstance(content, dict):
            raise _Unexpected(f"the reply is {type(content).__name__}, expected an object")
    except (ValueError, RecursionError, _Unexpected) as error:
        said = str(error) if isinstance(error, _Unexpected) else one_line(error)
        shown = printable(secrets.hide(text[:_SHOWN_CHARACTERS]), 200)
        raise AttemptFailed("bad json", f"{said} in {shown!r}", reached=True, received=len(body)) from None
    return content


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else math.inf


def _choice(content: dict[str, Any]) -> dict[str, Any]:
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices:
        found = "an empty list" if choices == [] else type(choices).__name__
        raise _Unexpected(f"choices is {found}, expected a list")
    if not isinstance(choices[0], dict):
        raise _Unexpected(f"choices[0] is {type(choices[0]).__name__}, expected an object")
    return choices[0]


def _answer(choice: dict[str, Any], protocol: Protocol) -> str | None:
    if protocol == "completions":
        text = choice.get("text")
    elif protocol == "chat":
        message = choice.get("message")
        if not isinstance(message, dict):
            raise _Unexpected(f"the message is {type(message).__name__}, expected an object")
        text = message.get("content")
    else:
        assert_never(protocol)
    if not isinstance(text, str | None):
        raise _Unexpected(f"the answer is {type(text).__name__}, expected a string")
    return text


def _short(value: object, secrets: Secrets) -> str | None:
    return printable(secrets.hide(value[:_SHOWN_CHARACTERS]), 100) if isinstance(value, str) else None


def _usage(content: dict[str, Any]) -> tuple[int, int] | None:
    """Return prompt and completion tokens where the server reports both believably."""
    reported = content.get("usage")
    if not isinstance(reported, dict):
        return None
    prompt, completion = believable(reported.get("prompt_tokens")), believable(reported.get("completion_tokens"))
    return None if prompt is None or completion is None else (prompt, completion)


def believable(count: object) -> int | None:
    """Return a number of tokens, or None for what cannot be one."""
    if isinstance(count, bool) or not isinstance(count, int | float):
        return None
    # Also false for what is no number.
    return int(count) if 0 <= count <= _MOST_TOKENS and count == int(count) else None


def _refused(received: Received, most_bytes: int, secrets: Secrets) -> AttemptFailed:
    status = received.status
    try:
        message = _text(_decompressed(received, most_bytes), received.headers)
    except AttemptFailed as failure:
        # The status says enough where the body cannot be read.
        message = str(failure)
    text = f"HTTP {status}: {printable(secrets.hide(message[:_SHOWN_CHARACTERS]), 200)}"
    retry_after = _retry_after(received.headers)
    if status < 400:
        place = printable(secrets.hide(received.headers.get("location", "")[:_SHOWN_CHARACTERS]), 200)
        return AttemptFailed("not found", f"HTTP {status}: a redirect to {place!r}, which is not followed")
    if status in (401, 402, 403, 407) or _error_code(message) == "insufficient_quota":
        return AttemptFailed("not authorised", text)
    if status in (404, 405, 410):
        return AttemptFailed("not found", text)
    if status == 429:
        return AttemptFailed("rate limited", text, retry_after)
    if status in _TIMED_OUT:
        return AttemptFailed("server error", text, retry_after, reached=True)
    if status >= 500 or status in (409, 425):
        return AttemptFailed("server error", text, retry_after)
    return AttemptFailed("bad request", text)


def _error_code(message: str) -> object:
    """Return ``error.code`` of a JSON body, or else ``error.type``; None where there is neither."""
    try:
        content = json.loads(message, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    error = content.get("error") if isinstance(content, dict) else None
    return error.get("code") or error.get("type") if isinstance(error, dict) else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return seconds, from a number or a date; None where there is neither."""
    value = headers.get("retry-after", "")[:100]
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        # Its parser fails in many ways on what is no date.
        except Exception:
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), 1e9)


def _pattern(words: list[str]) -> re.Pattern[str] | None:
    spellings = [spelling for word in words for spelling in (_escaped(word), *_encoded(word))]
    return re.compile("|".join(spellings), re.IGNORECASE) if spellings else None


def _escaped(word: str) -> str:
    """Match every character as it is, or escaped for an address, JSON, Python or HTML, also several times over.

    A text is looked through in linear time: no two repetitions that could take the same characters follow one another,
    and a match that begins with backslashes begins with the first of them, so that a run of them is tried once.
    """
    runs = re.findall(r"(\\*)([^\\]|$)", word)
    pattern = "".join(_spellings(char, bool(backslashes)) for backslashes, char in runs if backslashes or char)
    return rf"(?:(?<!\\)|(?!\\)){pattern}"


def _spellings(char: str, after_backslashes: bool) -> str:
    r"""Match one character; the backslashes of a word before it count as one ``\`` or more, however they are spelt."""
    run = rf"(?:\\(?:u005c|x5c)?|{_entity(92)}|%(?:25)*5c)+" if after_backslashes else ""
    if not char:
        return run
    code = ord(char)
    percent = "".join(f"%(?:25)*{byte:02x}" for byte in char.encode(errors="replace"))
    slashed = f"(?:u{code:04x}|x{code:02x})"
    if after_backslashes:
        return f"{run}(?:{slashed}|{re.escape(char)}|{percent}|{_entity(code)})"
    # Letters and digits behind a backslash are themselves escapes.
    bare = re.escape(char)
    behind = slashed if char.isalnum() else f"(?:{slashed}|{bare})"
    return rf"(?:{bare}|\\+{behind}|{percent}|{_entity(code)})"


def _entity(code: int) -> str:
    return f"&(?:amp;)*#(?:0*{code}|x0*{code:x});"


def _encoded(word: str) -> list[str]:
    """Match the key inside base64, wherever it begins in what was encoded, and in hexadecimal."""
    content = word.encode(errors="replace")
    found = [content.hex()]
    for before, touched in ((b"", 0), (b"-", 2), (b"--", 3)):
        # Characters that hold bits of neighbours are no part of the key's own spelling.
        own = base64.b64encode(before + content)[touched : (len(before) + len(content)) * 8 // 6].decode()
        found += [own, own.replace("+", "-").replace("/", "_")]
    return [re.escape(text) for text in dict.fromkeys(found) if len(text) >= _LEAST_CHARACTERS]
