"""The client's side of Jupyter's messages, over unix sockets whose other side cannot be trusted.

A `Cell` fills with text as messages arrive. A message above a size ends its connection, a connection that ended is
never made again (its socket may by then be a link to another program's), malformed and foreign messages are dropped,
and a cell's text has a limit. `plain_text` reduces what a program printed to what someone at a terminal would read in
the end: text, newlines and tabs, nothing else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any, Literal

import zmq
from jupyter_client.client import KernelClient
from jupyter_client.connect import KernelConnectionInfo

from reflectron.tools.sandbox.wall import SandboxLimits

_READ_BYTES = 1 << 16
# ECMA-48: control sequences; strings with their terminator, such as a window's title; other escapes. Each in its 7-bit
# and its 8-bit form.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c|(?=\n)|$)"
    r"|\x1b[ -/]*[0-~]?"
)
_ERASE_LINE = re.compile(r"(?:\x1b\[|\x9b)[0-2]?K")
_ERASED = "\0"
# Controls, and what turns the direction of the text that follows or is no character.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Cell:
    """Collects what arrives of one execution request."""

    def __init__(self, request_id: str, most_bytes: int) -> None:
        self.text = ""
        self.status: Literal["ok", "error"] = "error"
        self.overflowing = False
        # The code called exit(): the kernel will end a moment after its reply.
        self.exits = False
        self._request_id, self._room = request_id, most_bytes
        self._replied = self._idle = False

    @property
    def complete(self) -> bool:
        """Tell whether the kernel has replied and published all output."""
        return self._replied and self._idle

    def take(self, message: Mapping[str, Any]) -> None:
        """Apply a message; one that answers another request, or that shows nothing, changes nothing."""
        if message["parent_header"].get("msg_id") != self._request_id:
            return
        kind, content = message["header"]["msg_type"], message["content"]
        if kind == "execute_reply":
            self._replied = True
            self.status = "ok" if content["status"] == "ok" else "error"
            self.exits = any(item["source"] == "ask_exit" for item in content.get("payload", []))
        elif kind == "status":
            self._idle = self._idle or content["execution_state"] == "idle"
        elif kind == "stream":
            self._show(content["text"])
        elif kind in ("execute_result", "display_data"):
            self._show_lines(content["data"].get("text/plain", ""))
        elif kind == "error":
            self._show_lines("\n".join(content["traceback"]))

    def _show_lines(self, text: str) -> None:
        self._show(("" if not self.text or self.text.endswith("\n") else "\n") + text.rstrip("\n") + "\n")

    def _show(self, text: str) -> None:
        data = text.encode(errors="replace")
        self.overflowing = self.overflowing or len(data) > self._room
        self.text += data[: self._room].decode(errors="ignore")
        self._room -= min(len(data), self._room)


class Channels:
    """Connects to the shell, the control and the output channel of a kernel whose sockets listen."""

    def __init__(self, connection: KernelConnectionInfo, limits: SandboxLimits) -> None:
        self._context = zmq.Context()
        self._context.setsockopt(zmq.RECONNECT_IVL, -1)
        self._context.setsockopt(zmq.MAXMSGSIZE, 2 * limits.output_bytes + _READ_BYTES)
        # Times the size of a message, this is what a kernel can make us hold.
        self._context.setsockopt(zmq.RCVHWM, 16)
        client = KernelClient(context=self._context)
        client.load_connection_info(connection)
        self._session = client.session
        self._shell, self._control, self._output = (
            client.connect_shell(),
            client.connect_control(),
            client.connect_iopub(),
        )
        for socket in (self._shell, self._control, self._output):
            socket.linger = 0
        self._monitors = [
            socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for socket in (self._shell, self._control, self._output)
        ]
        self._poller = zmq.Poller()
        for socket in (self._shell, self._output, *self._monitors):
            self._poller.register(socket, zmq.POLLIN)

    def __enter__(self) -> Channels:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def request(self, code: str) -> str:
        """Ask to run ``code``; returns the request's id."""
        content = {
            # Half a surrogate pair, which a model's JSON may hold, has no UTF-8.
            "code": code.encode(errors="replace").decode(),
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": True,
        }
        return str(self._session.send(self._shell, "execute_request", content)["header"]["msg_id"])

    def interrupt(self) -> None:
        """Ask the kernel to raise KeyboardInterrupt in the running cell."""
        self._session.send(self._control, "interrupt_request", {})

    def receive(self, cell: Cell, pipe_fd: int, seconds: float) -> Literal["news", "cut", "died"]:
        """Wait for messages and put them into ``cell``.

        Args:
            pipe_fd: stdout of the kernel, which ends when all of its sandbox has ended; what it brings is dropped.
        """
        self._poller.register(pipe_fd, zmq.POLLIN)
        ready = dict(self._poller.poll(int(max(0.0, seconds) * 1000)))
        # Messages first: what was said before a death belongs to the cell.
        for socket in (self._output, self._shell):
            while not cell.overflowing and not cell.complete and self._take(socket, cell):
                pass
        if pipe_fd in ready and not os.read(pipe_fd, _READ_BYTES):
            return "died"
        return "cut" if any(monitor in ready for monitor in self._monitors) else "news"

    def gone(self, seconds: float) -> bool:
        """Tell whether all connections end within ``seconds``, as when the kernel ends; a message ends only its own."""
        poller = zmq.Poller()
        left = set(self._monitors)
        for monitor in left:
            poller.register(monitor, zmq.POLLIN)
        until = time.monotonic() + seconds
        while left and (ready := poller.poll(int(max(0.0, until - time.monotonic()) * 1000))):
            for monitor, _ in ready:
                poller.unregister(monitor)
                left.discard(monitor)
        return not left

    def published(self, seconds: float) -> bool:
        """Tell whether output arrives; ask again if not: what is published before the subscription holds is lost."""
        asked = self._session.send(self._shell, "kernel_info_request", {})["header"]["msg_id"]
        until = time.monotonic() + seconds
        while self._output.poll(int(max(0.0, until - time.monotonic()) * 1000)):
            _, message = self._session.recv(self._output)
            if message["parent_header"].get("msg_id") == asked:
                return True
        return False

    def _take(self, socket: zmq.Socket[bytes], cell: Cell) -> bool:
        """Receive a message into ``cell``; returns whether there was one."""
        try:
            _, message = self._session.recv(socket)
            if message is None:
                return False
            cell.take(message)
        except Exception:
            # Whatever the other side makes up: a false signature, no JSON, other types, missing keys.
            return True
        return True


def plain_text(text: str) -> str:
    """Return text without escape sequences and control characters but newline and tab.

    After a carriage return the line is written over from its start, as progress bars do; other moves of the cursor are
    not followed.
    """
    text = _ERASE_LINE.sub(_ERASED, text.replace(_ERASED, ""))
    text = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return _CONTROLS.sub("", "\n".join(map(_line, text.split("\n"))))


def _line(text: str) -> str:
    """Return a line as it stands after all its carriage returns."""
    shown = ""
    # From the last backwards: each part shows where no later one is.
    for part in reversed(text.split("\r")):
        before, erased, after = part.rpartition(_ERASED)
        shown += (before.replace(_ERASED, "") + after)[len(shown) :]
        if erased:
            break
    return shown
