"""A running program behind the wall: its pipes, its watch and how it ended.

Its output is read up to a limit. Leaving the context of a `Sandboxed` kills whatever still runs in it and closes all
pipes; a `SandboxOutcome` says how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import home, sandbox_folder
from reflectron.tools.sandbox.seccomp import seccomp_program
from reflectron.tools.sandbox.wall import Breach, SandboxKind, SandboxLimits
from reflectron.tools.sandbox.watch import WatchedProcess

_READ_BYTES = 1 << 16
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class SandboxOutcome:
    """Records how a program ended."""

    returncode: int | None
    """Exit code, negative for a signal, None if it was killed for a limit."""

    stdout: str
    stderr: str
    seconds: float
    ended: Literal["exited", "signal"] | Breach

    @property
    def breach(self) -> Breach | None:
        """The limit that ended it, if one did."""
        return None if self.ended == "exited" or self.ended == "signal" else self.ended


class Sandboxed:
    """Runs one program until `close`.

    Args:
        writable: folders by their path inside; the one at ``/sandbox`` is the working folder.
        read_only: further paths that the program sees under their own names, next to the running Python.
        environment: added to a clean one.
        stdout: where the program writes, instead of the pipe that is read here.

    Raises:
        OSError: a folder or the program that makes the wall is missing.
    """

    def __init__(
        self,
        kind: SandboxKind,
        argv: Sequence[str],
        *,
        writable: Mapping[str, Path],
        limits: SandboxLimits,
        environment: Mapping[str, str],
        read_only: Sequence[Path] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> None:
        self._walled = wall.is_walled(kind)
        self._status: bytes | None = None
        self._room = limits.output_bytes
        with contextlib.ExitStack() as on_error, contextlib.ExitStack() as theirs:
            writable = {inside: folder.absolute() for inside, folder in writable.items()}
            writable[wall.SCRATCH] = on_error.enter_context(sandbox_folder())
            self.stdout_fd, piped = _pipe(on_error, theirs)
            self.stderr_fd, stderr = _pipe(on_error, theirs)
            self._status_fd, status = _pipe(on_error, theirs)
            self._texts = {self.stdout_fd: bytearray(), self.stderr_fd: bytearray()}
            if self._walled:
                paths = [path.absolute() for path in read_only]
                argv, inherited = _behind_wall(argv, writable, paths, limits, status, theirs)
            else:
                argv, inherited = [*wall.launcher(limits, count_processes=False), *argv], []
            group = home().new_cgroup(limits)
            if group is not None:
                on_error.callback(group.close)
            self.process = WatchedProcess(
                wall.starter(argv, group.path if group is not None else None),
                limits=limits,
                folders=list(writable.values()),
                environment=wall.environment(walled=self._walled, writable=writable, extra=environment),
                cwd=writable[wall.FOLDER],
                stdin=stdin,
                stdout=piped if stdout is None else stdout,
                stderr=stderr,
                pass_fds=inherited,
                walled=self._walled,
                group=group,
            )
            self._resources = on_error.pop_all()

    def __enter__(self) -> Sandboxed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs and remove its /tmp; twice is once."""
        self.process.stop()
        self._resources.close()

    def communicate(self, deadline: float) -> tuple[str, str]:
        """Return stdout and stderr when the program has ended, or was killed for a limit or at ``deadline``."""
        self._exchange(deadline, until_line=False)
        while not self.process.wait(min(deadline, time.monotonic() + _LOOK_SECONDS)):
            if time.monotonic() >= deadline:
                self.process.stop("wall_time")
            elif self.process.stands_still():
                self.process.stop("idle")
        stdout, stderr = (bytes(text).decode(errors="replace") for text in self._texts.values())
        return stdout, stderr

    def ask(self, stdin_fd: int, question: bytes, deadline: float) -> bytes | None:
        """Write to the program's stdin and read the next line of its stdout; None when it sends none any more.

        Args:
            stdin_fd: our end of the pipe that is its stdin, without blocking.
        """
        self._exchange(deadline, until_line=True, stdin_fd=stdin_fd, question=question)
        line, end, rest = bytes(self._texts[self.stdout_fd]).partition(b"\n")
        if not end:
            return None
        self._texts[self.stdout_fd] = bytearray(rest)
        return line

    def _exchange(self, deadline: float, *, until_line: bool, stdin_fd: int = -1, question: bytes = b"") -> None:
        """Read what the program writes until it closes its ends, or its stdout has a line."""
        with selectors.DefaultSelector() as selector:
            for descriptor in self._texts:
                selector.register(descriptor, selectors.EVENT_READ)
            if question:
                selector.register(stdin_fd, selectors.EVENT_WRITE)
            while selector.get_map() and time.monotonic() < deadline:
                if until_line and b"\n" in self._texts[self.stdout_fd]:
                    return
                ended = self.process.ended()
                if self.process.stands_still():
                    self.process.stop("idle")
                ready = selector.select(0.05)
                # Where there is no wall, a process left behind may hold the pipes open.
                if ended and not ready:
                    return
                for key, _ in ready:
                    if key.fd == stdin_fd:
                        question = _write_some(stdin_fd, question)
                    if (key.fd == stdin_fd and not question) or (key.fd != stdin_fd and not self._read(key.fd)):
                        selector.unregister(key.fd)
                if self._room < 0:
                    self.process.stop("output")
                    return

    def _read(self, descriptor: int) -> int:
        """Return the number of bytes read, 0 at the end; no more are kept than there is room for."""
        data = os.read(descriptor, _READ_BYTES)
        self._texts[descriptor] += data[: max(0, self._room)]
        self._room -= len(data)
        return len(data)

    def outcome(self, stdout: str, stderr: str, seconds: float) -> SandboxOutcome:
        """Say how the program ended; it is killed if it has not.

        Raises:
            OSError: the wall could not be made, so that nothing has run.
        """
        code = self.exit_code(stderr)
        breach = self.process.breach
        if breach is not None:
            return SandboxOutcome(None, stdout, stderr, seconds, breach)
        return SandboxOutcome(code, stdout, stderr, seconds, "signal" if code < 0 else "exited")

    def exit_code(self, stderr: str = "") -> int:
        """Return the exit code, negative for a signal; kills what runs.

        Raises:
            OSError: the wall could not be made, so that nothing has run.
        """
        code = self.process.stop()
        # A signal reaches bubblewrap itself only from outside, that is from us.
        if not self._walled or code < 0:
            return code
        # Written by bubblewrap outside of the wall, and only if the program ran.
        if self._status is None:
            self._status = os.read(self._status_fd, _READ_BYTES)
        # bubblewrap itself ends with 1 where it fails; above 128 it was told of a signal that ended all of the sandbox.
        if not _says_exit_code(self._status) and not 128 < code < 128 + signal.NSIG:
            raise OSError(f"bubblewrap made no sandbox: {stderr.strip() or f'exit code {code}'}")
        # Like a shell it adds 128 to the number of a signal.
        return 128 - code if 128 < code < 128 + signal.NSIG else code


def _says_exit_code(status: bytes) -> bool:
    """Tell whether one of bubblewrap's lines of JSON has the exit code."""
    return any("exit-code" in json.loads(line) for line in status.splitlines())


def _behind_wall(
    argv: Sequence[str],
    writable: Mapping[str, Path],
    read_only: Sequence[Path],
    limits: SandboxLimits,
    status_fd: int,
    theirs: contextlib.ExitStack,
) -> tuple[list[str], list[int]]:
    """Return the command that runs ``argv`` behind bubblewrap, and the descriptors that it inherits."""
    user = wall.own_user()
    if user is not None:
        wall.give_to(user, writable.values())
    seccomp_fd = _seccomp_fd(theirs)
    command = wall.bubblewrap(
        argv,
        writable=writable,
        read_only=[*wall.python_paths(), *read_only],
        limits=limits,
        user=user,
        status_fd=status_fd,
        seccomp_fd=seccomp_fd,
    )
    return command, [status_fd] if seccomp_fd is None else [status_fd, seccomp_fd]


def _seccomp_fd(theirs: contextlib.ExitStack) -> int | None:
    program = seccomp_program(platform.machine())
    if not program:
        return None
    read, write = os.pipe()
    theirs.callback(os.close, read)
    # Smaller than the buffer of a pipe, so that this never waits.
    os.write(write, program)
    os.close(write)
    return read


def _write_some(descriptor: int, data: bytes) -> bytes:
    """Return what is left to be written; nothing when nobody reads."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _pipe(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, int]:
    read, write = os.pipe()
    ours.callback(os.close, read)
    theirs.callback(os.close, write)
    return read, write
