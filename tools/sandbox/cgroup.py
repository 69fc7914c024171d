"""A cgroup (version 2) for each sandbox, where this process may make some.

Comes in: a name and limits. Goes out: a group that knows all of a sandbox's processes and their processor time exactly,
also of those that nobody waited for, and kills them at once. Where the memory controller is delegated as well, the
kernel itself keeps the limits on memory and processes, and counts what belongs to no process.

A place is one of our own group and those above it that we may write to, as long as no limit on memory stands between:
a sandbox must not leave the limit that its starter was put under.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.sandbox.limits import Limits

_CONTROLLERS = ("memory", "pids")
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Group:
    """The cgroup of one sandbox."""

    path: Path

    def pids(self) -> list[int]:
        """All processes in it."""
        return [int(line) for line in _read(self.path / "cgroup.procs").split()]

    def cpu_seconds(self) -> float | None:
        """Processor time of all that ever ran in it."""
        fields = dict(line.split() for line in _read(self.path / "cpu.stat").splitlines())
        return int(fields["usage_usec"]) / 1e6 if "usage_usec" in fields else None

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed a process of it for its limit on memory."""
        fields = dict(line.split() for line in _read(self.path / "memory.events").splitlines())
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
class Groups:
    """The cgroup above those of all sandboxes of a process."""

    path: Path

    def make(self) -> None:
        """Make it, with all controllers that it can give to groups of sandboxes.

        Raises:
            OSError: it cannot be made.
        """
        self.path.mkdir()
        for controller in _CONTROLLERS:
            _write(self.path / "cgroup.subtree_control", f"+{controller}")

    def new(self, name: str, limits: Limits) -> Group:
        """A group for one sandbox.

        Raises:
            OSError: it cannot be made.
        """
        path = self.path / name
        path.mkdir()
        # Each where its controller is: without one these files are not there.
        _write(path / "memory.max", str(limits.memory_bytes))
        _write(path / "memory.swap.max", "0")
        _write(path / "memory.oom.group", "1")
        # The limit is overstepped when it is reached, as where processes are counted.
        _write(path / "pids.max", str(limits.processes + 1))
        return Group(path)

    def close(self) -> None:
        """Kill what is left and remove it."""
        with contextlib.suppress(OSError):
            for path in [path for path in self.path.iterdir() if path.is_dir()]:
                Group(path).close()
            self.path.rmdir()


def candidates(name: str) -> list[Groups]:
    """Groups of this name that could be made, the best first."""
    # One whose children can be limited first; the nearest one otherwise.
    places = sorted(_places(), key=lambda place: not _gives_memory(place))
    return [Groups(place / name) for place in places]


def first_made(groups: list[Groups]) -> Groups | None:
    """The first that can be made and that a process of ours can be moved into; None where there is none."""
    for each in groups:
        with contextlib.suppress(OSError):
            each.make()
            if _can_enter(each.path):
                return each
            each.close()
    return None


def _places() -> list[Path]:
    """Our own group and those above it that we may write to, the nearest first."""
    own = next((line[3:].strip() for line in _read(Path("/proc/self/cgroup")).splitlines() if line[:3] == "0::"), None)
    root = _mount_point()
    if own is None or root is None:
        return []
    places, group = [], Path(os.path.normpath(root / own.lstrip("/")))
    while group == root or root in group.parents:
        if os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK):
            places.append(group)
        limited = any(_read(group / name).strip() not in ("", "max") for name in ("memory.max", "memory.high"))
        if limited or group == root:
            break
        group = group.parent
    return places


def _gives_memory(path: Path) -> bool:
    return "memory" in _read(path / "cgroup.subtree_control").split()


def _mount_point() -> Path | None:
    for line in _read(Path("/proc/self/mounts")).splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(where)
    return None


def _can_enter(path: Path) -> bool:
    """Whether a process of ours can be moved into a group below ``path``."""
    trial = Group(path / "trial")
    trial.path.mkdir()
    try:
        enter = ["/bin/sh", "-c", 'echo 0 > "$0"', str(trial.path / "cgroup.procs")]
        done = subprocess.run(enter, capture_output=True, check=False)
        return done.returncode == 0 and trial.cpu_seconds() is not None
    finally:
        trial.close()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
