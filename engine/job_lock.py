"""One job a folder: a lock file that names its holder, outlives no job, and works between machines.

The file is made by a hard link, which is atomic on local and network file systems alike (or exclusively, where there
are none). On the holder's own machine it is asked whether its process still runs. From another machine the lock is
watched: the holder touches it every ``BEAT_S`` seconds, and it counts as left behind when it has not changed for
``SILENCE_S``. Only changes are looked at, never a clock. A holder that was suspended so long that another job took its
place finds out by ``check``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from reflectron.engine.files import printable, remove, temporary_name

LOCK_NAME = "job.lock"
BEAT_S = 10.0
SILENCE_S = 90.0
_POLL_S = 0.2
# What file systems without hard links answer: FAT, and some that are programs (FUSE).
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)
# How a launcher tells its ranks which lock they work under.
_INHERITED = "REFLECTRON_JOB_LOCK"


class Locked(ValueError):
    """Another job holds the lock; one line that names it."""


class LockLost(ValueError):
    """Another job has taken the lock over; one line that names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the file says."""

    token: str
    """Random, another one for every taking."""
    host: str
    pid: int
    started: int
    """Clock ticks after boot at which the process began: with its number, this process and no later one."""
    machine: str
    """Boot and namespace in which ``pid`` means something."""
    job: str = ""
    """Slurm's cluster and job id; empty without Slurm."""
    attempt: int = 0
    """How often Slurm had put that job back into the queue."""
    since: str = ""
    """When it was taken, by the holder's clock; for a user only."""

    def __str__(self) -> str:
        job = f", Slurm job {self.job.rpartition('/')[2]}" if self.job else ""
        since = f", since {self.since}" if self.since else ""
        return printable(f"process {self.pid} on {self.host}{job}{since}")

    @staticmethod
    def this_process(env: Mapping[str, str] = os.environ) -> Holder:
        """Return this process, with a new token."""
        job = env.get("SLURM_JOB_ID", "")
        attempt = env.get("SLURM_RESTART_COUNT", "")
        return Holder(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            machine=_machine(),
            job=f"{env.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
            attempt=int(attempt) if attempt.isdecimal() else 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_dead(self, me: Holder) -> bool | None:
        """Return whether its process has ended; None when that cannot be known from here."""
        if self.machine == me.machine:
            return _started(self.pid) != self.started
        if self.job and self.job == me.job and self.attempt < me.attempt:
            # Slurm puts a job back only when its former attempt has ended.
            return True
        return None


class JobLock:
    """A lock that this process holds, or that its launcher holds for it.

    Args:
        path: of the lock file.
        descriptor: of the file, open.
        token: of the taking.
        owned: this process took it, and gives it back.
    """

    def __init__(self, path: Path, descriptor: int, token: str, *, owned: bool, beat_s: float = BEAT_S) -> None:
        self.path, self.token, self._descriptor, self._owned = path, token, descriptor, owned
        self._ending = threading.Event()
        self._beat_s = beat_s
        self._thread = threading.Thread(target=self._beat, daemon=True, name="job lock")
        self._thread.start()

    def check(self) -> None:
        """See that the lock is still ours; to be called before anything is written that others rely on.

        Raises:
            LockLost: naming who holds it now.
        """
        holder = _read(self.path)
        # Damaged in place it is still the file that we keep touching, which others respect.
        if holder is None and _same_file(self.path, self._descriptor):
            return
        if holder is None or holder.token != self.token:
            by = f"is held by {holder} now" if holder else "is gone"
            raise LockLost(
                f"{self.path} {by}: this job was suspended or cut off for more than {SILENCE_S:.0f} s and another one "
                "may have taken its place; it ends without writing anything more"
            )

    def variables(self) -> dict[str, str]:
        """Return the environment variables by which processes of this job find the lock."""
        return {_INHERITED: json.dumps([str(self.path.absolute()), self.token])}

    def release(self) -> None:
        """Give the lock back, unless it is another's by now."""
        self._ending.set()
        self._thread.join()
        if self._owned:
            with contextlib.suppress(LockLost, OSError):
                self.check()
                self.path.unlink()
        os.close(self._descriptor)

    def __enter__(self) -> JobLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ending.wait(self._beat_s):
            # By the open file: whoever took the lock over has another one under its name.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def lock_folder(folder: Path, what: str, **options: Any) -> JobLock:
    """Lock ``folder``, which is made; see ``take_lock``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what} is {folder}, expected a folder that can be written: {error.strerror}") from None
    return take_lock(folder / LOCK_NAME, f"{what} {folder}", **options)


def take_lock(
    path: Path,
    what: str,
    *,
    wait: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    beat_s: float = BEAT_S,
    silence_s: float = SILENCE_S,
) -> JobLock:
    """Take the lock file ``path``, whose folder exists.

    Args:
        path: made by a hard link.
        what: that is locked, for the messages.
        wait: until a living holder gives it back, instead of failing.
        say: told once why it takes time.
        beat_s: seconds between two signs of life.
        silence_s: seconds without one after which a holder on another machine counts as dead.

    Raises:
        Locked: when another job holds it.
        ValueError: when the file system cannot hold it.
    """
    me, watch, said = Holder.this_process(), _Watch(silence_s), False
    while not _link(path, me):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file or nothing: remove it")
        holder = _read(path)
        dead = holder.is_dead(me) if holder else None
        if dead is None:
            dead = watch.verdict(path)
        if dead and _replace(path, holder.token if holder else None, me, say, silence_s):
            break
        if dead is False and not wait:
            raise Locked(f"{_in_use(what, holder, path)}: wait until it has ended, stop it, or choose another folder")
        if not dead:
            if not said:
                reason = "waiting for it" if dead is False else f"watching for {silence_s:.0f} s whether it still runs"
                say(f"{_in_use(what, holder, path)}; {reason}")
                said = True
            time.sleep(_POLL_S)
    return JobLock(path, os.open(path, os.O_RDONLY), me.token, owned=True, beat_s=beat_s)


def _in_use(what: str, holder: Holder | None, path: Path) -> str:
    return f"{what} is in use by {holder or 'a job that its lock does not name'} ({path})"


def inherited_lock(path: Path, env: Mapping[str, str] = os.environ) -> JobLock | None:
    """Return the lock ``path`` as taken by the process that started this one; None when it did not.

    Raises:
        LockLost: when another job has taken it over meanwhile.
    """
    match _parsed(env.get(_INHERITED, "")):
        case [str(known), str(token)] if known == str(path.absolute()):
            pass
        # None, or that of another folder's job, which started this one.
        case _:
            return None
    try:
        lock = JobLock(path, os.open(path, os.O_RDONLY), token, owned=False)
    except OSError as error:
        raise LockLost(f"{path}: {error.strerror}, expected the lock of this job") from None
    lock.check()
    return lock


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class _Watch:
    """Whether a lock of another machine changes."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._seen: tuple[int, ...] | None = None
        self._at = 0.0

    def verdict(self, path: Path) -> bool | None:
        """Return True when it has been silent for long, False when it gave a sign of life, None when that is open."""
        state = _state(path)
        if self._seen is None or state is None:
            self._seen, self._at = state, time.monotonic()
            return None
        if state != self._seen:
            # Another file is another holder, who is watched anew.
            alive = state[0] == self._seen[0]
            self._seen, self._at = state, time.monotonic()
            return False if alive else None
        return True if time.monotonic() - self._at > self._silence_s else None


def _link(path: Path, me: Holder) -> bool:
    """Make the lock if there is none; False when there is one."""
    with _own_file(path, me) as own:
        try:
            os.link(own, path)
        except FileExistsError:
            # An answer that was lost on the network: the link may be ours.
            return os.stat(own).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise _cannot(path, error) from None
            return _create(path, me)
        return True


def _create(path: Path, me: Holder) -> bool:
    """Like ``_link`` where there are no hard links: the file is there before its content, for a moment."""
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(me)) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise _cannot(path, error) from None
    return True


def _replace(path: Path, token: str | None, me: Holder, say: Callable[[str], None], silence_s: float) -> bool:
    """Put our lock in the place of a dead one; False when another job was faster.

    Only who holds the lock of the replacement, which follows the same rules, may replace: so nobody takes away a lock
    that was taken since the dead one was looked at.
    """
    with take_lock(path.with_name(f"{path.name}.takeover"), f"{path}", wait=True, say=say, silence_s=silence_s):
        found = _read(path)
        if (found.token if found else None) != token:
            return False
        _remove_left_behind(path)
        with _own_file(path, me) as own:
            try:
                os.replace(own, path)
            except OSError as error:
                raise _cannot(path, error) from None
    return True


def _remove_left_behind(path: Path) -> None:
    """Delete files that were to become the lock, of processes of this machine that were killed meanwhile."""
    me = Holder.this_process()
    for own in path.parent.glob(f"{path.name}.*.tmp"):
        holder = _read(own)
        if holder is not None and holder.is_dead(me):
            remove(own)


@contextlib.contextmanager
def _own_file(path: Path, me: Holder) -> Iterator[Path]:
    own = path.with_name(temporary_name(path.name))
    try:
        with own.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(me)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        yield own
    except OSError as error:
        raise _cannot(path, error) from None
    finally:
        own.unlink(missing_ok=True)


def _cannot(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be made: {error.strerror}; the lock of a folder that one job at a time writes needs "
        "room and the right to write there"
    )


def _read(path: Path) -> Holder | None:
    """Read who holds the lock; None when there is none or it is damaged."""
    try:
        with _opened(path) as stream:
            content = json.loads(stream.read(4096))
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    expected = {"token": str, "host": str, "pid": int, "started": int, "machine": str, "job": str, "attempt": int}
    return holder if all(type(getattr(holder, name)) is kind for name, kind in expected.items()) else None


def _opened(path: Path) -> IO[bytes]:
    """Open the file for reading; a pipe in its place is not waited for."""
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a sign of life. Opened first: a network file system then asks its server."""
    try:
        with _opened(path) as stream:
            found = os.fstat(stream.fileno())
    except OSError:
        try:
            # One that cannot be opened, as a link that leads nowhere, may be replaced like any other.
            found = path.lstat()
        except OSError:
            return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _started(pid: int) -> int | None:
    """Return when a process of this machine began; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie holds nothing any more.
    return None if fields[0] in "ZX" else int(fields[19])


def _machine() -> str:
    """Return this boot of this machine, and the namespace of its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)
