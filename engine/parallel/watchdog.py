"""Ends a job in which a rank has died or stands still or a collective hangs, and says which rank and where.

Every rank notes where it is (``Progress``) in the rendezvous store, from a thread and without a collective, so that it
works while all else is stuck. Rank 0 reads the notes of all and writes a verdict that the others read; each of them
watches rank 0 itself, whose silence, or that of the store it may host, is their own verdict. Then each rank prints the
verdict and leaves with ``WATCHDOG_EXIT_CODE``. A call to a store whose host stands still never returns, so who talks to
the store is one thread, and who judges what was heard last is another.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from reflectron.engine.files import printable
from reflectron.engine.parallel import process_groups
from reflectron.engine.parallel.judge import JobJudge, Note, RankProgress, Seal, WatchdogLimits, note_text, read_note
from reflectron.engine.parallel.launch import SUPERVISED, WATCHDOG_EXIT_CODE

# After a rank has said that it fails, the others have this long to end by themselves: often all meet the same error.
_FAILING_GRACE_S = 5.0
# Rank 0 may host the store, so it leaves when all others have heard the verdict, or after this time.
_HEARING_S = 5.0
_CONNECT_S = 5.0
# torch (2.13) asks a name server who the other end is, which takes 5 s where a question or its answer is lost.
_FIRST_CONNECT_S = 60.0
_VERDICT = "verdict"
_MOST_OF_A_VERDICT = 1000


@dataclass(frozen=True)
class _Verdict:
    """Why the job ends; no words while it does not."""

    words: str = ""
    someone_failed: bool = False
    """A rank said itself why it ends, so others may be about to meet the same error."""

    def text(self) -> str:
        """Return the verdict as it stands in the store; a digit in front says whether a rank has failed."""
        return f"{self.someone_failed:d}{self.words}"

    @staticmethod
    def of(text: str) -> _Verdict:
        """Return the verdict of ``text``."""
        return _Verdict(text[1:], text[:1] == "1")


class Watchdog:
    """Watches from the moment it is made; every rank makes one, before it joins the process groups.

    Args:
        progress: where this rank is.
        limits: how long is too long.
        beat_s: seconds between two looks.
    """

    def __init__(self, progress: RankProgress, limits: WatchdogLimits, beat_s: float = 2.0) -> None:
        self.progress, self.limits, self.beat_s = progress, limits, beat_s
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.progress.note = replace(progress.note, host=socket.gethostname())
        self._verdict = _Verdict()
        self._failing = False
        self._stopping, self._judged = threading.Event(), threading.Event()
        self._talk = _Talk(self)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._talk.thread.start()
        self._thread.start()
        # A daemon thread that the interpreter's end meets inside the store aborts the process, whatever its exit code.
        atexit.register(self._end_threads)

    def _end_threads(self) -> None:
        self._stopping.set()
        self._talk.end(_HEARING_S + 2 * _CONNECT_S)
        self._thread.join(_HEARING_S + 2 * _CONNECT_S)

    def stop(self) -> None:
        """Say that this rank has come to its end and must not be missed."""
        self.progress.note = replace(self.progress.note, done=True)
        self._end_threads()
        atexit.unregister(self._end_threads)

    def last_words(self, error: Exception) -> NoReturn:
        """Tell the others why this rank ends, then raise ``error``.

        A rank whose collective failed is not the first: it waits for the verdict that names the first, and leaves with
        that. Only where ``spawn_local`` watches over the ranks it need not.
        """
        self._failing = True
        if _lost_contact(error):
            self._talk.has_met()
            if SUPERVISED not in os.environ:
                # A launcher may know better, and must be able to end this rank meanwhile.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if self._judged.wait(self.limits.silence_s + 2 * _HEARING_S + 2 * _CONNECT_S):
                    self._leave()
        elif self._talk.met:
            words = printable(f"{type(error).__name__}: {error}", 500)
            self.progress.note = replace(self.progress.note, words=words, order=self._talk.order_of_failing())
            self._talk.say_now(_CONNECT_S)
        raise error

    def _watch(self) -> None:
        """Judge at every beat what was heard last; nothing here waits for another rank or the store."""
        if not self._talk.wait_for_meeting():
            return
        # Who hangs is for rank 0 to say, which sees all.
        limits = self.limits if self.rank == 0 else replace(self.limits, hang_s=0.0)
        judge = JobJudge(limits, time.monotonic(), range(self.world_size) if self.rank == 0 else ())
        asleep = time.monotonic()
        while not self._stopping.wait(self.beat_s):
            # Time in which this process stood still itself.
            judge.forgive(max(0.0, time.monotonic() - asleep - 2 * self.beat_s))
            asleep = time.monotonic()
            words = judge.judge(self._talk.heard(), asleep)
            self._verdict = self._talk.verdict if self._talk.verdict.words else _Verdict(words, judge.someone_failed)
            if self._verdict.words:
                self._end()
                return

    def _end(self) -> None:
        if self.rank == 0:
            self._talk.publish(self._verdict)
        self._judged.set()
        if self._verdict.someone_failed:
            self._stopping.wait(_FAILING_GRACE_S)
        if not self._failing and not self._stopping.is_set():
            self._leave()

    def _leave(self) -> NoReturn:
        # One write, so that the lines of many ranks do not mix.
        verdict = printable(self._verdict.words, _MOST_OF_A_VERDICT)
        sys.stderr.write(f"reflectron: rank {self.rank} ends: {verdict} (exit code {WATCHDOG_EXIT_CODE})\n")
        sys.stderr.flush()
        # The main thread may be inside a collective, which nothing interrupts.
        os._exit(WATCHDOG_EXIT_CODE)


class _Talk:
    """The one thread that talks to the store, and what it heard last; any call of it may wait for ever."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.rank, self.world_size, self.beat_s = watchdog.rank, watchdog.world_size, watchdog.beat_s
        self.progress = watchdog.progress
        self.verdict = _Verdict()
        """Rank 0's, on other ranks."""
        self._seal = Seal()
        self._notes: dict[int, Note] = {}
        self._beats = self._rounds = 0
        self._met, self._hurry, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._said = threading.Event()
        self._publishing, self._published = _Verdict(), threading.Event()
        self._store: Store | None = None
        self._patience_s = _CONNECT_S
        self.thread = threading.Thread(target=self._run, daemon=True, name="watchdog store")

    # For the other threads of this rank; none of these waits for the store longer than it is told ---------------------

    def wait_for_meeting(self) -> bool:
        """Wait until the store can be reached at all; False when this rank ends before."""
        while not self._met.wait(self.beat_s):
            if self._ending.is_set():
                return False
            if self.progress.note.entered:
                self.has_met()
        return True

    @property
    def met(self) -> bool:
        """Whether the store could be reached."""
        return self._met.is_set()

    def has_met(self) -> None:
        """Note that this rank has met the others; who hosted the store may be gone before it is seen from here."""
        self._met.set()

    def heard(self) -> dict[int, Note]:
        """Return the notes that this rank judges by."""
        if self.rank == 0 or 0 in self._notes:
            return self._notes
        # Before rank 0 says anything, answers of the store are its signs of life.
        return {0: Note(beats=self._rounds)}

    def order_of_failing(self) -> int:
        """Return how many ranks had failed before this one, plus 1."""
        order = [1 << 20]
        asking = threading.Thread(target=self._count_failure, args=(order,), daemon=True)
        asking.start()
        asking.join(_CONNECT_S)
        return order[0]

    def say_now(self, timeout_s: float) -> None:
        """Have the note of this moment written."""
        self._said.clear()
        self._hurry.set()
        self._said.wait(timeout_s)

    def publish(self, verdict: _Verdict) -> None:
        """Have all others read it, if they still can."""
        self._publishing = verdict
        self._hurry.set()
        self._published.wait(_HEARING_S + _CONNECT_S)

    def end(self, timeout_s: float) -> None:
        """Write a last note and end the thread."""
        self._ending.set()
        self._hurry.set()
        self.thread.join(timeout_s)

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._meet()
        while self._met.is_set():
            ending = self._ending.is_set()
            # Without a store, whose server ends with its process, the notes stay what they were: a silence. Nor must
            # anything else that a store answers end this thread.
            with suppress(Exception):
                self._round()
                self._rounds += 1
                self._said.set()
            if ending:
                return
            self._hurry.wait(self.beat_s)
            self._hurry.clear()

    def _meet(self) -> None:
        """Wait until something listens where the store will be; rank 0 may prepare inputs for hours before it does."""
        while not self._ending.is_set() and not self._met.is_set():
            with suppress(OSError), socket.create_connection(process_groups.master(), timeout=_CONNECT_S):
                self._patience_s = _FIRST_CONNECT_S
                self._met.set()
            self._ending.wait(min(self.beat_s, 0.5))

    def _round(self) -> None:
        if self._store is None:
            patience_s, self._patience_s = self._patience_s, _CONNECT_S
            self._store = PrefixStore(self._seal.prefix(), process_groups.connect_again(patience_s))
        try:
            self._exchange(self._store)
        except Exception:
            self._store = None
            raise

    def _exchange(self, store: Store) -> None:
        self._beats += 1
        note = replace(self.progress.note, beats=self._beats)
        store.set(_key(self.rank), self._seal.close(_key(self.rank), note_text(note)))
        if self._publishing.words:
            store.set(_VERDICT, self._seal.close(_VERDICT, self._publishing.text()))
            self._wait_until_heard(store)
        self._notes = self._read_notes(store)
        if self.rank != 0 and store.check([_VERDICT]):
            text = self._seal.open(_VERDICT, store.get(_VERDICT))
            if text and not self.verdict.words:
                self.verdict = _Verdict.of(text)
                store.add("heard", 1)

    def _read_notes(self, store: Store) -> dict[int, Note]:
        ranks = range(self.world_size) if self.rank == 0 else (0,)
        keys = {rank: _key(rank) for rank in ranks}
        if not store.check(list(keys.values())):
            # Some have not joined, or somebody has removed their notes: reading those would wait.
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        notes = dict(self._notes)
        for (rank, key), sealed in zip(keys.items(), store.multi_get(list(keys.values())), strict=True):
            text = self._seal.open(key, sealed)
            note = read_note(text) if text is not None else None
            # An old one, written once more, is no sign of life.
            if note is not None and (rank not in notes or note.beats > notes[rank].beats):
                # If rank 0 fails, it may not have been the first.
                notes[rank] = note if self.rank == 0 else replace(note, words="")
        return notes

    def _wait_until_heard(self, store: Store) -> None:
        last = time.monotonic() + _HEARING_S
        while store.add("heard", 0) < self.world_size - 1 and time.monotonic() < last:
            time.sleep(self.beat_s / 10)
        self._published.set()

    def _count_failure(self, order: list[int]) -> None:
        with suppress(RuntimeError):
            store = PrefixStore(self._seal.prefix(), process_groups.connect_again(_CONNECT_S))
            order[0] = store.add("failures", 1)


def _key(rank: int) -> str:
    return f"rank{rank}"


def _lost_contact(error: BaseException) -> bool:
    """Return whether ``error`` came from a collective, so that another rank may be at fault."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises a plain RuntimeError, for which torch has no type: its words are all there is.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text or "closed by peer" in text)
