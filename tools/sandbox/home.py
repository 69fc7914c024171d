"""Where this process keeps the folders of its sandboxes, and who removes them when it is killed.

Goes out: new folders. All of them lie in one, which a shell removes, with whatever still runs in it, as soon as this
process has ended, however it ended: the shell waits for the end of a pipe that nobody else writes to. Where the shell
was killed as well, the next process that makes sandboxes removes the folder, whose lock nobody holds any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reflectron.tools.sandbox import cgroup

_PREFIX, _OWNER = "reflectron-", ".owner"
_WAIT_SECONDS = 30.0
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
    """The one folder of a process."""

    folder: Path
    groups: cgroup.Groups | None
    """Cgroups of its sandboxes, where there can be any."""


_lock = threading.Lock()
_homes: dict[tuple[int, str], Home] = {}


def home() -> Home:
    """The folder of this process, made when it is first asked for; a forked process has its own."""
    key = os.getpid(), tempfile.gettempdir()
    with _lock:
        if key not in _homes:
            _homes[key] = _make()
        return _homes[key]


@contextlib.contextmanager
def sandbox_folder() -> Iterator[Path]:
    """A new folder that is removed at the end, however deep and unreadable what a program left there is."""
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
    candidates = cgroup.candidates(folder.name)
    # First who removes, then what is to be removed.
    _start_janitor(folder, candidates)
    folder.mkdir(mode=0o700)
    # Names inside cannot be listed, and each folder inside is closed to others.
    folder.chmod(0o711)
    groups = cgroup.first_made(candidates)
    owner = os.open(folder / f"{_OWNER}.new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.write(owner, str(groups.path if groups else "").encode())
    fcntl.flock(owner, fcntl.LOCK_EX)
    # Before this rename nobody takes the folder for a stale one; the lock lives as long as this process.
    os.rename(folder / f"{_OWNER}.new", folder / _OWNER)
    return Home(folder, groups)


def _start_janitor(folder: Path, candidates: list[cgroup.Groups]) -> None:
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
                    cgroup.Groups(Path(groups)).close()
                remove(folder)
            finally:
                os.close(owner)
