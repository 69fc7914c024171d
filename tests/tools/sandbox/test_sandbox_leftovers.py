"""Nothing of a sandbox outlives the program that started it: no process, no zombie, no folder, however that ends."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from reflectron.tools.sandbox import home
from reflectron.tools.sandbox.wall import SandboxKind

pytestmark = pytest.mark.slow
# Three sandboxes at once, in threads as a pool has them; the marker is seen among the arguments of a process.
PROGRAM = """
import sys, threading
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.wall import SandboxLimits
from reflectron.tools.sandbox.process import run_sandboxed
def run():
    with sandbox_folder() as folder:
        (folder / "file").write_text("x")
        limits = SandboxLimits(wall_seconds=1000, cpu_seconds=999)
        run_sandboxed("bubblewrap", ["sleep", sys.argv[1]], folder=folder, limits=limits)
threads = [threading.Thread(target=run) for _ in range(3)]
for thread in threads:
    thread.start()
print("started", flush=True)
for thread in threads:
    thread.join()
"""
MANY = """
import sys
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.wall import SandboxLimits
from reflectron.tools.sandbox.process import run_sandboxed
for number in range(12):
    with sandbox_folder() as folder:
        limits = SandboxLimits(wall_seconds=0.3 if number % 3 == 2 else 60)
        script = ["true", "sleep 100 & sleep 100 & true", "sleep 100"][number % 3]
        print(run_sandboxed("bubblewrap", ["sh", "-c", script], folder=folder, limits=limits).ended)
"""
# The first process of a container that waits for nobody but its own child.
FIRST = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
child.wait()
zombies = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
    if fields[0] == "Z":
        zombies.append(open(f"/proc/{pid}/comm").read())
print("zombies", zombies, "code", child.returncode)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_after_a_signal(sandbox: SandboxKind, tmp_path: Path, number: signal.Signals) -> None:
    marker = new_marker()
    starter = start(marker, tmp_path)
    # bubblewrap asks for the signal of its parent's death while it starts.
    until(lambda: len(sleepers(marker)) == 3)
    [folder] = tmp_path.iterdir()
    groups = [group.path for group in home.cgroup_candidates(folder.name)]
    starter.send_signal(number)
    if number == signal.SIGINT:
        # Python waits for its threads, and each of them waits; a user presses twice.
        until(lambda: starter.poll() is not None or starter.send_signal(number) is not None, seconds=2, fails=False)
        starter.terminate()
    starter.wait()
    until(lambda: not with_marker(marker) and not list(tmp_path.iterdir()))
    until(lambda: not any(group.exists() for group in groups))


def test_killed_at_any_moment_of_a_start(sandbox: SandboxKind, tmp_path: Path) -> None:
    for milliseconds in range(0, 40, 5):
        marker = new_marker()
        starter = start(marker, tmp_path)
        time.sleep(milliseconds / 1000)
        starter.kill()
        starter.wait()
        until(lambda marker=marker: not with_marker(marker) and not list(tmp_path.iterdir()))


def test_what_the_janitor_could_not_remove_goes_at_the_next_start(sandbox: SandboxKind, tmp_path: Path) -> None:
    marker = new_marker()
    starter = start(marker, tmp_path)
    until(lambda: len(sleepers(marker)) == 3)
    [janitor] = [child for child in psutil.Process(starter.pid).children() if child.cmdline()[:2] == ["/bin/sh", "-c"]]
    janitor.kill()
    starter.kill()
    starter.wait()
    until(lambda: not sleepers(marker))
    [left] = tmp_path.iterdir()
    foreign = tmp_path / "reflectron-of-someone-else"
    foreign.mkdir()
    again = start("0", tmp_path)
    assert again.wait(60) == 0
    assert not left.exists()
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace of its own needs root")
def test_no_zombie_is_left_to_the_first_process(sandbox: SandboxKind, tmp_path: Path) -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", FIRST, MANY]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    lines = done.stdout.splitlines()
    assert lines[:-1] == ["exited", "exited", "wall_time"] * 4, done.stderr
    assert lines[-1] == "zombies [] code 0"


def start(marker: str, folder: Path) -> subprocess.Popen[str]:
    """A program with three sandboxes, which says when it starts them; its folders lie in ``folder``."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, marker]
    starter = subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "started\n"
    return starter


def new_marker() -> str:
    """Seconds that nobody else's `sleep` has."""
    return str(10**8 + secrets.randbelow(10**8))


def sleepers(marker: str) -> list[psutil.Process]:
    return [process for process in with_marker(marker) if process.info["cmdline"] == ["sleep", marker]]


def with_marker(marker: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or [])]


def until(condition: Callable[[], bool], seconds: float = 60, *, fails: bool = True) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            assert not fails, "waited for too long"
            return
        time.sleep(0.02)
