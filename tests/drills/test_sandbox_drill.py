"""Hostile programs as cells of an interpreter, as programs and as samples: which are contained, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
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

from reflectron.tools.cli import main
from reflectron.tools.sandbox import seccomp
from reflectron.tools.sandbox.home import home, sandbox_folder
from reflectron.tools.sandbox.interpreter import InterpreterPool
from reflectron.tools.sandbox.process import run_sandboxed
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits, python_paths
from testkit.places import ROOT, TESTS_DIR

pytestmark = pytest.mark.slow
# Only snippets that must run out of time get little of it: on a loaded machine every other one must reach its end.
PATIENT = SandboxLimits(wall_seconds=120, cpu_seconds=60, memory_bytes=2**30, folder_bytes=128 << 20)
LIMITS = {
    "patient": PATIENT,
    "brief": replace(PATIENT, wall_seconds=1.5),
    "frugal": replace(PATIENT, cpu_seconds=2),
}
# For programs as a judge runs them; the wall clock is generous, so that what ends them is what they overstep.
TIGHT = SandboxLimits(
    wall_seconds=90,
    cpu_seconds=3,
    memory_bytes=320 << 20,
    processes=40,
    output_bytes=1 << 16,
    file_bytes=8 << 20,
    folder_bytes=32 << 20,
    folder_files=1000,
)
PRELUDE = """
import ctypes, os, socket, subprocess, sys, time
MiB = 1 << 20

def call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    packed = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = libc.syscall(ctypes.c_long(calls[name]), *packed)
    return -ctypes.get_errno() if result == -1 else result

def mapped(file, size):
    assert call("mmap", 0, size, 3, 1, file.fileno(), 0) > 0

def refused(name, *arguments):
    result = call(name, *arguments)
    print(name, result if result in (-1, -38) else f"ESCAPED {result}")

"""
MORE_CALLS = {"mmap": (9, 222), "prctl": (157, 167), "clone": (56, 220), "socketpair": (53, 199)}
PROBLEM = {
    "prompt": 'def add(a, b):\n    """The sum of a and b."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}
FILES = {
    "interpreter": "hostile_snippets.yaml",
    "program": "hostile_programs.yaml",
    "sample": "hostile_own_samples.yaml",
}
DOCS = ROOT / "docs" / "sandbox.md"


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
        own = Path.home()
        try:
            yield {
                "tcp_port": tcp.getsockname()[1],
                "udp_port": udp.getsockname()[1],
                "abstract_name": abstract,
                "socket_path": str(self.folder / "s"),
                "file": str(file),
                "pid": victim.pid,
                "marker": self.marker,
                "home": str(own),
                "home_parts_of_python": [
                    path.relative_to(own).parts[0] for path in python_paths() if path.is_relative_to(own)
                ],
                "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
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


@dataclass(frozen=True)
class Attempt:
    """One hostile program and what became of it."""

    over: str
    name: str
    ended: str
    seconds: float
    faults: tuple[str, ...]
    """Why it is not contained."""


def try_cells(sandbox: SandboxKind, facts: dict[str, Any], secret: str) -> list[Attempt]:
    """Each in a session of its own; afterwards the pools serve as before."""
    with contextlib.ExitStack() as running:
        pools = {name: running.enter_context(InterpreterPool(sandbox, limits, 2)) for name, limits in LIMITS.items()}

        def attempt(snippet: dict[str, Any]) -> Attempt:
            with pools[snippet.get("limits", "patient")].session() as interpreter:
                assert interpreter.execute(f"host = {facts!r}").status == "ok", snippet["name"]
                execution = interpreter.execute(snippet["code"])
            # Not the word in the source that a traceback quotes.
            said = execution.text.replace('"ESCAPED', "")
            faults = {
                f"ended with {execution.status}": execution.status not in snippet["ends"],
                f"said {execution.text[-500:]!r}": snippet.get("says", "") not in execution.text,
                f"escaped: {said[-500:]!r}": "ESCAPED" in said or secret in said,
                "no reason": execution.status not in ("ok", "error") and "[stopped: " not in execution.text,
                "too much text": len(execution.text) > 2 * PATIENT.output_bytes,
            }
            return Attempt("interpreter", snippet["name"], execution.status, execution.seconds, true_of(faults))

        with ThreadPoolExecutor(4) as workers:
            attempts = list(workers.map(attempt, load("hostile_snippets.yaml")))
        for pool in pools.values():
            with pool.session() as interpreter:
                assert interpreter.execute("print(6 * 7)").text == "42\n"
    return attempts


def try_programs(sandbox: SandboxKind, facts: dict[str, Any], secret: str) -> list[Attempt]:
    """Each as a judge runs a sample."""
    column = 0 if platform.machine() == "x86_64" else 1
    calls = {name: numbers[column] for name, numbers in (seccomp._REFUSED | MORE_CALLS).items()}
    prelude = f"host, limit, calls = {facts!r}, {vars(TIGHT)!r}, {calls!r}\n{PRELUDE}"

    def attempt(program: dict[str, Any]) -> Attempt:
        with sandbox_folder() as folder:
            (folder / "program.py").write_text(prelude + program["code"])
            outcome = run_sandboxed(sandbox, [sys.executable, "-I", "program.py"], folder=folder, limits=TIGHT)
            said = outcome.stdout + outcome.stderr.replace('"ESCAPED', "")
            faults = {
                f"ended with {outcome.ended}: {outcome.stderr[-500:]!r}": outcome.ended not in program["ends"],
                f"escaped: {said[-500:]!r}": "ESCAPED" in said or secret in said,
                f"held its place for {outcome.seconds:.0f} s": outcome.seconds > program.get("within", 60),
            }
        if folder.exists():
            faults["left a folder"] = True
        return Attempt("program", program["name"], outcome.ended, outcome.seconds, true_of(faults))

    with ThreadPoolExecutor(6) as workers:
        return list(workers.map(attempt, load("hostile_programs.yaml")))


def try_samples(tmp_path: Path) -> list[Attempt]:
    """All in one file, with right answers between them, through the command that scores."""
    samples = load("hostile_own_samples.yaml")
    right = "def add(a, b):\n    return a + b\n"
    codes = [code for sample in samples for code in (sample["code"], right)]
    problems, completions, out = (tmp_path / name for name in ("mine.jsonl", "answers.jsonl", "score.json"))
    rows = [PROBLEM | {"task_id": f"own/{number}"} for number in range(len(codes))]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"task_id": f"own/{number}", "solution": code} for number, code in enumerate(codes)]
    completions.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    words = ["eval", "score", str(completions), "--dataset", str(problems), "--min-time-limit", "1", "--json", str(out)]
    before = time.monotonic()
    assert main(words) == 0
    seconds = (time.monotonic() - before) / len(samples)
    text = out.read_text()
    failed = {row["task_id"]: row["base"] for row in json.loads(text)["failed"]}
    assert not [number for number in range(1, len(codes), 2) if f"own/{number}" in failed]
    assert not [char for char in text if not char.isprintable() and char not in "\n\t"]
    verdicts = [failed.get(f"own/{2 * number}", "pass") for number in range(len(samples))]
    return [
        Attempt("sample", sample["name"], verdict, seconds, true_of({"passed": verdict == "pass"}))
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]


def test_hostile_programs_are_contained(
    sandbox: SandboxKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "host").mkdir()
    host = Host(tmp_path / "host")
    monkeypatch.setenv("REFLECTRON_SECRET", host.secret)
    home()
    children = set(psutil.Process().children(recursive=True))
    with host.watched() as facts:
        attempts = [*try_cells(sandbox, facts, host.secret), *try_programs(sandbox, facts, host.secret)]
    assert set(psutil.Process().children(recursive=True)) <= children
    attempts += try_samples(tmp_path)
    open_doors = {f"{attempt.over}: {attempt.name}" for attempt in attempts if attempt.faults}
    with capsys.disabled():
        print()
        for attempt in attempts:
            print(
                f"{attempt.over:<12} {attempt.name:<60} {attempt.ended:<10} {attempt.seconds:5.1f} s", *attempt.faults
            )
        print(f"tried {len(attempts)}, contained {len(attempts) - len(open_doors)}, not contained {len(open_doors)}")
        print(*(f"not contained: {name}" for name in sorted(open_doors)), sep="\n")
    assert len(attempts) >= 120
    expected = {
        f"{over}: {entry['name']}"
        for over, file in FILES.items()
        for entry in load(file)
        if "lets" in entry and lets_here(entry["lets"])
    }
    assert open_doors == expected


def test_the_page_names_what_is_not_contained() -> None:
    page = DOCS.read_text(encoding="utf-8")
    section = page.partition("## What the drill does not contain")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", section, re.MULTILINE)) - {("program", "where")}
    written = {(entry["name"], entry["lets"]) for file in FILES.values() for entry in load(file) if "lets" in entry}
    assert {pair for pair in told if not pair[0].startswith("-")} == written


def load(file: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load((TESTS_DIR / "hostile" / file).read_text(encoding="utf-8"))
    return entries


def true_of(faults: dict[str, bool]) -> tuple[str, ...]:
    return tuple(fault for fault, holds in faults.items() if holds)


def lets_here(where: str) -> bool:
    if where == "as a user":
        return os.geteuid() != 0
    if where == "without a cgroup":
        return home().groups is None
    assert where == "always"
    return True


def sleepers(marker: str) -> list[psutil.Process]:
    """Processes `sleep marker`, in a sandbox or not; its wall has the marker among its arguments too."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == ["sleep", marker]]
