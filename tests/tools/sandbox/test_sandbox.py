"""Programs in the sandbox: how each ending is told, what is visible, what is refused."""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from reflectron.tools.sandbox import usage, wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.process import choose_sandbox, run_sandboxed
from reflectron.tools.sandbox.sandboxed import Sandboxed, SandboxOutcome
from reflectron.tools.sandbox.seccomp import seccomp_program
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits


def run_python(kind: SandboxKind, folder: Path, code: str, stdin: str = "", **limits: float) -> SandboxOutcome:
    (folder / "program.py").write_text(textwrap.dedent(code), encoding="utf-8")
    # Long enough for a loaded machine, where no time is given.
    limits = {"wall_seconds": 60, "cpu_seconds": 60, **limits}
    argv = [sys.executable, "-I", "program.py"]
    return run_sandboxed(kind, argv, folder=folder, limits=SandboxLimits(**limits), stdin=stdin)


def test_a_program_reads_and_writes_in_its_folder(sandbox: SandboxKind, tmp_path: Path) -> None:
    code = f"""
        import os, sys, tempfile
        print(sys.stdin.read() + os.getcwd(), os.environ["HOME"], tempfile.gettempdir(), os.path.exists("{tmp_path}"))
        print("é", file=sys.stderr)
        open("result.txt", "w").write("42")
        sys.exit(3)
    """
    outcome = run_python(sandbox, tmp_path, code, stdin="given ")
    assert (outcome.ended, outcome.returncode) == ("exited", 3)
    assert outcome.stdout == "given /sandbox /sandbox /tmp False\n"
    assert outcome.stderr == "é\n"
    assert (tmp_path / "result.txt").read_text() == "42"


def test_a_limit_that_is_overstepped_is_named(sandbox: SandboxKind, tmp_path: Path) -> None:
    slow = run_python(sandbox, tmp_path, "print('so far', flush=True)\nwhile True: pass", wall_seconds=0.5)
    assert (slow.ended, slow.returncode) == ("wall_time", None)
    loud = run_python(sandbox, tmp_path, "while True: print('x' * 999)", output_bytes=10_000)
    assert (loud.ended, len(loud.stdout)) == ("output", 10_000)
    wide = run_python(sandbox, tmp_path, "for n in range(99): open(str(n), 'w')\nwhile True: pass", folder_files=50)
    assert wide.ended == "disk"


def test_a_signal_is_told_from_an_exit_code(sandbox: SandboxKind, tmp_path: Path) -> None:
    killed = run_python(sandbox, tmp_path, "import os; os.kill(os.getpid(), 11)")
    assert (killed.ended, killed.returncode) == ("signal", -11)


def test_a_silent_program_is_waited_for(sandbox: SandboxKind, tmp_path: Path) -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep(0.2); open('late', 'w'); os._exit(0)"
    assert run_python(sandbox, tmp_path, code).ended == "exited"
    assert (tmp_path / "late").exists()


def test_a_program_has_no_privileges(sandbox: SandboxKind, tmp_path: Path) -> None:
    status = run_python(sandbox, tmp_path, "print(open('/proc/self/status').read())").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1"
    assert "0" not in fields["Uid"].split() + fields["Gid"].split() + fields["Groups"].split()


def test_what_cannot_be_started_is_an_error_and_no_outcome(sandbox: SandboxKind, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        run_sandboxed(sandbox, ["true"], folder=tmp_path / "absent", limits=SandboxLimits())
    missing = run_sandboxed(sandbox, ["no-such-program"], folder=tmp_path, limits=SandboxLimits())
    assert (missing.ended, missing.returncode) == ("exited", 127)


def test_without_a_wall_the_limits_stay(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '1000']); print('done')"
    outcome = run_python("none", tmp_path, code)
    assert (outcome.ended, outcome.stdout) == ("exited", "done\n")
    assert run_python("none", tmp_path, "while True: pass", wall_seconds=0.3).ended == "wall_time"


def test_without_bubblewrap_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"bwrap is missing: .*apt-get install bubblewrap.*--sandbox none"):
        choose_sandbox("bubblewrap", i_understand=False)
    with pytest.raises(ValueError, match="confirm with --i-understand"):
        choose_sandbox("none", i_understand=False)
    assert choose_sandbox("none", i_understand=True) == "none"


def test_a_folder_too_deep_for_recursion_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    with sandbox_folder() as folder:
        here = os.open(folder, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
        (folder / "closed").mkdir(mode=0)
        assert usage.folder_usage(folder, 10_000)[1] == 10_001
    assert not folder.exists()


CASES = [
    # what is asked, number on x86_64, on aarch64, first argument, third argument, expected errno
    ("read", 0, 63, 0, 0, 0),
    ("ptrace", 101, 117, 0, 0, 1),
    ("memfd_create", 319, 279, 0, 0, 1),
    ("fork", 56, 220, 17, 0, 0),
    ("thread", 56, 220, 0x3D0F00, 0, 0),
    ("clone into a user namespace", 56, 220, 0x10000000 | 17, 0, 1),
    ("clone3", 435, 435, 0, 0, 38),
    ("unix socket", 41, 198, 1, 0, 0),
    ("internet socket", 41, 198, 2, 0, 0),
    ("list of interfaces", 41, 198, 16, 0, 0),
    ("netfilter", 41, 198, 16, 12, 97),
    ("vsock", 41, 198, 40, 0, 97),
    ("crypto", 41, 198, 38, 0, 97),
]


@pytest.mark.parametrize(("asked", "x86_64", "aarch64", "first", "third", "expected"), CASES)
def test_system_calls_are_refused_on_both_machines(
    asked: str, x86_64: int, aarch64: int, first: int, third: int, expected: int
) -> None:
    for machine, architecture, number in (("x86_64", 0xC000003E, x86_64), ("aarch64", 0xC00000B7, aarch64)):
        data = struct.pack("=IIQQQQ", number, architecture, 0, first, 0, third)
        assert decide(seccomp_program(machine), data) == expected, (asked, machine)
        assert decide(seccomp_program(machine), struct.pack("=IIQQQQ", number, 0x40000003, 0, first, 0, third)) == 1


ARGUMENTS = [
    # what is asked, number on x86_64, on aarch64, arguments, errno expected; "done" is success without effect
    ("private memory", 9, 222, (0, 4096, 3, 0x22), "allowed"),
    ("shared anonymous memory", 9, 222, (0, 4096, 3, 0x21), 1),
    ("shared anonymous memory, checked flags", 9, 222, (0, 4096, 3, 0x23), 1),
    ("a shared file", 9, 222, (0, 4096, 3, 0x01), "allowed"),
    ("huge pages", 9, 222, (0, 4096, 3, 0x40022), 1),
    ("semaphores", 64, 190, (0, 1, 0, 0), 1),
    ("extended attributes", 188, 5, (0, 0, 0, 0), 95),
    ("unreadable", 157, 167, (4, 0, 0, 0), 1),
    ("readable", 157, 167, (4, 1, 0, 0), "allowed"),
    ("a thread's name", 157, 167, (15, 0, 0, 0), "allowed"),
    ("typing", 16, 29, (0, 0x5412, 0, 0), 1),
    ("size of a terminal", 16, 29, (0, 0x5413, 0, 0), "allowed"),
    ("size of a pipe", 72, 25, (0, 1031, 0, 0), 1),
    ("flags of a file", 72, 25, (0, 4, 0, 0), "allowed"),
    ("a larger buffer", 54, 208, (0, 1, 7, 0), "done"),
    ("an address again", 54, 208, (0, 1, 2, 0), "allowed"),
    ("no delay", 54, 208, (0, 6, 7, 0), "allowed"),
    ("core dumps", 160, 164, (4, 1, 0, 0), "done"),
    ("open files", 160, 164, (7, 1, 0, 0), "allowed"),
    ("asking for core dumps", 302, 261, (0, 4, 0, 1), "allowed"),
    ("core dumps of a process", 302, 261, (0, 4, 1 << 40, 0), "done"),
    ("core dumps of a process, low address", 302, 261, (0, 4, 1 << 12, 0), "done"),
    ("tcp", 41, 198, (2, 1, 6, 0), "allowed"),
    ("mptcp", 41, 198, (2, 1, 262, 0), 97),
    ("sctp over ipv6", 41, 198, (10, 1, 132, 0), 97),
    ("a pair", 53, 199, (1, 1, 0, 0), "allowed"),
    ("a pair of another family", 53, 199, (30, 1, 0, 0), 97),
]


@pytest.mark.parametrize(("asked", "x86_64", "aarch64", "arguments", "expected"), ARGUMENTS)
def test_calls_that_depend_on_their_arguments(
    asked: str, x86_64: int, aarch64: int, arguments: tuple[int, ...], expected: int | str
) -> None:
    for machine, architecture, number in (("x86_64", 0xC000003E, x86_64), ("aarch64", 0xC00000B7, aarch64)):
        data = struct.pack("=IIQ4Q", number, architecture, 0, *arguments)
        answer = answer_to(seccomp_program(machine), data)
        told = {0x7FFF0000: "allowed", 0x00050000: "done"}.get(answer, answer & 0xFFFF)
        assert told == expected, (asked, machine)


def test_another_machine_has_no_filter() -> None:
    assert seccomp_program("riscv64") == b""


def decide(program: bytes, data: bytes) -> int:
    """Errno that the filter gives to a call, 0 if it lets it through."""
    answer = answer_to(program, data)
    return 0 if answer == 0x7FFF0000 else answer & 0xFFFF


def answer_to(program: bytes, data: bytes) -> int:
    """What the filter returns: the kernel's interpreter of classic BPF."""
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if holds else if_false


def test_a_sandbox_that_is_killed_from_outside_is_an_outcome(sandbox: SandboxKind, tmp_path: Path) -> None:
    for victim in (0, 1):
        with sandbox_folder() as folder:
            limits = SandboxLimits(wall_seconds=60, cpu_seconds=60)
            argv = ["sh", "-c", "echo started; exec sleep 1000"]
            with Sandboxed(sandbox, argv, writable={wall.FOLDER: folder}, limits=limits, environment={}) as running:
                assert os.read(running.stdout_fd, 100) == b"started\n"
                bwrap = usage.children(os.getpid())
                tree = next(tree for tree in map(usage.process_tree, bwrap) if len(tree) > 2)
                os.kill(tree[victim], 9)
                stdout, stderr = running.communicate(time.monotonic() + 60)
                assert running.outcome(stdout, stderr, 0.0).ended == "signal"


@pytest.mark.slow
def test_what_stands_still_is_ended(sandbox: SandboxKind, tmp_path: Path) -> None:
    stopped = run_python(sandbox, tmp_path, "import os; os.kill(os.getpid(), 19)")
    assert (stopped.ended, stopped.returncode) == ("idle", None)
    asleep = run_python(sandbox, tmp_path, "import time; time.sleep(50)", cpu_seconds=1)
    assert asleep.ended == "idle"
    assert max(stopped.seconds, asleep.seconds) < 30


def test_what_nobody_waits_for_is_counted() -> None:
    def seen(pid: int, own: int, waited: int) -> usage.Process:
        return usage.Process(pid, pid, "S", own, waited, 1, 0)

    ticks = os.sysconf("SC_CLK_TCK")
    time_used = usage.ProcessorTime()
    # No process has these ids.
    parent, child, other = 2**30, 2**30 + 1, 2**30 + 2
    assert time_used.update([seen(parent, 5, 0), seen(child, 100, 0), seen(other, 50, 10)]) * ticks == 165
    # One is waited for, after 20 ticks more; of the other nobody tells. Never is more counted than was used.
    assert time_used.update([seen(parent, 5, 120)]) * ticks == 165
    assert time_used.update([seen(parent, 6, 120)]) * ticks == 166
    assert time_used.update([]) * ticks == 166
