"""What a sandbox may use, and the names of what it can overstep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SandboxKind = Literal["bubblewrap", "none"]
Breach = Literal["wall_time", "cpu_time", "memory", "processes", "disk", "output", "idle"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one sandbox; all but ``file_bytes`` and ``open_files`` hold for its processes together."""

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
