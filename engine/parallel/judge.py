"""What a rank notes of itself for the watchdogs of the others, and the verdict on a job from the notes of its ranks.

Whoever reaches the store may write to it. A note is sealed with the secret of the run, and anything else counts as no
note: it can delay what a rank says, but say nothing in its place. Time is measured on the reader's clock only, by notes
that change.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from reflectron.engine.files import printable
from reflectron.engine.parallel.launch import RUN_SECRET

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
        """Return step and phase as a user reads them."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass
class RankProgress:
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
        """Note that something was done, also where no phase ends."""
        self.note = replace(self.note, ticks=self.note.ticks + 1)


class Seal:
    """Signs what ranks of this run write into the store, each under its key.

    ``spawn_local`` sets the secret. Where the environment has none, a seal shows no more than that whoever wrote it
    knows how.
    """

    def __init__(self) -> None:
        self._secret = os.environ.get(RUN_SECRET, "").encode()

    def prefix(self) -> str:
        """Return the prefix of the keys, which nobody else knows."""
        return f"watchdog-{self._sign('prefix', b'')[:16]}"

    def close(self, key: str, text: str) -> str:
        """Return ``text`` with its signature."""
        return self._sign(key, text.encode()) + text

    def open(self, key: str, sealed: bytes) -> str | None:
        """Return what a rank of this run wrote under ``key``, or None when nobody of it did."""
        if len(sealed) > _MOST_BYTES:
            return None
        signature, text = sealed[:64], sealed[64:]
        if not hmac.compare_digest(signature, self._sign(key, text).encode()):
            return None
        return text.decode(errors="replace")

    def _sign(self, key: str, text: bytes) -> str:
        return hmac.new(self._secret, f"{key}\n".encode() + text, hashlib.sha256).hexdigest()


def note_text(note: Note) -> str:
    """Return the note as it stands in the store."""
    return json.dumps(asdict(note))


def read_note(text: str) -> Note | None:
    """Return the note of ``note_text``, its words fit for a terminal; None for any other text."""
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


# Building, loading, saving and a first step with its compilations may take so many times longer than anything else.
SLOW_PHASE_FACTOR = 6


@dataclass(frozen=True, kw_only=True)
class WatchdogLimits:
    """How long is too long, in seconds."""

    hang_s: float
    """Without progress of any rank; 0 waits for ever."""
    silence_s: float
    """Without a sign of life of a rank."""


@dataclass
class _Seen:
    """What a reader has seen of a rank."""

    note: Note
    at: float
    """When the note last changed, by the reader's clock."""


class JobJudge:
    """Notes of all ranks, one set after the other, to a verdict.

    Args:
        limits: how long is too long.
        now: the reader's clock at the beginning.
        expected: ranks that have to join the job.
    """

    def __init__(self, limits: WatchdogLimits, now: float, expected: Sequence[int] = ()) -> None:
        self.limits, self.expected = limits, expected
        self.someone_failed = False
        """Whether the last verdict is that of a rank which said itself why it ends."""
        self._seen: dict[int, _Seen] = {}
        self._began = self._progressed = now

    def forgive(self, seconds: float) -> None:
        """Skip a time in which the reader itself was stopped."""
        self._began += seconds
        self._progressed += seconds
        for seen in self._seen.values():
            seen.at += seconds

    def judge(self, notes: Mapping[int, Note], now: float) -> str:
        """Return what is wrong, or nothing.

        Args:
            notes: by rank; of a part of the ranks when the others are not watched or have not joined.
            now: the reader's clock.
        """
        for rank, note in notes.items():
            seen = self._seen.setdefault(rank, _Seen(note, now))
            if (note.entered, note.ticks) != (seen.note.entered, seen.note.ticks):
                self._progressed = now
            if note != seen.note:
                self._seen[rank] = _Seen(note, now)
        if self.expected and 0 in notes and notes[0].entered:
            # Rank 0 has met all others: from now on the silence of one that never said anything counts as well.
            for rank in self.expected:
                self._seen.setdefault(rank, _Seen(Note(host="unknown host", slow=False), now))
        watched = {rank: seen for rank, seen in sorted(self._seen.items()) if not seen.note.done}
        failed = [(seen.note.order, rank) for rank, seen in watched.items() if seen.note.words]
        self.someone_failed = bool(failed)
        if failed:
            _, first = min(failed)
            return _failed_first(first, watched[first].note)
        silent = {rank: seen for rank, seen in watched.items() if now - seen.at > self.limits.silence_s}
        if silent:
            return _silent(silent, now)
        missing = [rank for rank in self.expected if rank not in self._seen]
        if missing and self.limits.hang_s and now - self._began > SLOW_PHASE_FACTOR * self.limits.hang_s:
            return f"{_ranks(missing)} did not join the job in {now - self._began:.0f} s"
        factor = SLOW_PHASE_FACTOR if any(seen.note.slow for seen in watched.values()) else 1
        if watched and self.limits.hang_s and now - self._progressed > factor * self.limits.hang_s:
            return _hung({rank: seen.note for rank, seen in watched.items()}, now - self._progressed)
        return ""


def _failed_first(rank: int, note: Note) -> str:
    return f"rank {rank} ({note.host}) failed first, in {note.place()}: {note.words}"


def _silent(silent: Mapping[int, _Seen], now: float) -> str:
    first = min(silent, key=lambda rank: silent[rank].at)
    others = [rank for rank in silent if rank != first]
    also = f"; nor from {_ranks(others)}" if others else ""
    seen = silent[first]
    return (
        f"nothing was heard from rank {first} ({seen.note.host}) for {now - seen.at:.0f} s{also}: it was killed, "
        f"stopped, or its machine is gone; it was last seen in {seen.note.place()}"
    )


def _hung(notes: Mapping[int, Note], seconds: float) -> str:
    last = max(note.entered for note in notes.values())
    arrived = [rank for rank, note in notes.items() if note.entered == last]
    behind: dict[str, list[int]] = {}
    for rank, note in notes.items():
        if note.entered < last:
            behind.setdefault(f"{note.place()} ({note.host})", []).append(rank)
    line = f"no rank got further for {seconds:.0f} s; {_ranks(arrived)} arrived at {notes[arrived[0]].place()}"
    if not behind:
        return f"{line}: all of them, so the network or a collective inside it hangs"
    return f"{line}; not arrived: " + "; ".join(f"{_ranks(ranks)} in {place}" for place, ranks in behind.items())


def _ranks(ranks: Sequence[int]) -> str:
    """Return the ranks in words, runs of them as a range: ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
