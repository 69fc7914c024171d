"""One run in a folder, started as often as needed: as the command, or as ranks forked from this process.

A rank is a process of its own in either case and does what a launcher's rank does. Forking saves it the seconds of
importing, so that a drill spends its time in loading, steps and saves. This process must have no threads and no process
groups.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from reflectron.engine.parallel.launch import SUPERVISED, ProcessPlace, die_with, free_port
from reflectron.tools import cli

RESUMED = re.compile(r"^resuming after step (\d+) ", re.MULTILINE)
"""What a run that found a checkpoint prints; a drill that waits for it in vain fails, so it cannot go stale."""
# Nothing of a drilled run takes so long; it only ends a drill that would hang.
_LIMIT_S = 600.0
_POLL_S = 0.001
_GRACE_S = 5.0
_OF_THE_MACHINE = ("step_time_ms", "data_wait_ms", "tokens_per_second", "peak_memory_gib")


@dataclass(frozen=True)
class Trap:
    """Kills the process that sets it at an operation on a file, before it is done."""

    name: str
    """The moment, for a user."""
    event: str
    """Python's audit event: ``open``, ``os.rename``, ``os.remove``, ``os.rmdir`` or ``os.mkdir``."""
    path: str
    """What the first path of the event matches somewhere."""
    count: int = 1
    """Which occurrence."""

    def set(self) -> None:
        """Set the trap, from now on."""
        pattern, seen = re.compile(self.path), [0]

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == self.event and isinstance(args[0], (str, os.PathLike)) and pattern.search(os.fspath(args[0])):
                seen[0] += 1
                if seen[0] == self.count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


class DrilledRun:
    """A run in ``folder``.

    Args:
        folder: made here.
        config: YAML file.
        overrides: as on the command line.
        world_size: ranks.
    """

    def __init__(self, folder: Path, config: str, overrides: list[str], world_size: int) -> None:
        folder.mkdir()
        self.folder, self.checkpoints, self.world_size = folder, folder / "out" / "checkpoints", world_size
        self.words = ["train", config, *overrides, f"output_dir={folder / 'out'}"]
        self.starts = 0

    def start(self, *, cold: bool = False, trap: Trap | None = None) -> Life:
        """Start the ranks: ``cold`` by the command, else forked, the main rank with ``trap``."""
        self.starts += 1
        output = self.folder / f"start_{self.starts}.log"
        return self._start_command(output) if cold else self._fork_ranks(output, trap)

    def _start_command(self, output: Path) -> Life:
        parent, words = os.getpid(), [sys.executable, "-m", "reflectron.tools.cli", *self.words]
        with output.open("wb") as stream:
            command = psutil.Popen(
                words,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=lambda: die_with(parent),
            )
        return Life(self, output, command, [])

    def _fork_ranks(self, output: Path, trap: Trap | None) -> Life:
        port, parent = free_port(), os.getpid()
        ranks = []
        for rank in range(self.world_size):
            place = ProcessPlace(
                rank=rank, world_size=self.world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
            )
            pid = os.fork()
            if pid == 0:
                die_with(parent)
                if trap is not None and rank == 0:
                    trap.set()
                self._be_rank(place, output)
            ranks.append(psutil.Process(pid))
        return Life(self, output, None, ranks, trapped=trap is not None)

    def _be_rank(self, place: ProcessPlace, output: Path) -> None:
        """In a new process: run as this rank to its end."""
        code = 1
        try:
            path = output if place.rank == 0 else output.with_suffix(f".rank_{place.rank}")
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
            os.environ |= {**place.variables(), SUPERVISED: "1"}
            code = cli.main(self.words)
        except BaseException:
            traceback.print_exc()
        finally:
            # Nothing of the drill's own must run in here.
            os._exit(code)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl`` without times and memory; a last line may be cut short."""
        try:
            lines = (self.folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{key: value for key, value in row.items() if key not in _OF_THE_MACHINE} for row in rows]

    def metrics_inode(self) -> int:
        """Return which file ``metrics.jsonl`` is; 0 when there is none."""
        try:
            return (self.folder / "out" / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return 0

    def partial_folders(self) -> set[tuple[str, int, int]]:
        """Return checkpoints that are being written, or were when a kill came; those change no more."""
        found = set()
        for path in self.checkpoints.glob("step_*.partial"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
        return found

    def weights(self) -> bytes:
        """Return the exported weights."""
        return b"".join(path.read_bytes() for path in sorted((self.folder / "out" / "export").glob("*.safetensors")))


@dataclass
class Life:
    """The processes of one start."""

    run: DrilledRun
    output: Path
    """What the main rank and the command print."""
    command: psutil.Process | None
    """None for forked ranks."""
    ranks: list[psutil.Process]
    trapped: bool = False
    """The main rank has set a trap for itself."""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._old_metrics, self._kept_rows = self.run.metrics_inode(), -1
        self._old_partials = self.run.partial_folders()

    @property
    def processes(self) -> list[psutil.Process]:
        """All that were started and known so far."""
        return self.ranks if self.command is None else [self.command, *self.ranks]

    def find_ranks(self) -> None:
        """Learn the ranks of the command, once all of them run."""
        if self.command is not None and not self.ranks and _alive(self.command):
            children = [child for child in self.command.children() if _alive(child) and "RANK" in child.environ()]
            if len(children) == self.run.world_size:
                self.ranks = sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def new_rows(self) -> int:
        """Return the steps since this start, or fewer; -1 before the first."""
        # A start replaces the file, without the rows that it will write again.
        if self.run.metrics_inode() in (self._old_metrics, 0):
            return -1
        rows = len(self.run.rows())
        if self._kept_rows < 0:
            self._kept_rows = rows
        return rows - self._kept_rows

    def is_saving(self) -> bool:
        """Whether it writes a checkpoint."""
        return bool(self.run.partial_folders() - self._old_partials)

    def text(self) -> str:
        """Return what it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def tail(self) -> str:
        """Return the last line that it printed."""
        return (self.text().splitlines() or ["nothing was printed"])[-1]

    def running(self) -> bool:
        """Whether no process has ended; raises TimeoutError after a time that nothing takes."""
        if time.monotonic() - self.started > _LIMIT_S:
            raise TimeoutError(f"{self.output}: still running after {_LIMIT_S:.0f} s")
        return all(map(_alive, self.processes))

    def wait(self) -> int:
        """Wait for all; return the exit code of the command, or of the first forked rank that has one other than 0."""
        while any(map(_alive, self.processes)):
            self.running()
            if self.command is None and any(rank.wait() for rank in self.ranks if not _alive(rank)):
                self._end_survivors()
            time.sleep(_POLL_S)
        own = [self.command] if self.command is not None else self.ranks
        codes = [process.wait() or 0 for process in own]
        return next((code for code in codes if code), 0)

    def killed_by_trap(self) -> bool:
        """Whether the main rank goes by SIGKILL, now that the first one has gone.

        Others may notice its end before the kernel has taken it down.
        """
        end = time.monotonic() + _GRACE_S
        while _alive(self.ranks[0]) and time.monotonic() < end:
            time.sleep(_POLL_S)
        return not _alive(self.ranks[0]) and self.ranks[0].wait() == -signal.SIGKILL

    def kill(self, victims: list[psutil.Process]) -> None:
        """Send SIGKILL, then do what a launcher does with the ranks that are left; returns when all are gone."""
        for victim in filter(_alive, victims):
            victim.send_signal(signal.SIGKILL)
        if self.command is None:
            self._end_survivors()
        self.wait()

    def _end_survivors(self) -> None:
        for survivor in filter(_alive, self.ranks):
            survivor.terminate()
        end = time.monotonic() + _GRACE_S
        while any(map(_alive, self.ranks)) and time.monotonic() < end:
            time.sleep(_POLL_S)
        for survivor in filter(_alive, self.ranks):
            survivor.kill()

    def pick(self, generator: random.Random) -> tuple[str, list[psutil.Process]]:
        """Choose some of the processes; return them, in words too."""
        choices = [(f"rank {rank}", [process]) for rank, process in enumerate(self.ranks)]
        choices.append(("all ranks", list(self.ranks)))
        if self.command is not None:
            # As often as all else, for it lives in few of the starts.
            choices += [("the command", [self.command])] * len(choices)
        return generator.choice(choices)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
