"""What a rank says of itself to the watchdogs of the others, and how they know that it was a rank of this run.

Whoever reaches the store may write to it. A note is sealed with the secret of the run, and one that is not, or that is
no note, is taken for none: it can delay what a rank says, but say nothing in its place.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from reflectron.engine.parallel.launch import RUN_SECRET
from reflectron.engine.text import printable

_MOST_BYTES = 8192
_MOST_WORDS = 500


@dataclass(frozen=True, kw_only=True)
class Note:
    """Where a rank is, as it says itself."""

    host: str = ""
    step: int = 0
    """Steps it has begun."""
    phase: str = "starting"
    """What it does."""
    slow: bool = True
    """That may take long."""
    entered: int = 0
    """Phases entered so far; all ranks enter the same ones in the same order."""
    ticks: int = 0
    """Signs of progress within a phase."""
    beats: int = 0
    """Signs of life."""
    words: str = ""
    """Why it is about to end, if it knows."""
    order: int = 0
    """How many ranks had failed before it, plus 1; 0 when it has not."""
    done: bool = False
    """It has come to the end and is no longer watched."""

    def place(self) -> str:
        """Step and phase as a user reads them."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass
class Progress:
    """Where this rank is; written by its main thread, read by its watchdog."""

    note: Note = field(default_factory=Note)

    def enter(self, phase: str, step: int | None = None, *, slow: bool = False) -> None:
        """Begin a phase that all ranks enter.

        Args:
            phase: what is done, for a user.
            step: 1-based number of the step that it belongs to; the one before when None.
            slow: it may take ``SLOW_PHASE_FACTOR`` times as long.
        """
        now = self.note
        self.note = replace(
            now, phase=phase, step=now.step if step is None else step, slow=slow, entered=now.entered + 1
        )

    def tick(self) -> None:
        """Something was done, also where no phase ends."""
        self.note = replace(self.note, ticks=self.note.ticks + 1)


class Seal:
    """Signs what ranks of this run write into the store, each under its key.

    ``spawn_local`` sets the secret. Where the environment has none, a seal shows no more than that whoever wrote it
    knows how.
    """

    def __init__(self) -> None:
        self._secret = os.environ.get(RUN_SECRET, "").encode()

    def prefix(self) -> str:
        """The prefix of the keys, which nobody else knows."""
        return f"watchdog-{self._sign('prefix', b'')[:16]}"

    def close(self, key: str, text: str) -> str:
        """``text`` with its signature."""
        return self._sign(key, text.encode()) + text

    def open(self, key: str, sealed: bytes) -> str | None:
        """What a rank of this run wrote under ``key``, or None when nobody of it did."""
        if len(sealed) > _MOST_BYTES:
            return None
        signature, text = sealed[:64], sealed[64:]
        if not hmac.compare_digest(signature, self._sign(key, text).encode()):
            return None
        return text.decode(errors="replace")

    def _sign(self, key: str, text: bytes) -> str:
        return hmac.new(self._secret, f"{key}\n".encode() + text, hashlib.sha256).hexdigest()


def note_text(note: Note) -> str:
    """The note as it stands in the store."""
    return json.dumps(asdict(note))


def read_note(text: str) -> Note | None:
    """The note of ``note_text``, its words fit for a terminal; None for any other text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {item.name: type(item.default) for item in fields(Note)}
    if not isinstance(content, dict) or content.keys() != kinds.keys():
        return None
    if any(type(content[name]) is not kind for name, kind in kinds.items()):
        return None
    return Note(**{name: _bounded(value) for name, value in content.items()})


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, _MOST_WORDS)
    return min(max(value, 0), 1 << 53) if type(value) is int else value
