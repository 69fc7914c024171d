"""Hostile cells, one session of a pool each: none gets out, each leaves its record, the pool serves the next."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.interpreter import Execution
from reflectron.tools.sandbox.limits import Limits, SandboxKind
from reflectron.tools.sandbox.pool import InterpreterPool
from reflectron.tools.sandbox.wall import python_paths

pytestmark = pytest.mark.slow
SNIPPETS = Path(__file__).with_name("hostile_snippets.yaml")
# Only snippets that must run out of time get little of it: on a loaded machine every other one must reach its end.
PATIENT = Limits(wall_seconds=120, cpu_seconds=60, memory_bytes=2**30, folder_bytes=128 << 20)
LIMITS = {
    "patient": PATIENT,
    "brief": replace(PATIENT, wall_seconds=1.5),
    "frugal": replace(PATIENT, cpu_seconds=2),
}


@dataclass
class Host:
    """What exists outside of the sandbox, and whether anyone got at it."""

    folder: Path
    listeners: list[socket.socket] = field(default_factory=list)
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    # Seconds that nobody else's `sleep` has.
    marker: int = field(default_factory=lambda: 10**8 + secrets.randbelow(10**8))

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, Any]]:
        """The facts that snippets are told; at the end all of it must be untouched."""
        file = self.folder / "secret.txt"
        file.write_text(self.secret)
        abstract = secrets.token_hex(8)
        tcp = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("", 0))
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract)
        self._listen(socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "s"))
        victim = subprocess.Popen(["sleep", "100000"])
        home = Path.home()
        try:
            yield {
                "tcp_port": tcp.getsockname()[1],
                "udp_port": udp.getsockname()[1],
                "abstract_name": abstract,
                "socket_path": str(self.folder / "s"),
                "file": str(file),
                "pid": victim.pid,
                "marker": self.marker,
                "home": str(home),
                "home_parts_of_python": [
                    path.relative_to(home).parts[0] for path in python_paths() if path.is_relative_to(home)
                ],
            }
            assert victim.poll() is None
            assert file.read_text() == self.secret
            assert sorted(os.listdir(self.folder)) == ["s", "secret.txt"]
            for listener in self.listeners:
                with pytest.raises(BlockingIOError):
                    listener.recvfrom(10) if listener.type == socket.SOCK_DGRAM else listener.accept()
            assert not sleepers(str(self.marker))
        finally:
            victim.kill()
            victim.wait()
            for listener in self.listeners:
                listener.close()

    def _listen(self, family: int, kind: int, address: Any) -> socket.socket:
        listener = socket.socket(family, kind)
        self.listeners.append(listener)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        listener.setblocking(False)
        return listener


def test_nothing_gets_out_and_the_pool_goes_on(
    sandbox: SandboxKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = yaml.safe_load(SNIPPETS.read_text(encoding="utf-8"))
    host = Host(tmp_path)
    monkeypatch.setenv("REFLECTRON_SECRET", host.secret)
    children = set(psutil.Process().children(recursive=True))
    with contextlib.ExitStack() as running:
        facts = running.enter_context(host.watched())
        pools = {name: running.enter_context(InterpreterPool(sandbox, limits, 1)) for name, limits in LIMITS.items()}

        def attempt(snippet: dict[str, Any]) -> Execution:
            with pools[snippet.get("limits", "patient")].session() as interpreter:
                assert interpreter.execute(f"host = {facts!r}").status == "ok", snippet["name"]
                return interpreter.execute(snippet["code"])

        with ThreadPoolExecutor(2) as workers:
            executions = list(workers.map(attempt, snippets))
        for pool in pools.values():
            with pool.session() as interpreter:
                assert interpreter.execute("print(6 * 7)").text == "42\n"
    assert set(psutil.Process().children(recursive=True)) <= children
    lines = [f"{s['name']:<50} {e.status:<10} {e.seconds:5.1f} s" for s, e in zip(snippets, executions, strict=True)]
    with capsys.disabled():
        print("", *lines, f"{len(snippets)} hostile snippets, none got out", sep="\n")
    for snippet, execution in zip(snippets, executions, strict=True):
        context = f"{snippet['name']}: {execution.status}\n{execution.text[-2000:]}"
        assert execution.status in snippet["ends"], context
        assert snippet.get("says", "") in execution.text, context
        # Not the word in the source that a traceback quotes.
        assert "ESCAPED" not in execution.text.replace('"ESCAPED', ""), context
        assert host.secret not in execution.text, context
        assert execution.status in ("ok", "error") or "[stopped: " in execution.text, context
        assert len(execution.text) < 2 * PATIENT.output_bytes, context


def test_a_sandbox_ends_with_the_program_that_started_it(sandbox: SandboxKind) -> None:
    marker = str(10**8 + secrets.randbelow(10**8))
    program = f"""if True:
        from pathlib import Path
        from reflectron.tools.sandbox.process import Limits, run_sandboxed
        run_sandboxed({sandbox!r}, ["sleep", "{marker}"], folder=Path("."), limits=Limits(wall_seconds=1000))
    """
    with sandbox_folder() as folder:
        starter = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, env={**os.environ, "TMPDIR": str(folder)}
        )
        # Not before the program itself runs: bubblewrap asks for the signal of its parent's death while it starts.
        while ["sleep", marker] not in [process.info["cmdline"] for process in sleepers(marker)]:
            assert starter.poll() is None
        starter.kill()
        starter.wait()
        until = time.monotonic() + 60
        while sleepers(marker):
            assert time.monotonic() < until


def sleepers(marker: str) -> list[psutil.Process]:
    """Processes `sleep marker`, in a sandbox or not; its wall has the marker among its arguments too."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["sleep", marker]]
