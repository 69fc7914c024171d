"""One job a folder: locks of living, dead, suspended and unknown jobs, on this machine and on others."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reflectron.engine import job_lock
from reflectron.engine.job_lock import (
    LOCK_NAME,
    Holder,
    Locked,
    LockLost,
    inherited_lock,
    lock_folder,
    take_lock,
)

# In seconds: short, so that the tests need not wait for a machine that is gone.
BEAT, SILENCE, LONG_SILENCE = 0.05, 0.1, 5.0
HOLD = """
import sys, time
from pathlib import Path
from reflectron.engine.job_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]), "output_dir")
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
Hold = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that locks the folder until its input ends."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=pipe, stdout=pipe, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_lock, "_POLL_S", 0.02)


def lock(folder: Path, silence_s: float = SILENCE, **options: object) -> object:
    return lock_folder(folder, "output_dir", beat_s=BEAT, silence_s=silence_s, **options)  # type: ignore[arg-type]


def write_foreign(folder: Path, **changes: object) -> Path:
    """The lock of a job on another machine."""
    holder = dataclasses.replace(Holder.this_process({}), host="node07", pid=77, machine="another", **changes)
    path = folder / LOCK_NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    return path


def test_a_living_job_is_named(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    with pytest.raises(Locked) as refusal:
        lock(tmp_path)
    assert str(refusal.value).startswith(f"output_dir {tmp_path} is in use by process {process.pid} on ")
    assert "\n" not in str(refusal.value)
    # A suspended one lives on.
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(Locked):
        lock(tmp_path)
    process.send_signal(signal.SIGCONT)
    process.communicate("")
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path):  # type: ignore[attr-defined]
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    process.kill()
    # Dead, though nobody has waited for it yet.
    with lock(tmp_path):  # type: ignore[attr-defined]
        holder = json.loads((tmp_path / LOCK_NAME).read_text(encoding="utf-8"))
        assert holder["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    me = Holder.this_process({})
    earlier = dataclasses.replace(me, started=me.started - 1)
    (tmp_path / LOCK_NAME).write_text(json.dumps(dataclasses.asdict(earlier)), encoding="utf-8")
    lock(tmp_path).release()  # type: ignore[attr-defined]


def test_a_job_of_another_machine_that_gives_signs_of_life_is_respected(tmp_path: Path) -> None:
    path = write_foreign(tmp_path, job="cluster/4711")
    ending = threading.Event()

    def beat() -> None:
        while not ending.wait(BEAT):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Locked, match=r"in use by process 77 on node07, Slurm job 4711, since "):
            lock(tmp_path, LONG_SILENCE)
    finally:
        ending.set()
        thread.join()
    assert json.loads(path.read_text(encoding="utf-8"))["host"] == "node07"


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"token": 1}', "\0" * 100, "[" * 4000], ids=range(7))
def test_a_silent_or_damaged_lock_is_taken_over_after_a_while(tmp_path: Path, content: str | None) -> None:
    path = write_foreign(tmp_path)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    # The clock of whoever wrote it does not matter.
    os.utime(path, (2**32, 2**32))
    said: list[str] = []
    began = time.monotonic()
    with lock(tmp_path, say=said.append) as mine:  # type: ignore[attr-defined]
        assert time.monotonic() - began >= SILENCE
        mine.check()
    assert len(said) == 1
    assert f"({path}); watching for 0 s whether it still runs" in said[0]


def test_a_link_that_leads_nowhere_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / LOCK_NAME)
    lock(tmp_path, say=lambda _: None).release()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with lock(tmp_path) as mine:  # type: ignore[attr-defined]
        mine.check()
        with pytest.raises(Locked, match=f"in use by process {os.getpid()} on "):
            lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_foreign(tmp_path)
    lock(tmp_path, say=lambda _: None).release()  # type: ignore[attr-defined]


def test_what_cannot_be_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(ValueError, match="is a folder, expected a file or nothing: remove it"):
        lock(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir is .*file, expected a folder that can be written"):
        lock(tmp_path / "file")
    with pytest.raises(ValueError, match=r"output_dir is .*file/below, expected a folder that can be written"):
        lock(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("theirs", "mine", "wait"),
    [
        # Slurm has put the job back into the queue, so its former attempt is over.
        ({"job": "c/12", "attempt": 0}, {"SLURM_RESTART_COUNT": "1"}, False),
        ({"job": "c/12", "attempt": 1}, {"SLURM_RESTART_COUNT": "1"}, True),
        ({"job": "c/13", "attempt": 0}, {"SLURM_RESTART_COUNT": "1"}, True),
        ({"job": "d/12", "attempt": 0}, {"SLURM_RESTART_COUNT": "1"}, True),
        ({"job": "", "attempt": 0}, {}, True),
    ],
)
def test_a_requeued_job_does_not_wait_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: dict[str, object], mine: dict[str, str], wait: bool
) -> None:
    write_foreign(tmp_path, **theirs)
    for name, value in ({"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "c"} | mine).items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    lock(tmp_path, say=said.append).release()  # type: ignore[attr-defined]
    assert bool(said) == wait


def test_a_job_whose_place_was_taken_notices(tmp_path: Path) -> None:
    lost = lock_folder(tmp_path, "output_dir", beat_s=BEAT)
    write_foreign(tmp_path).replace(tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / LOCK_NAME)
    with pytest.raises(LockLost, match=r"is held by process 77 on node07.* now: this job was suspended or cut off"):
        lost.check()
    lost.release()
    # It is not ours to give back.
    assert (tmp_path / LOCK_NAME).exists()
    gone = lock_folder(tmp_path / "gone", "output_dir", beat_s=BEAT)
    (tmp_path / "gone" / LOCK_NAME).unlink()
    with pytest.raises(LockLost, match="is gone"):
        gone.check()
    gone.release()


def test_a_holder_shows_that_it_lives_and_keeps_a_lock_that_was_damaged(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    with lock_folder(tmp_path, "output_dir", beat_s=BEAT) as mine:
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
        path.write_text("garbage", encoding="utf-8")
        mine.check()
        with pytest.raises(Locked, match="in use by a job that its lock does not name"):
            lock(tmp_path, say=lambda _: None)


def test_ranks_find_the_lock_of_their_launcher(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    assert inherited_lock(path, {}) is None
    with lock_folder(tmp_path, "output_dir") as mine:
        assert inherited_lock(tmp_path / "other" / LOCK_NAME, mine.variables()) is None
        inherited = inherited_lock(path, mine.variables())
        assert inherited is not None
        inherited.check()
        inherited.release()
        mine.check()
    with pytest.raises(LockLost):
        inherited_lock(path, mine.variables())


def test_of_many_jobs_at_once_one_wins(tmp_path: Path, hold: Hold) -> None:
    """A dead job's lock is there, and thirty threads want it: it is replaced once, by a single one at a time."""
    hold().kill()
    inside, most, refused = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        try:
            with take_lock(tmp_path / LOCK_NAME, "x", beat_s=BEAT):
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.02)
                with guard:
                    inside[0] -= 1
        except Locked:
            with guard:
                refused[0] += 1

    threads = [threading.Thread(target=work) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert refused[0] < 30
    assert list(tmp_path.iterdir()) == []


def test_waiting_for_a_living_job(tmp_path: Path, hold: Hold) -> None:
    process = hold()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert process.stdin is not None
        process.stdin.close()

    with take_lock(tmp_path / LOCK_NAME, "token store", wait=True, say=say):
        pass
    assert len(said) == 1
    assert f"token store is in use by process {process.pid} on " in said[0]
    assert said[0].endswith("; waiting for it")
    process.wait()
    process.stdin = None


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to itself", "link to nothing"])
def test_what_is_no_file_is_taken_over_like_a_damaged_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"link to a device": "/dev/zero", "link to itself": LOCK_NAME, "link to nothing": "no"}[kind])
    with lock_folder(tmp_path, "output_dir", beat_s=BEAT, silence_s=SILENCE) as taken:
        taken.check()
        assert path.is_file()


@pytest.mark.parametrize("value", ["", "null", "garbage", "5", "[]", '["/x"]', "[1, 2]", "[" * 10**5])
def test_a_lock_that_nobody_handed_down(value: str, tmp_path: Path) -> None:
    assert inherited_lock(tmp_path / LOCK_NAME, {"REFLECTRON_JOB_LOCK": value}) is None
