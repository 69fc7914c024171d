"""What a sandboxed program may use, and the ``bwrap`` command line that puts it behind the wall.

Of the machine the program sees as little as Python needs: nothing is writable but the named folders, there is no
network, and neither the user's home nor /etc is visible. A launcher inside sets limits and gives up what is left of
privileges.

Run by root, the program gets a user id of its own that exists nowhere else: inside a user namespace it would still be
root to the files it can see, and the kernel does not count root's processes. Run by anyone else, it keeps that user's
id, seen as nobody's, in a user namespace.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from typing_extensions import assert_never

SandboxKind = Literal["bubblewrap", "none"]
Breach = Literal["wall_time", "cpu_time", "memory", "processes", "disk", "output", "idle"]

FOLDER, SCRATCH = "/sandbox", "/tmp"
NOT_STARTED = 125
# The first process inside. bwrap's own would be left to the machine's first process to be waited for. What sh says of
# signals is not the program's.
_FIRST_PROCESS = ["/bin/sh", "-c", 'exec 3>&2 2>/dev/null; (exec "$@" 2>&3 3>&-); exit $?', "sh"]
_NOBODY = 65534
# Ids that systemd's table of uid ranges calls unused.
_UNUSED_IDS = range(1_879_048_192, 2_147_352_576)
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
_LINKED_FROM_ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Limits one sandbox; all but ``file_bytes`` and ``open_files`` hold for its processes together."""

    wall_seconds: float = 10.0
    """Time of one command, or of one cell of an interpreter."""

    cpu_seconds: int = 10
    """Processor time, user and system, of one command or cell; also for how long all of it may sleep at a stretch."""

    memory_bytes: int = 4 * 2**30
    """Resident memory; also the address space of each process."""

    processes: int = 64
    """Processes and threads alive at once, the sandbox's own two or three included."""

    output_bytes: int = 1 << 20
    """What is kept of stdout and stderr together."""

    file_bytes: int = 64 << 20
    """Size of one file."""

    folder_bytes: int = 256 << 20
    """Disk space of the writable folder and /tmp, files that are deleted but still open included."""

    folder_files: int = 4096
    """Files and folders in the writable folder and /tmp."""

    open_files: int = 256
    """Open files of one process."""


def is_walled(kind: SandboxKind) -> bool:
    """Tell whether a program is behind a wall, or only under limits."""
    match kind:
        case "bubblewrap":
            return True
        case "none":
            return False
        case _:
            assert_never(kind)


def environment(*, walled: bool, writable: Mapping[str, Path], extra: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment of the program; nothing is inherited."""
    home, scratch = (inside if walled else str(writable[inside]) for inside in (FOLDER, SCRATCH))
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin")),
        "HOME": home,
        "TMPDIR": scratch,
        "USER": "sandbox",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Each arena reserves 64 MiB of address space, which is limited.
        "MALLOC_ARENA_MAX": "2",
        **one_thread,
        **extra,
    }


def python_paths() -> list[Path]:
    """Return the folders that hold the running Python and its packages, but no editable installs."""
    packages = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    prefixes = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    executable = Path(sys.executable)
    # A virtual environment's python is a link, whose target may be a link in another folder.
    links = [executable.parent.parent]
    while executable.is_symlink():
        executable = Path(os.path.normpath(executable.parent / executable.readlink()))
        links.append(executable.parent.parent)
    found = {path for path in (*packages, *prefixes, *links) if path.is_dir() and not path.is_relative_to("/usr")}
    return sorted(path for path in found if not any(parent in found for parent in path.parents))


def own_user() -> int | None:
    """Return a user id for one sandbox where we are root and may take one, otherwise None."""
    if os.geteuid() != 0:
        return None
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    mapped = [range(first, first + count) for first, _, count in ranges]
    if any(_UNUSED_IDS.start in ids and _UNUSED_IDS[-1] in ids for ids in mapped):
        return secrets.choice(_UNUSED_IDS)
    return _NOBODY if any(_NOBODY in ids for ids in mapped) else None


def give_to(user: int, folders: Iterable[Path]) -> None:
    """Make ``user`` the owner of the folders with all that is in them, never following a link."""
    command = ["chown", "-R", "-h", "-P", f"{user}:{user}", "--", *map(str, folders)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(done.stderr.strip())


def launcher(limits: SandboxLimits, *, count_processes: bool) -> list[str]:
    """Return ``prlimit`` with the limits that the kernel keeps for each process."""
    wanted = {
        "as": (resource.RLIMIT_AS, limits.memory_bytes),
        "fsize": (resource.RLIMIT_FSIZE, limits.file_bytes),
        "nofile": (resource.RLIMIT_NOFILE, limits.open_files),
        "memlock": (resource.RLIMIT_MEMLOCK, 1 << 16),
        "msgqueue": (resource.RLIMIT_MSGQUEUE, 0),
        # Timers and signals that wait, over all processes of a user.
        "sigpending": (resource.RLIMIT_SIGPENDING, 1024),
        "rtprio": (resource.RLIMIT_RTPRIO, 0),
        "nice": (resource.RLIMIT_NICE, 0),
    }
    if count_processes:
        wanted["nproc"] = (resource.RLIMIT_NPROC, limits.processes)
    return ["prlimit", *(f"--{name}={_allowed(*limit)}" for name, limit in wanted.items()), "--"]


def _allowed(which: int, value: int) -> int:
    """Return a limit that may be set: nobody but root may raise one that is lower already."""
    hard = resource.getrlimit(which)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def starter(argv: Sequence[str], group: Path | None) -> list[str]:
    """Return a command that runs ``argv`` as what the kernel kills first when memory runs out, without core dumps.

    A limit of 1 on core dumps also keeps the machine's handler of them from being started, which a limit of 0 does not
    (core(5)).

    Args:
        group: cgroup to enter first; it ends with 125 if it cannot.
    """
    script = 'echo 1000 > /proc/self/oom_score_adj; exec prlimit --core=1 -- "$@"'
    if group is not None:
        script = f'echo 0 > "$0" || exit {NOT_STARTED}; {script}'
    return ["/bin/sh", "-c", script, str(group / "cgroup.procs") if group is not None else "sh", *argv]


def bubblewrap(
    argv: Sequence[str],
    *,
    writable: Mapping[str, Path],
    read_only: Sequence[Path],
    limits: SandboxLimits,
    user: int | None,
    status_fd: int,
    seccomp_fd: int | None,
) -> list[str]:
    """Return the arguments that run ``argv`` in a sandbox, in its folder ``/sandbox``.

    Args:
        writable: folders of this machine by their path inside; ``/sandbox`` and ``/tmp`` must be among them.
        read_only: further paths visible under their own names; those that do not exist are skipped.
        user: id to take inside, None for a user namespace with our own.
        status_fd: where bubblewrap writes the exit code, unless it could not start the program.
        seccomp_fd: where bubblewrap reads the filter.
    """
    command = [shutil.which("bwrap") or "bwrap", *_NAMESPACES, "--new-session", "--die-with-parent", "--as-pid-1"]
    command += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    command += _mounts(writable, read_only)
    command += ["--remount-ro", "/dev", "--remount-ro", "/"]
    command += ["--chdir", "/", "--json-status-fd", str(status_fd)]
    if seccomp_fd is not None:
        command += ["--seccomp", str(seccomp_fd)]
    if user is None:
        command += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--", *_FIRST_PROCESS]
    else:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            command += ["--cap-add", capability]
        # The first process stays root's: bwrap, without privileges, could not take it with itself otherwise.
        command += ["--", *_FIRST_PROCESS, "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        command += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
    command += launcher(limits, count_processes=user is not None or _namespaces_count_processes())
    # Only now: bubblewrap, run by root, may no longer enter another user's folder.
    return [*command, "env", "-C", FOLDER, "--", *argv]


def _mounts(writable: Mapping[str, Path], read_only: Sequence[Path]) -> list[str]:
    """Return the arguments that make files visible."""
    command = []
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    # Mapped, /dev/zero is shared memory that no process is seen to use; /dev/full reads alike and cannot be mapped.
    command += ["--proc", "/proc", "--dev", "/dev", "--dev-bind", "/dev/full", "/dev/zero"]
    for inside, folder in writable.items():
        command += ["--bind", str(folder), inside]
    # multiprocessing makes its semaphores there; a file system in memory would have no limit of size.
    command += ["--bind", str(writable[SCRATCH]), "/dev/shm"]
    for readable in (*map(Path, _LINKED_FROM_ETC), *read_only):
        # bubblewrap itself would make the folders above for its own user alone.
        for parent in reversed(readable.parents[:-1]):
            command += ["--dir", str(parent)]
        command += ["--ro-bind-try", str(readable), str(readable)]
    return command


def _namespaces_count_processes() -> bool:
    """Tell whether RLIMIT_NPROC counts the namespace's processes; before Linux 5.14 it counts all of a user's."""
    major, minor = platform.release().split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)
