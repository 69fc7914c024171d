"""From the notes of a job's ranks to a verdict: who is silent, late, missing or failed first.

Time is measured on the reader's clock only, by notes that change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reflectron.engine.parallel.notes import Note

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


class Judge:
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
        """Not count a time in which the reader itself was stopped."""
        self._began += seconds
        self._progressed += seconds
        for seen in self._seen.values():
            seen.at += seconds

    def judge(self, notes: Mapping[int, Note], now: float) -> str:
        """What is wrong, or nothing.

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
    """Ranks in words, runs of them as a range: ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
