"""What is printed passes here, so that no text of others reaches a terminal raw, whoever prints it.

A model's error, a file's name or a record's content may hold escape sequences that set a terminal's title, write its
clipboard or hide a line. ``protected_streams`` puts a filter behind every ``print``, traceback, warning and log line;
``console`` gives rich a stream without that filter, and escapes what it is to draw instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from reflectron.engine.files import visible

if TYPE_CHECKING:
    from rich.console import Console


class ProtectedStream:
    """A text stream that escapes control characters; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.unprotected = stream
        self._line_is_free = True

    def write(self, text: str) -> int:
        """Write a text; a stream that has no such letters, as under ``LANG=C``, gets them escaped too."""
        start = ""
        # Progress bars of libraries go back to the start of their line. Only to there: nothing else is overwritten.
        if text.startswith("\r") and self._line_is_free and self.unprotected.isatty():
            start = "\r"
        elif text:
            self._line_is_free = text.endswith("\n")
        shown = start + visible(text[len(start) :])
        encoding = self.unprotected.encoding or "utf-8"
        self.unprotected.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one text after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unprotected, name)


def protect_streams() -> None:
    """Put the filter before standard output and error, once."""
    # Tracebacks of Python 3.13 on are coloured by escape sequences, which the filter would spell out.
    os.environ.setdefault("PYTHON_COLORS", "0")
    sys.stdout, sys.stderr = _protected(sys.stdout), _protected(sys.stderr)


@contextlib.contextmanager
def protected_streams() -> Iterator[None]:
    """Filter both streams while a command runs."""
    before = sys.stdout, sys.stderr
    protect_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _protected(stream: TextIO) -> TextIO:
    # None without a terminal or file, as under pythonw.
    if stream is None or isinstance(stream, ProtectedStream):
        return stream
    return ProtectedStream(stream)  # type: ignore[return-value]


def console(*, stderr: bool = False, **options: Any) -> Console:
    """Return a rich console for text of others: no markup, no highlighting, control characters escaped.

    Args:
        stderr: draw on standard error instead of standard output.
        options: further arguments of ``rich.console.Console``.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class ProtectedConsole(Console):
        def render_str(self, text: str, **named: Any) -> Text:
            """Escape a text before it is laid out, so that its width is right."""
            return super().render_str(visible(text), **named)

        def render(self, *args: Any, **named: Any) -> Iterator[Segment]:
            """Yield what rich draws, its own control codes kept."""
            for segment in super().render(*args, **named):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    stream = sys.stderr if stderr else sys.stdout
    raw = stream.unprotected if isinstance(stream, ProtectedStream) else stream
    return ProtectedConsole(file=raw, **{"markup": False, "highlight": False, "emoji": False, **options})
