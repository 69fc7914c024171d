"""What the watchdog says of the ranks' notes, on a clock of the test's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reflectron.engine.parallel.judge import JobJudge, Note, RankProgress, WatchdogLimits

HANG, SILENCE = 60.0, 10.0


class Job:
    """Four ranks that beat unless they are told not to."""

    def __init__(self) -> None:
        self.judge = JobJudge(WatchdogLimits(hang_s=HANG, silence_s=SILENCE), 0.0)
        self.ranks = [RankProgress(Note(host=f"node{rank // 2}")) for rank in range(4)]
        self.silent: set[int] = set()
        self.now = 0.0

    def enter(self, phase: str, step: int, *ranks: int, slow: bool = False) -> None:
        for rank in ranks or range(4):
            self.ranks[rank].enter(phase, step, slow=slow)

    def after(self, seconds: float) -> str:
        """The verdict when so much time has passed, looked at every second; the first one counts."""
        for _ in range(int(seconds)):
            self.now += 1
            for rank, progress in enumerate(self.ranks):
                if rank not in self.silent:
                    progress.note = replace(progress.note, beats=progress.note.beats + 1)
            notes = {rank: progress.note for rank, progress in enumerate(self.ranks)}
            if verdict := self.judge.judge(notes, self.now):
                return verdict
        return ""


@pytest.fixture
def job() -> Job:
    job = Job()
    job.enter("waiting for data", 7)
    return job


def test_a_rank_that_does_not_arrive_is_named_with_its_place(job: Job) -> None:
    job.enter("training", 7, 0, 1, 3)
    assert job.after(HANG) == ""
    assert job.after(1) == (
        "no rank got further for 61 s; ranks 0-1, 3 arrived at step 7, training; "
        "not arrived: rank 2 in step 7, waiting for data (node1)"
    )


def test_a_hang_that_all_ranks_share(job: Job) -> None:
    job.enter("training", 7)
    assert job.after(HANG + 2) == (
        "no rank got further for 61 s; ranks 0-3 arrived at step 7, training: all of them, so the network or a "
        "collective inside it hangs"
    )


def test_one_rank_that_gets_on_is_enough(job: Job) -> None:
    job.enter("training", 7)
    for _ in range(20):
        assert job.after(HANG - 1) == ""
        job.ranks[3].tick()


def test_a_slow_phase_of_one_rank_is_waited_for(job: Job) -> None:
    job.enter("saving a checkpoint", 7, 0, slow=True)
    assert job.after(6 * HANG) == ""
    assert job.after(3).startswith("no rank got further for 361 s; rank 0 arrived at step 7, saving a checkpoint; not")


def test_a_silent_rank_is_named_before_the_others_hang(job: Job) -> None:
    job.enter("training", 7)
    assert job.after(5) == ""
    job.silent = {1, 2}
    assert job.after(SILENCE) == ""
    assert job.after(1) == (
        "nothing was heard from rank 1 (node0) for 11 s; nor from rank 2: it was killed, stopped, or its machine is "
        "gone; it was last seen in step 7, training"
    )


def test_a_rank_that_has_come_to_its_end_is_not_missed(job: Job) -> None:
    job.ranks[1].note = replace(job.ranks[1].note, done=True)
    job.silent = {1}
    assert job.after(HANG) == ""


def test_the_first_of_several_failures_is_named(job: Job) -> None:
    job.ranks[0].note = replace(job.ranks[0].note, words="MemoryError: second", order=2)
    job.ranks[2].note = replace(job.ranks[2].note, words="OSError: first", order=1)
    assert job.after(1) == "rank 2 (node1) failed first, in step 7, waiting for data: OSError: first"


def test_a_reader_that_was_stopped_itself_blames_nobody(job: Job) -> None:
    job.enter("training", 7)
    assert job.after(5) == ""
    job.now += 10 * HANG
    job.judge.forgive(10 * HANG)
    assert job.after(SILENCE) == ""


def test_no_time_limit(job: Job) -> None:
    job.judge = JobJudge(WatchdogLimits(hang_s=0, silence_s=SILENCE), 0.0)
    assert job.after(20 * HANG) == ""


def test_a_rank_that_never_joins_is_named() -> None:
    judge = JobJudge(WatchdogLimits(hang_s=HANG, silence_s=SILENCE), 0.0, range(4))
    notes = {0: RankProgress(Note(host="node0")), 2: RankProgress(Note(host="node1"))}
    verdict, now = "", 0.0
    while not verdict and now < 10 * HANG:
        now += 1
        for progress in notes.values():
            progress.tick()
        verdict = judge.judge({rank: progress.note for rank, progress in notes.items()}, now)
    assert verdict == "ranks 1, 3 did not join the job in 361 s"


def test_a_rank_that_stops_before_it_says_anything_is_silent_once_all_have_met() -> None:
    judge = JobJudge(WatchdogLimits(hang_s=0.0, silence_s=SILENCE), 0.0, range(2))
    progress, verdict, now = RankProgress(Note(host="node0")), "", 0.0
    while now < 10 * SILENCE:
        now += 1
        progress.tick()
        assert judge.judge({0: replace(progress.note, beats=int(now))}, now) == "", "rank 1 may join at any time"
    progress.enter("training", 1)
    met = now
    while not verdict and now < met + 10 * SILENCE:
        now += 1
        verdict = judge.judge({0: replace(progress.note, beats=int(now))}, now)
    assert verdict.startswith(f"nothing was heard from rank 1 (unknown host) for {SILENCE + 1:.0f} s: it was killed")


def test_ranks_that_come_late_are_waited_for() -> None:
    judge = JobJudge(WatchdogLimits(hang_s=HANG, silence_s=2 * HANG), 0.0, range(2))
    first = Note(host="node0")
    assert judge.judge({0: first}, HANG) == ""
    assert judge.judge({0: replace(first, beats=1), 1: Note()}, 2 * HANG) == ""
    assert judge.judge({0: replace(first, beats=2), 1: Note(beats=1)}, 3 * HANG) == ""
