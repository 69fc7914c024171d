"""Python interpreters behind the wall whose variables live from cell to cell.

Every cell of an `Interpreter` ends in an `Execution`, whatever its code does; a kernel that was lost is replaced when
the next cell arrives. An `InterpreterPool` hands out interpreters that nothing has run in and that have already
started. A `Kernel` is spoken to by Jupyter's messages through unix sockets in a bound folder; when its time runs out it
is first interrupted by a message, for a signal would kill the wall and not the code, and then killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jupyter_client.connect import KernelConnectionInfo
from typing_extensions import assert_never

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.channels import Cell, Channels, plain_text
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.sandboxed import Sandboxed
from reflectron.tools.sandbox.wall import Breach, SandboxKind, SandboxLimits

CellStatus = Literal["ok", "error", "died"] | Breach

_CHANNELS = "/kernel"
_START_SECONDS = 120.0
_INTERRUPT_SECONDS = 2.0
_LOOK_SECONDS = 0.5
# Generous, for a loaded machine: all connections of a kernel that ends are cut at once.
_CUT_SECONDS, _DEATH_SECONDS = 1.0, 10.0
_READ_BYTES = 1 << 16
# "ready" is written when all sockets listen; from there on the kernel takes the place of file descriptor 1.
_PROGRAM = """
import os, sys
ready = os.dup(1)
import zmq
from ipykernel.kernelapp import IPKernelApp

class App(IPKernelApp):
    def init_iopub(self, context):
        # Output that we have not read yet stays in the kernel's memory, which is limited, and none is dropped.
        context.setsockopt(zmq.SNDHWM, 0)
        super().init_iopub(context)

app = App.instance()
app.initialize(sys.argv[1:])
os.write(ready, b"ready\\n")
os.close(ready)
app.start()
"""


@dataclass(frozen=True)
class Execution:
    """Records the result of one cell."""

    text: str
    """What a notebook shows: stdout and stderr as they came, the value of a last expression, or the traceback; of
    control characters newlines and tabs alone."""

    status: CellStatus
    """"error": the code raised; "died": the kernel ended by itself; otherwise the limit that was overstepped."""

    seconds: float

    fresh_kernel: bool = False
    """The kernel was lost, and with it all variables; the next cell runs in a new one."""


class Interpreter:
    """Runs cells of one session, for one thread at a time; leaving its context kills the interpreter.

    Args:
        limits: times hold for each cell, the rest for the session.
        read_only: further paths that the code sees under their own names, next to the running Python.

    Raises:
        OSError: the sandbox could not be made, or no kernel started in it.
    """

    def __init__(
        self, kind: SandboxKind, limits: SandboxLimits | None = None, *, read_only: Sequence[Path] = ()
    ) -> None:
        self._kind, self._limits, self._read_only = kind, limits or SandboxLimits(), read_only
        self._kernel: Kernel | None = self._start()

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, code: str) -> Execution:
        """Run one cell.

        Raises:
            OSError: a new kernel, in place of a lost one, did not start.
        """
        if self._kernel is None:
            self._kernel = self._start()
        execution = self._kernel.execute(code)
        if execution.fresh_kernel:
            self.close()
        return execution

    def close(self) -> None:
        """Kill the kernel; twice is once."""
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def _start(self) -> Kernel:
        return Kernel(self._kind, self._limits, self._read_only)


class InterpreterPool:
    """Runs at most ``size`` sessions at once while as many interpreters wait; leaving its context kills those.

    Args:
        limits: of each interpreter.
        read_only: further paths that the code sees under their own names.
    """

    def __init__(self, kind: SandboxKind, limits: SandboxLimits, size: int, *, read_only: Sequence[Path] = ()) -> None:
        if size < 1:
            raise ValueError(f"a pool of {size} interpreters: expected at least 1")
        self._kind, self._limits, self._read_only = kind, limits, read_only
        self._places = threading.Semaphore(size)
        self._starter = ThreadPoolExecutor(size, thread_name_prefix="interpreter start")
        self._warm = deque(self._start() for _ in range(size))

    def __enter__(self) -> InterpreterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def session(self) -> Iterator[Interpreter]:
        """Yield a new interpreter, as soon as fewer than ``size`` are in use; killed at the end.

        Raises:
            OSError: no interpreter started.
        """
        with self._places:
            warm = self._warm.popleft()
            self._warm.append(self._start())
            with warm.result() as interpreter:
                yield interpreter

    def close(self) -> None:
        """Kill the interpreters that wait; those in use end with their sessions."""
        self._starter.shutdown(cancel_futures=True)
        while self._warm:
            waiting = self._warm.popleft()
            if not waiting.cancelled() and waiting.exception() is None:
                waiting.result().close()

    def _start(self) -> Future[Interpreter]:
        return self._starter.submit(Interpreter, self._kind, self._limits, read_only=self._read_only)


class Kernel:
    """Runs one kernel until `close`.

    Raises:
        OSError: the sandbox could not be made, or the kernel did not start.
    """

    def __init__(self, kind: SandboxKind, limits: SandboxLimits, read_only: Sequence[Path]) -> None:
        self._limits = limits
        with contextlib.ExitStack() as resources:
            folder = resources.enter_context(sandbox_folder())
            channels = resources.enter_context(sandbox_folder())
            inside = {"bubblewrap": Path(_CHANNELS), "none": channels}[kind]
            key = secrets.token_hex()
            (channels / "connection.json").write_text(json.dumps(_connection(inside, key)), encoding="utf-8")
            command = [sys.executable, "-c", _PROGRAM, "-f", str(inside / "connection.json")]
            self._sandboxed = resources.enter_context(
                Sandboxed(
                    kind,
                    [*command, "--HistoryManager.enabled=False"],
                    writable={wall.FOLDER: folder, _CHANNELS: channels},
                    limits=limits,
                    environment={"IPYTHONDIR": str(inside), "JUPYTER_CONFIG_DIR": str(inside)},
                    read_only=read_only,
                )
            )
            self._process = self._sandboxed.process
            self._process.forgive_cpu_time()
            deadline = time.monotonic() + _START_SECONDS
            self._wait_ready(deadline)
            self._channels = resources.enter_context(Channels(_connection(channels, key), limits))
            while not self._channels.published(0.5):
                if self._process.ended() or time.monotonic() > deadline:
                    raise OSError("a Python kernel in the sandbox did not answer when it started")
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Kill the kernel and remove its folders."""
        self._resources.close()

    def execute(self, code: str) -> Execution:
        """Run one cell; after an execution with ``fresh_kernel`` this kernel is dead."""
        before = time.monotonic()
        self._process.renew_cpu_time()
        cell = Cell(self._channels.request(code), self._limits.output_bytes)
        ending = self._collect(cell, before + self._limits.wall_seconds)
        late = ending == "wall_time"
        if late:
            self._channels.interrupt()
            ending = self._collect(cell, time.monotonic() + _INTERRUPT_SECONDS)
        lost = ending is not None or cell.exits
        if lost:
            self._process.stop(None if ending == "died" else ending)
        status: CellStatus = ending or ("wall_time" if late else cell.status)
        text = plain_text(cell.text)
        return Execution(text + self._note(text, status, lost), status, time.monotonic() - before, lost)

    def _collect(self, cell: Cell, deadline: float) -> Literal["died"] | Breach | None:
        """Fill ``cell`` until it is complete (None), or say why that will not be."""
        while not cell.complete:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return "wall_time"
            if self._process.stands_still():
                return "idle"
            news = self._channels.receive(cell, self._sandboxed.stdout_fd, min(remaining, _LOOK_SECONDS))
            cut = news == "cut"
            if news == "died" or (cut and self._channels.gone(_CUT_SECONDS)):
                self._process.wait(time.monotonic() + _DEATH_SECONDS)
                self._process.stop()
                return self._process.breach or "died"
            # Cut, but alive: zmq ends a connection that carries too large a message.
            if cut or cell.overflowing:
                return "output"
        return None

    def _wait_ready(self, deadline: float) -> None:
        told = b""
        poller = select.poll()
        poller.register(self._sandboxed.stdout_fd, select.POLLIN)
        while b"ready\n" not in told:
            readable = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            data = os.read(self._sandboxed.stdout_fd, _READ_BYTES) if readable else b""
            if not data:
                stderr = self._sandboxed.communicate(time.monotonic() + _DEATH_SECONDS)[1]
                code = self._sandboxed.exit_code(stderr)
                raise OSError(f"no Python kernel started in the sandbox (exit code {code}): {stderr.strip()[-1000:]}")
            told += data

    def _note(self, text: str, status: CellStatus, lost: bool) -> str:
        """Return the line that ends the text of a cell that was stopped."""
        reason = self._reason(status, lost)
        if reason is None:
            return ""
        after = "; all variables are lost" if lost else ""
        line = "" if not text or text.endswith("\n") else "\n"
        return f"{line}[stopped: {reason}{after}]\n"

    def _reason(self, status: CellStatus, lost: bool) -> str | None:
        limits = self._limits
        match status:
            case "ok" | "error":
                return "the code ended its interpreter" if lost else None
            case "died":
                code = self._sandboxed.exit_code()
                return f"the kernel died of signal {-code}" if code < 0 else f"the kernel ended with exit code {code}"
            case "wall_time":
                return f"it ran longer than {limits.wall_seconds:g} s"
            case "cpu_time":
                return f"it used more than {limits.cpu_seconds} s of processor time"
            case "memory":
                return f"it used more than {limits.memory_bytes} bytes of memory"
            case "processes":
                return f"it started {limits.processes} processes or threads"
            case "disk":
                return f"it wrote more than {limits.folder_bytes} bytes or {limits.folder_files} files"
            case "output":
                return f"it printed more than {limits.output_bytes} bytes"
            case "idle":
                return f"it was stopped, or slept for longer than {limits.cpu_seconds} s"
            case _:
                assert_never(status)


def _connection(folder: Path, key: str) -> KernelConnectionInfo:
    return {
        "transport": "ipc",
        "ip": str(folder / "k"),
        "key": key,
        "signature_scheme": "hmac-sha256",
        "shell_port": 1,
        "iopub_port": 2,
        "stdin_port": 3,
        "control_port": 4,
        "hb_port": 5,
    }
