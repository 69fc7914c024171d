"""What a tree of processes and a folder use right now, read from /proc and the file system.

Comes in: the id of the tree's first process, or a folder. Goes out: numbers. Processes that end while they are read
are left out; the code that is measured can neither hide from this nor make it fail.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# bytes of one block of st_blocks, whatever the file system's own block is
_BLOCK_BYTES = 512
_DEEPEST = 64


@dataclass(frozen=True)
class TreeUsage:
    """Use of a process and all its descendants together."""

    resident_bytes: int
    cpu_seconds: float
    """Of living processes and of those they have waited for."""

    tasks: int
    """Threads, each process having at least one."""


def process_tree(root: int) -> list[int]:
    """``root`` and its descendants. An orphan's new parent is the sandbox's first process, so that it stays in."""
    found, frontier = [root], [root]
    while frontier:
        born = children(frontier.pop())
        found += born
        frontier += born
    return found


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started, or taken in as orphans, and that are not reaped."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]


def tree_usage(pids: Iterable[int]) -> TreeUsage:
    """Use of the processes ``pids``; shared pages count for each of them."""
    resident = ticks = tasks = 0
    for pid in pids:
        # The name in parentheses may hold anything; fields are counted after it. proc(5): 14-17, 20 and 24.
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if len(fields) > 21:
            ticks += sum(map(int, fields[11:15]))
            tasks += int(fields[17])
            resident += int(fields[21]) * _PAGE_BYTES
    return TreeUsage(resident, ticks / _TICKS_PER_SECOND, tasks)


def proportional_bytes(pids: Iterable[int]) -> int:
    """Resident memory with each shared page counted once: exact, but slow to read."""
    total = 0
    for pid in pids:
        shares = [
            line.split()[1] for line in _read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")
        ]
        # A process may make itself unreadable to others of its user; its size in /proc/PID/stat it cannot hide.
        total += int(shares[0]) * 1024 if shares else tree_usage([pid]).resident_bytes
    return total


def deleted_bytes(pids: Iterable[int]) -> int:
    """Space of files that no folder lists any more, but that a process holds open."""
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                status = os.stat(f"/proc/{pid}/fd/{descriptor}")
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                sizes[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK_BYTES
    return sum(sizes.values())


def folder_usage(folder: Path, most_files: int) -> tuple[int, int]:
    """Bytes and entries in ``folder``.

    Counting ends above ``most_files``. A folder 64 levels down or one that cannot be read, where anything could hide,
    counts as above.
    """
    size = count = 0
    frontier = [(str(folder), 0)]
    while frontier:
        path, depth = frontier.pop()
        if depth > _DEEPEST:
            return size, most_files + 1
        try:
            entries = list(_entries(path, most_files))
        except PermissionError:
            return size, most_files + 1
        except OSError:
            continue
        for entry in entries:
            count += 1
            try:
                size += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                if entry.is_dir(follow_symlinks=False):
                    frontier.append((entry.path, depth + 1))
            except OSError:
                continue
        if count > most_files:
            break
    return size, count


def _entries(path: str, most: int) -> Iterable[os.DirEntry[str]]:
    with os.scandir(path) as found:
        for number, entry in enumerate(found):
            if number > most:
                return
            yield entry


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
