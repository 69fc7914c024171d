"""A process under watch: a thread of its own starts it, compares its whole tree with the limits, and kills the tree.

The kernel keeps limits for each process; those on all processes of a sandbox together are kept here, every 50 ms, with
exact counts where there is a cgroup. After the end, the breached limit is known.

The thread lives as long as the process, because ``bwrap --die-with-parent`` takes the thread that started it for the
parent: started from a worker thread that ends, a sandbox would die with it (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from reflectron.tools.sandbox import usage
from reflectron.tools.sandbox.home import Cgroup
from reflectron.tools.sandbox.wall import Breach, SandboxLimits

_INTERVAL_SECONDS = 0.05
# What takes long to read is read every so many times.
_SELDOM = 4
# For so long all that can be seen may be a moment's: descriptors on their way, a process that starts, one that stopped.
_PATIENCE_SECONDS = 1.0
# bwrap ends a moment after what it started, and must be the one to say so.
_WALL_ENDS_SECONDS = 5.0
# bwrap outside and bwrap inside, where it is the first process; then the program.
_OF_THE_WALL = 2


class WatchedProcess:
    """Runs and watches a process; ``stop`` or the end of the program that started it kills all of its tree.

    Args:
        folders: whose size is limited.
        walled: the command is bwrap, with a network and a first process of its own.
        group: cgroup that the command enters; it is removed at the end.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        limits: SandboxLimits,
        folders: Sequence[Path],
        environment: Mapping[str, str],
        cwd: Path,
        stdin: int,
        stdout: int,
        stderr: int,
        pass_fds: Sequence[int] = (),
        walled: bool = False,
        group: Cgroup | None = None,
    ) -> None:
        self.breach: Breach | None = None
        self._limits, self._folders, self._walled, self._group = limits, folders, walled, group
        self._lock = threading.Lock()
        self._started, self._stopping, self._reaped = threading.Event(), threading.Event(), threading.Event()
        self._failure: OSError | None = None
        self._cpu_before = self._cpu_now = 0.0
        self._cpu, self._measuring = usage.ProcessorTime(), threading.Lock()
        self._rounds = 0
        # When it was first seen so, without a break since, and when it was last looked at.
        self._stopped_since = self._asleep_since = self._hidden_since = math.inf
        self._looked = 0.0

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                env=dict(environment),
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                start_new_session=True,
            )

        self._process: subprocess.Popen[bytes]
        threading.Thread(target=self._run, args=(start,), name="sandbox watch", daemon=True).start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def ended(self) -> bool:
        """Tell whether the process itself has ended; others of its tree may live until ``stop``."""
        if self._reaped.is_set():
            return True
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def wait(self, deadline: float) -> bool:
        """Tell whether the process ended before ``deadline`` of ``time.monotonic``."""
        while not self.ended():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def stands_still(self) -> bool:
        """Tell whether its program is stopped, or all of it has slept for longer than it may compute."""
        asleep = self._looked - self._asleep_since
        return self.stopped() or asleep > max(self._limits.cpu_seconds, _PATIENCE_SECONDS)

    def stopped(self) -> bool:
        """Tell whether its program has been stopped by a signal, and not for a moment only."""
        return self._looked - self._stopped_since > _PATIENCE_SECONDS

    def renew_cpu_time(self) -> None:
        """Count processor time, and time asleep, from here on."""
        self._measure()
        self._cpu_before = self._cpu_now
        self._stopped_since = self._asleep_since = math.inf

    def forgive_cpu_time(self) -> None:
        """Count no processor time until `renew_cpu_time`."""
        self._cpu_before = math.inf

    def stop(self, breach: Breach | None = None) -> int:
        """Kill the tree, wait for its end and return the exit code, negative for a signal.

        Args:
            breach: why, unless another limit was overstepped before.
        """
        with self._lock:
            self.breach = self.breach or breach
        self._stopping.set()
        self._reaped.wait()
        return self._process.returncode

    def _run(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        try:
            self._process = start()
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        try:
            while not self._stopping.wait(_INTERVAL_SECONDS) and not self.ended():
                breach = self._overstepped()
                with self._lock:
                    self.breach = self.breach or breach
                if breach is not None:
                    break
        finally:
            # Until the process is reaped, its id names no other.
            self._kill()
            self._process.wait()
            self._reaped.set()

    def _measure(self) -> list[usage.Process]:
        """Return the processes as they are now, and renew the times that depend on them."""
        with self._measuring:
            pids = usage.process_tree(self._process.pid)
            if self._group is not None:
                pids += sorted(set(self._group.pids()) - set(pids))
            processes = [process for process in map(usage.process, pids) if process is not None]
            exact = self._group.cpu_seconds() if self._group is not None else None
            used = exact if exact is not None else self._cpu.update(processes)
            program = processes[_OF_THE_WALL if self._walled else 0 :]
            self._looked = time.monotonic()
            stopped = bool(program) and program[0].state in "Tt"
            self._stopped_since = min(self._stopped_since, self._looked) if stopped else math.inf
            awake = not program or used > self._cpu_now + 1e-3 or any(process.state in "RD" for process in program)
            self._asleep_since = math.inf if awake else min(self._asleep_since, self._looked)
            self._cpu_now = max(self._cpu_now, used)
            return processes

    def _overstepped(self) -> Breach | None:
        limits, processes = self._limits, self._measure()
        pids = [process.pid for process in processes]
        if sum(process.threads for process in processes) > limits.processes:
            return "processes"
        if self._memory_is_overstepped(processes):
            return "memory"
        if self._cpu_now - self._cpu_before > limits.cpu_seconds:
            return "cpu_time"
        sizes = [usage.folder_usage(folder, limits.folder_files) for folder in self._folders]
        if sum(count for _, count in sizes) > limits.folder_files:
            return "disk"
        self._rounds += 1
        if self._rounds % _SELDOM or not self._walled:
            deleted = usage.deleted_bytes(pids)
        else:
            program = pids[_OF_THE_WALL:]
            deleted = usage.mapped_deleted_bytes(program)
            now = time.monotonic()
            self._hidden_since = min(self._hidden_since, now) if usage.hides(program) else math.inf
            if now - self._hidden_since > _PATIENCE_SECONDS:
                return "disk"
        return "disk" if sum(size for size, _ in sizes) + deleted > limits.folder_bytes else None

    def _memory_is_overstepped(self, processes: Sequence[usage.Process]) -> bool:
        if self._group is not None and self._group.ran_out_of_memory():
            return True
        pids = [process.pid for process in processes]
        more = usage.swapped_bytes(pids)
        if self._walled and len(pids) > _OF_THE_WALL:
            more += usage.socket_bytes(pids[_OF_THE_WALL])
        resident = sum(process.resident_bytes for process in processes)
        # Shared pages first count for each process; only a tree that seems too large is measured exactly.
        most = self._limits.memory_bytes
        return resident + more > most and usage.proportional_bytes(processes) + more > most

    def _kill(self) -> None:
        """Kill all of it, and leave no process to be waited for by the machine's first one."""
        tree = usage.process_tree(self._process.pid)
        if self._walled and len(tree) > 1:
            # The first process of a process namespace takes all others with it, wherever they hide; bwrap outside waits
            # for it and ends.
            _kill(tree[1])
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_WALL_ENDS_SECONDS)
                self._close_group()
                return
        for pid in [*tree[1:], self._process.pid]:
            _kill(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._close_group()

    def _close_group(self) -> None:
        if self._group is None:
            return
        # A limit may have been overstepped since it was last compared.
        if self._group.ran_out_of_memory():
            with self._lock:
                self.breach = self.breach or "memory"
        self._group.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
