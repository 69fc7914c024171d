"""Ends a job in which a rank has died or a collective hangs, and says which rank and where.

Every rank notes where it is (``Progress``) in the rendezvous store, from a thread and without a collective, so that it
works while all else is stuck. Rank 0 reads the notes of all and writes a verdict that the others read; each of them
watches rank 0 itself, whose silence, or that of the store it may host, is their own verdict. Then each rank prints the
verdict and leaves with ``WATCHDOG_EXIT_CODE``. Time is measured on the reader's clock only, by notes that change.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from reflectron.engine.parallel.launch import SUPERVISED, WATCHDOG_EXIT_CODE
from reflectron.engine.text import printable

# Building, loading, saving and a first step with its compilations may take so many times longer than anything else.
SLOW_PHASE_FACTOR = 6
# After a rank has said that it fails, the others have this long to end by themselves: often all meet the same error.
_FAILING_GRACE_S = 5.0
# Rank 0 may host the store, so it leaves when all others have heard the verdict, or after this time.
_HEARING_S = 5.0
_CONNECT_S = 5.0
# torch (2.13) asks a name server who the other end is, which takes 5 s where a question or its answer is lost.
_FIRST_CONNECT_S = 60.0


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
    """

    def __init__(self, limits: WatchdogLimits, now: float) -> None:
        self.limits = limits
        self._seen: dict[int, _Seen] = {}
        self._progressed = now

    def forgive(self, seconds: float) -> None:
        """Not count a time in which the reader itself was stopped."""
        self._progressed += seconds
        for seen in self._seen.values():
            seen.at += seconds

    def judge(self, notes: Mapping[int, Note], now: float) -> str:
        """What is wrong, or nothing.

        Args:
            notes: by rank; of a part of the ranks when the others are not watched.
            now: the reader's clock.
        """
        for rank, note in notes.items():
            seen = self._seen.setdefault(rank, _Seen(note, now))
            if (note.entered, note.ticks) != (seen.note.entered, seen.note.ticks):
                self._progressed = now
            if note != seen.note:
                self._seen[rank] = _Seen(note, now)
        watched = {rank: seen for rank, seen in sorted(self._seen.items()) if not seen.note.done}
        failed = [(seen.note.order, rank) for rank, seen in watched.items() if seen.note.words]
        if failed:
            _, first = min(failed)
            return _failed_first(first, watched[first].note)
        silent = {rank: seen for rank, seen in watched.items() if now - seen.at > self.limits.silence_s}
        if silent:
            return _silent(silent, now)
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


class Watchdog:
    """The thread of one rank; made after the process groups, on all ranks.

    Args:
        progress: where this rank is.
        limits: how long is too long.
        beat_s: seconds between two looks.
    """

    def __init__(self, progress: Progress, limits: WatchdogLimits, beat_s: float = 2.0) -> None:
        self.progress, self.limits, self.beat_s = progress, limits, beat_s
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.progress.note = replace(progress.note, host=socket.gethostname())
        self._beats = 0
        self._stopping, self._judged = threading.Event(), threading.Event()
        self._verdict = ""
        self._failing = False
        self._store = self._connect(_FIRST_CONNECT_S)
        if self.rank == 0:
            for rank in range(1, self.world_size):
                # So that reading never waits for a rank that has not noted anything.
                self._store.compare_set(_key(rank), "", _text(Note()))
        self._beat()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        # A daemon thread that the interpreter's end meets inside the store aborts the process, whatever its exit code.
        atexit.register(self._end_thread)

    def _end_thread(self) -> None:
        self._stopping.set()
        self._thread.join(_HEARING_S + 2 * _CONNECT_S)

    def stop(self) -> None:
        """This rank has come to its end and must not be missed."""
        self._end_thread()
        atexit.unregister(self._end_thread)
        self.progress.note = replace(self.progress.note, done=True)
        self._beat()

    def last_words(self, error: Exception) -> NoReturn:
        """Tell the others why this rank ends, then raise ``error``.

        A rank whose collective failed is not the first: it waits for the verdict that names the first, and leaves with
        that. Only where ``spawn_local`` watches over the ranks it need not.
        """
        self._failing = True
        if not _lost_contact(error):
            # Without a store there is nobody to tell.
            with suppress(RuntimeError):
                order = self._store.add("failures", 1)
                self.progress.note = replace(
                    self.progress.note, words=printable(f"{type(error).__name__}: {error}", 500), order=order
                )
                self._beat()
        elif SUPERVISED not in os.environ:
            # A launcher may know better, and must be able to end this rank meanwhile.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._judged.wait(self.limits.silence_s + 2 * _HEARING_S + 2 * _CONNECT_S):
                self._leave()
        raise error

    def _watch(self) -> None:
        # Who hangs is for rank 0 to say, which sees all.
        limits = self.limits if self.rank == 0 else replace(self.limits, hang_s=0.0)
        judge = Judge(limits, time.monotonic())
        notes = {0: Note()}
        asleep = time.monotonic()
        while not self._stopping.wait(self.beat_s):
            judge.forgive(max(0.0, time.monotonic() - asleep - 2 * self.beat_s))
            # Without a store, whose server ends with its process, the notes stay what they were: a silence.
            with suppress(RuntimeError):
                self._beat()
                notes = self._read()
            self._verdict = self._verdict or judge.judge(notes, time.monotonic())
            if self._verdict:
                break
            asleep = time.monotonic()
        if self._verdict:
            self._end()

    def _read(self) -> dict[int, Note]:
        """The notes that this rank judges by; takes over rank 0's verdict."""
        if self.rank == 0:
            texts = self._store.multi_get([_key(rank) for rank in range(self.world_size)])
            return {rank: Note(**json.loads(text)) for rank, text in enumerate(texts)}
        if self._store.check(["verdict"]):
            self._verdict = self._store.get("verdict").decode()
            self._store.add("heard", 1)
        # If rank 0 fails, it may not have been the first.
        return {0: replace(Note(**json.loads(self._store.get(_key(0)))), words="")}

    def _end(self) -> None:
        if self.rank == 0:
            with suppress(RuntimeError):
                self._store.set("verdict", self._verdict)
                self._wait_until_heard()
        self._judged.set()
        if "failed first" in self._verdict:
            self._stopping.wait(_FAILING_GRACE_S)
        if not self._failing and not self._stopping.is_set():
            self._leave()

    def _wait_until_heard(self) -> None:
        last = time.monotonic() + _HEARING_S
        while self._store.add("heard", 0) < self.world_size - 1 and time.monotonic() < last:
            time.sleep(self.beat_s / 10)

    def _leave(self) -> NoReturn:
        # One write, so that the lines of many ranks do not mix.
        sys.stderr.write(f"reflectron: rank {self.rank} ends: {self._verdict} (exit code {WATCHDOG_EXIT_CODE})\n")
        sys.stderr.flush()
        # The main thread may be inside a collective, which nothing interrupts.
        os._exit(WATCHDOG_EXIT_CODE)

    def _beat(self) -> None:
        self._beats += 1
        note = _text(replace(self.progress.note, beats=self._beats))
        try:
            self._store.set(_key(self.rank), note)
        except RuntimeError:
            self._store = self._connect(_CONNECT_S)
            self._store.set(_key(self.rank), note)

    def _connect(self, timeout_s: float) -> Store:
        # A connection of its own: the job's allows one call at a time, and waits inside it.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        store.set_timeout(timedelta(seconds=_CONNECT_S))
        # torchrun keeps the store over its restarts.
        return PrefixStore(f"watchdog{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _key(rank: int) -> str:
    return f"rank{rank}"


def _text(note: Note) -> str:
    return json.dumps(asdict(note))


def _lost_contact(error: BaseException) -> bool:
    """Whether ``error`` came from a collective, so that another rank may be at fault."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text or "closed by peer" in text)
