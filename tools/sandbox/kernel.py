"""One Python kernel behind the wall, spoken to by Jupyter's messages through unix sockets in a bound folder.

Comes in: code. Goes out: an `Execution` with the text that a notebook would show. Every limit and every death of
the kernel ends in a record.

Time runs out in two steps: an interrupt by message, for a signal would kill the wall and not the code; then the kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jupyter_client.connect import KernelConnectionInfo

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.channels import Cell, Channels
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.limits import Breach, Limits, SandboxKind
from reflectron.tools.sandbox.sandboxed import Sandboxed
from reflectron.tools.sandbox.terminal import plain

Status = Literal["ok", "error", "died"] | Breach

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
_REASONS: dict[str, str] = {
    "wall_time": "it ran longer than {0.wall_seconds:g} s",
    "cpu_time": "it used more than {0.cpu_seconds} s of processor time",
    "memory": "it used more than {0.memory_bytes} bytes of memory",
    "processes": "it started {0.processes} processes or threads",
    "disk": "it wrote more than {0.folder_bytes} bytes or {0.folder_files} files",
    "output": "it printed more than {0.output_bytes} bytes",
    "idle": "it was stopped, or slept for longer than {0.cpu_seconds} s",
}


@dataclass(frozen=True)
class Execution:
    """What became of one cell."""

    text: str
    """What a notebook shows: stdout and stderr as they came, the value of a last expression, or the traceback; of
    control characters newlines and tabs alone."""

    status: Status
    """"error": the code raised; "died": the kernel ended by itself; otherwise the limit that was overstepped."""

    seconds: float

    fresh_kernel: bool = False
    """The kernel was lost, and with it all variables; the next cell runs in a new one."""


class Kernel:
    """A running kernel; `close` ends it.

    Raises:
        OSError: the sandbox could not be made, or the kernel did not start.
    """

    def __init__(self, kind: SandboxKind, limits: Limits, read_only: Sequence[Path]) -> None:
        self._limits = limits
        with contextlib.ExitStack() as resources:
            folder = resources.enter_context(sandbox_folder())
            channels = resources.enter_context(sandbox_folder())
            inside = Path(_CHANNELS) if kind == "bubblewrap" else channels
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
        status: Status = ending or ("wall_time" if late else cell.status)
        text = plain(cell.text)
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

    def _note(self, text: str, status: Status, lost: bool) -> str:
        if status in ("ok", "error"):
            if not lost:
                return ""
            reason = "the code ended its interpreter"
        elif status == "died":
            code = self._sandboxed.exit_code()
            reason = f"the kernel died of signal {-code}" if code < 0 else f"the kernel ended with exit code {code}"
        else:
            reason = _REASONS[status].format(self._limits)
        after = "; all variables are lost" if lost else ""
        line = "" if not text or text.endswith("\n") else "\n"
        return f"{line}[stopped: {reason}{after}]\n"


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
