"""What a tree of processes and a folder use right now, read from /proc and the file system.

Processes that end while they are read are skipped; the code that is measured can neither hide from this nor make it
fail.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# bytes of one block of st_blocks, whatever the file system's own block is
_BLOCK_BYTES = 512
_DEEPEST = 64
# What a Python kernel and its like use; with buffers of net.core.wmem_default each.
_FREE_SOCKETS = 64
# Some thousand mappings; no sane program has more.
_MAPS_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Process:
    """Holds what /proc/PID/stat says of a process; times in clock ticks."""

    pid: int
    started: int
    state: str
    """A letter: R runs or would, D waits for a disk, S sleeps, T and t are stopped, Z has ended."""
    own_ticks: int
    waited_ticks: int
    """The processor time of children that it waited for."""
    threads: int
    resident_bytes: int


def process_tree(root: int) -> list[int]:
    """Return ``root`` and its descendants; orphans stay among them, adopted by the sandbox's first process."""
    found, frontier = [root], [root]
    while frontier:
        born = children(frontier.pop())
        found += born
        frontier += born
    return found


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started, or adopted as orphans, and that are not reaped."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for task in tasks for child in read_file(f"/proc/{pid}/task/{task}/children").split()]


def process(pid: int) -> Process | None:
    """Return a process as it is now, None if it has ended."""
    # The name in parentheses may hold anything; fields are counted after it. proc(5): 3, 14-17, 20, 22 and 24.
    fields = read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) <= 21:
        return None
    own, waited = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
    return Process(pid, int(fields[19]), fields[0], own, waited, int(fields[17]), int(fields[21]) * _PAGE_BYTES)


class ProcessorTime:
    """Counts the processor time of a tree, including that of ended processes that nobody waited for.

    What a process uses after it was last seen is lost if nobody waits for it.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Process] = {}
        self._lost_ticks = 0

    def update(self, processes: Iterable[Process]) -> float:
        """Return the seconds until now, given all processes of the tree."""
        now = {(process.pid, process.started): process for process in processes}
        for key in self._seen.keys() - now.keys():
            # The list of a process's children is not complete while some of them end.
            still = process(key[0])
            if still is not None and still.started == key[1]:
                now[key] = still
        gone = sum(self._seen[key].own_ticks + self._seen[key].waited_ticks for key in self._seen.keys() - now.keys())
        reported = sum(
            process.waited_ticks - (self._seen[key].waited_ticks if key in self._seen else 0)
            for key, process in now.items()
        )
        self._lost_ticks += max(0, gone - reported)
        self._seen = now
        ticks = sum(process.own_ticks + process.waited_ticks for process in now.values())
        return (ticks + self._lost_ticks) / _TICKS_PER_SECOND


def proportional_bytes(processes: Iterable[Process]) -> int:
    """Return resident memory with each shared page counted once: exact, but slow to read."""
    total = 0
    for process in processes:
        shares = [
            line.split()[1]
            for line in read_file(f"/proc/{process.pid}/smaps_rollup").splitlines()
            if line.startswith("Pss:")
        ]
        # A process may make itself unreadable to others of its user; its size in /proc/PID/stat it cannot hide.
        total += int(shares[0]) * 1024 if shares else process.resident_bytes
    return total


def swapped_bytes(pids: Iterable[int]) -> int:
    """Return the memory that was swapped out, where the machine does that."""
    if read_file("/proc/swaps").count("\n") < 2:
        return 0
    lines = [line for pid in pids for line in read_file(f"/proc/{pid}/status").splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmSwap:")) * 1024


def socket_bytes(pid: int) -> int:
    """Return the most that socket buffers can hold in the network of ``pid``, those passed between processes included.

    A unix socket tells nobody how much waits in it, so that each of them beyond the first few counts as full.
    """
    counts = read_file(f"/proc/{pid}/net/sockstat") + read_file(f"/proc/{pid}/net/sockstat6")
    used = {line.split()[0]: int(line.split()[2]) for line in counts.splitlines() if len(line.split()) > 2}
    size = max(0, used.get("sockets:", 0) - _FREE_SOCKETS) * int(read_file("/proc/sys/net/core/wmem_default") or 0)
    for protocol in ("TCP", "TCP6", "UDP", "UDP6"):
        if used.get(f"{protocol}:", 0):
            for line in read_file(f"/proc/{pid}/net/{protocol.lower()}").splitlines()[1:]:
                sent, _, received = line.split()[4].partition(":")
                size += 2 * (int(sent, 16) + int(received, 16))
    return size


def deleted_bytes(pids: Iterable[int]) -> int:
    """Return the space of deleted files that a process holds open."""
    return sum(_open_deleted(pids).values())


def mapped_deleted_bytes(pids: Sequence[int]) -> int:
    """Return the space of deleted files that a process has mapped or holds open.

    Only root can ask for the size of such a file; for anyone else it reaches up to the last byte that is mapped.
    """
    held = _open_deleted(pids)
    sizes: dict[tuple[int, int], int] = {}
    for pid in pids:
        for line in read_file(f"/proc/{pid}/maps", _MAPS_CHARACTERS).splitlines():
            if not line.endswith(" (deleted)"):
                continue
            where, _, offset, device, inode = line.split(maxsplit=5)[:5]
            first, _, last = where.partition("-")
            try:
                status = os.stat(f"/proc/{pid}/map_files/{where}")
            except OSError:
                major, _, minor = device.partition(":")
                key = os.makedev(int(major, 16), int(minor, 16)), int(inode)
                sizes[key] = max(sizes.get(key, 0), int(offset, 16) + int(last, 16) - int(first, 16))
            else:
                sizes[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK_BYTES
    return sum({**sizes, **held}.values())


def hides(pids: Iterable[int]) -> bool:
    """Tell whether one of them holds what cannot be counted.

    That is: files that are on their way to another process, which are in no process's table; a table that cannot be
    read; a list of mapped files without end.
    """
    for pid in pids:
        if len(read_file(f"/proc/{pid}/maps", _MAPS_CHARACTERS)) >= _MAPS_CHARACTERS:
            return True
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except PermissionError:
            return True
        except OSError:
            continue
        for descriptor in descriptors:
            if stat.S_ISSOCK(_mode(f"/proc/{pid}/fd/{descriptor}")):
                said = read_file(f"/proc/{pid}/fdinfo/{descriptor}").partition("scm_fds:")[2].split()
                if said and int(said[0]):
                    return True
    return False


def _open_deleted(pids: Iterable[int]) -> dict[tuple[int, int], int]:
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
    return sizes


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def folder_usage(folder: Path, most_files: int) -> tuple[int, int]:
    """Return bytes and entries in ``folder``.

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


def read_file(path: str | Path, most: int = -1) -> str:
    """Return the first ``most`` characters of a file of the kernel's, nothing where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(most)
    except OSError:
        return ""
