"""Where this process keeps its sandboxes: their folders lie in one, their cgroups (version 2), if any, below one.

A shell removes both, with whatever still runs in them, as soon as this process has ended, however it ended: the shell
waits for the end of a pipe that nobody else writes to. Where the shell was killed as well, the next process that makes
sandboxes removes the folder, whose lock nobody holds any more.

A cgroup knows all processes of a sandbox and their processor time exactly, also of those that nobody waited for, and
kills them at once. Where the memory controller is delegated as well, the kernel itself keeps the limits on memory and
processes, and counts what belongs to no process. It is made below our own group, or one above it that we may write to
as long as no limit on memory stands between: a sandbox must not leave the limit that its starter was put under.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.sandbox.usage import read_file
from reflectron.tools.sandbox.wall import SandboxLimits

_PREFIX, _OWNER = "reflectron-", ".owner"
_WAIT_SECONDS = 30.0
_CONTROLLERS = ("memory", "pids")
_KILL_SECONDS = 5.0
# The folder's name stands in the environment alone, so that no command line but those of walls holds it.
_JANITOR = r"""
trap '' HUP INT QUIT TERM
read -r _
tries=0
while [ $tries -lt 100 ]; do
    alive=no
    for process in /proc/[0-9]*; do
        case "$(tr '\0' '\n' 2>/dev/null < "$process/cmdline")" in *"$FOLDER"/*) ;; *) continue ;; esac
        case "$(cat "$process/comm" 2>/dev/null)" in
            bwrap | sh | prlimit) kill -9 "${process#/proc/}" 2>/dev/null && alive=yes ;;
        esac
    done
    while read -r place; do
        [ -d "$place" ] || continue
        for group in "$place"/*/; do
            [ -d "$group" ] || continue
            echo 1 > "$group/cgroup.kill"
            rmdir "$group"
        done 2>/dev/null
        rmdir "$place" 2>/dev/null || alive=yes
    done <<END
$PLACES
END
    chmod -R u+rwX -- "$FOLDER" 2>/dev/null
    rm -rf -- "$FOLDER" 2>/dev/null
    [ $alive = no ] && ! [ -e "$FOLDER" ] && exit 0
    sleep 0.1
    tries=$((tries + 1))
done
"""


@dataclass(frozen=True)
class Home:
    """Holds the sandboxes of one process."""

    folder: Path
    groups: CgroupParent | None
    """Cgroups of its sandboxes, where there can be any."""

    def new_cgroup(self, limits: SandboxLimits) -> Cgroup | None:
        """Make a group for one sandbox, where there can be any.

        Raises:
            OSError: it cannot be made.
        """
        return self.groups.new(limits) if self.groups is not None else None


_lock = threading.Lock()
_homes: dict[tuple[int, str], Home] = {}


def home() -> Home:
    """Return the folder of this process, made when it is first asked for; a forked process has its own."""
    key = os.getpid(), tempfile.gettempdir()
    with _lock:
        if key not in _homes:
            _homes[key] = _make()
        return _homes[key]


@contextlib.contextmanager
def sandbox_folder() -> Iterator[Path]:
    """Yield a new folder that is removed at the end, however deep and unreadable what a program left there is."""
    folder = Path(tempfile.mkdtemp(prefix="", dir=home().folder))
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder; what cannot be removed yet goes when this process ends."""
    # shutil.rmtree recurses, and ends where folders are deeper than Python's stack.
    subprocess.run(["chmod", "-R", "u+rwX", "--", folder], capture_output=True, check=False)
    subprocess.run(["rm", "-rf", "--", folder], capture_output=True, check=False)


def _make() -> Home:
    parent = Path(tempfile.gettempdir())
    _remove_stale(parent)
    folder = parent / f"{_PREFIX}{secrets.token_hex(4)}"
    candidates = cgroup_candidates(folder.name)
    # First who removes, then what is to be removed.
    _start_janitor(folder, candidates)
    folder.mkdir(mode=0o700)
    # Names inside cannot be listed, and each folder inside is closed to others.
    folder.chmod(0o711)
    groups = first_cgroup_made(candidates)
    owner = os.open(folder / f"{_OWNER}.new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.write(owner, str(groups.path if groups else "").encode())
    fcntl.flock(owner, fcntl.LOCK_EX)
    # Before this rename nobody takes the folder for a stale one; the lock lives as long as this process.
    os.rename(folder / f"{_OWNER}.new", folder / _OWNER)
    return Home(folder, groups)


def _start_janitor(folder: Path, candidates: list[CgroupParent]) -> None:
    waits, holds = os.pipe()
    places = "\n".join(str(groups.path) for groups in candidates)
    environment = {"PATH": os.defpath, "FOLDER": str(folder), "PLACES": places}
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", _JANITOR],
        stdin=waits,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    os.close(waits)
    atexit.register(_leave, os.getpid(), holds, janitor)


def _leave(maker: int, holds: int, janitor: subprocess.Popen[bytes]) -> None:
    if os.getpid() == maker:
        os.close(holds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            janitor.wait(_WAIT_SECONDS)


def _remove_stale(parent: Path) -> None:
    """Remove the folders of processes of this user that have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            owner = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                groups = os.read(owner, 4096).decode(errors="replace")
                if groups:
                    CgroupParent(Path(groups)).close()
                remove(folder)
            finally:
                os.close(owner)


@dataclass(frozen=True)
class Cgroup:
    """Stands for the cgroup of one sandbox."""

    path: Path

    def pids(self) -> list[int]:
        """Return the ids of all processes in it."""
        return [int(line) for line in read_file(self.path / "cgroup.procs").split()]

    def cpu_seconds(self) -> float | None:
        """Return the processor time of all that ever ran in it."""
        fields = dict(line.split() for line in read_file(self.path / "cpu.stat").splitlines())
        return int(fields["usage_usec"]) / 1e6 if "usage_usec" in fields else None

    def ran_out_of_memory(self) -> bool:
        """Tell whether the kernel killed a process of it for its limit on memory."""
        fields = dict(line.split() for line in read_file(self.path / "memory.events").splitlines())
        return int(fields.get("oom_kill", 0)) > 0

    def kill(self) -> None:
        """Kill every process in it."""
        if not _write(self.path / "cgroup.kill", "1"):
            # Before Linux 5.14.
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is in it and remove it; one that stays is removed when this process ends."""
        until = time.monotonic() + _KILL_SECONDS
        while self.path.exists():
            self.kill()
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            if time.monotonic() > until:
                return
            time.sleep(0.002)


@dataclass(frozen=True)
class CgroupParent:
    """Stands for the cgroup above those of all sandboxes of a process."""

    path: Path

    def make(self) -> None:
        """Make it, with all controllers that it can give to groups of sandboxes.

        Raises:
            OSError: it cannot be made.
        """
        self.path.mkdir()
        for controller in _CONTROLLERS:
            _write(self.path / "cgroup.subtree_control", f"+{controller}")

    def new(self, limits: SandboxLimits) -> Cgroup:
        """Make a group for one sandbox.

        Raises:
            OSError: it cannot be made.
        """
        path = self.path / secrets.token_hex(8)
        path.mkdir()
        # Each where its controller is: without one these files are not there.
        _write(path / "memory.max", str(limits.memory_bytes))
        _write(path / "memory.swap.max", "0")
        _write(path / "memory.oom.group", "1")
        # The limit is overstepped when it is reached, as where processes are counted.
        _write(path / "pids.max", str(limits.processes + 1))
        return Cgroup(path)

    def close(self) -> None:
        """Kill what is left and remove it."""
        with contextlib.suppress(OSError):
            for path in [path for path in self.path.iterdir() if path.is_dir()]:
                Cgroup(path).close()
            self.path.rmdir()


def cgroup_candidates(name: str) -> list[CgroupParent]:
    """Return the groups of this name that could be made, the best first."""
    # One whose children can be limited first; the nearest one otherwise.
    places = sorted(_places(), key=lambda place: not _gives_memory(place))
    return [CgroupParent(place / name) for place in places]


def first_cgroup_made(groups: list[CgroupParent]) -> CgroupParent | None:
    """Make the first that a process of ours can be moved into; None where there is none."""
    for each in groups:
        with contextlib.suppress(OSError):
            each.make()
            if _can_enter(each.path):
                return each
            each.close()
    return None


def _places() -> list[Path]:
    """Return our own group and those above it that we may write to, the nearest first."""
    lines = read_file("/proc/self/cgroup").splitlines()
    own = next((line[3:].strip() for line in lines if line.startswith("0::")), None)
    root = _mount_point()
    if own is None or root is None:
        return []
    places, group = [], Path(os.path.normpath(root / own.lstrip("/")))
    while group == root or root in group.parents:
        if os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK):
            places.append(group)
        limited = any(read_file(group / name).strip() not in ("", "max") for name in ("memory.max", "memory.high"))
        if limited or group == root:
            break
        group = group.parent
    return places


def _gives_memory(path: Path) -> bool:
    return "memory" in read_file(path / "cgroup.subtree_control").split()


def _mount_point() -> Path | None:
    for line in read_file("/proc/self/mounts").splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(where)
    return None


def _can_enter(path: Path) -> bool:
    """Tell whether a process of ours can be moved into a group below ``path``."""
    trial = Cgroup(path / "trial")
    trial.path.mkdir()
    try:
        enter = ["/bin/sh", "-c", 'echo 0 > "$0"', str(trial.path / "cgroup.procs")]
        done = subprocess.run(enter, capture_output=True, check=False)
        return done.returncode == 0 and trial.cpu_seconds() is not None
    finally:
        trial.close()


def _write(path: Path, text: str) -> bool:
    try:
        # No O_CREAT: a controller that is not there has no file.
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True
