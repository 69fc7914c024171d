"""Launching: the launchers' variables, and ranks started here that never outlive their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest

from reflectron.engine.parallel import launch
from reflectron.engine.parallel.launch import (
    REQUEUE_EXIT_CODE,
    WATCHDOG_EXIT_CODE,
    ProcessPlace,
    resolve_environment,
    spawn_local,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_torchrun() -> None:
    place = resolve_environment(TORCHRUN)
    assert place == ProcessPlace(rank=5, world_size=8, local_rank=1, master_address="node1", master_port=29500)
    assert place.variables() == TORCHRUN


@pytest.mark.parametrize("env", [{}, {"WORLD_SIZE": "8", "MASTER_ADDR": "node1"}], ids=["bare", "no rank"])
def test_not_launched(env: dict[str, str]) -> None:
    assert resolve_environment(env) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first', expected a number"),
        (TORCHRUN | {"RANK": "8"}, "rank is 8, expected 0 to 7"),
    ],
)
def test_incomplete_launchers_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_environment(env)


def spawn(script: str, processes: int, folder: Path, *arguments: str, grace_s: float = 10.0) -> int:
    command = [sys.executable, "-S", "-c", script, *arguments]
    return spawn_local(command, processes, threads_per_process=3, log_dir=folder / "logs", grace_s=grace_s)


def test_ranks_find_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    script = "import json, os, sys; json.dump(dict(os.environ), open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w'))"
    assert spawn(script, 3, tmp_path, str(tmp_path)) == 0
    environments = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    places = [resolve_environment(env) for env in environments]
    assert [place and (place.rank, place.local_rank, place.world_size) for place in places] == [
        (0, 0, 3),
        (1, 1, 3),
        (2, 2, 3),
    ]
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in environments}) == 1
    assert all((env["OMP_NUM_THREADS"], env["PYTHONSAFEPATH"]) == ("3", "1") for env in environments)


def test_a_set_thread_count_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert spawn("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'] != '7')", 1, tmp_path) == 0


def test_only_rank_0_writes_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn("import os; print('I am rank', os.environ['RANK'])", 2, tmp_path) == 0
    assert capfd.readouterr().out == "I am rank 0\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "I am rank 1\n"
    assert not (tmp_path / "logs" / "rank_0.log").exists()


# Every rank but the one named on the command line waits for a signal that ends it.
FAILING = "import os, signal, sys\nif os.environ['RANK'] != sys.argv[1]: signal.pause()\n"


def test_the_first_failure_ends_all_and_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn(FAILING + "print('disk gone')\nsys.exit(3)", 3, tmp_path, "1") == 3
    log = tmp_path / "logs" / "rank_1.log"
    assert capfd.readouterr().err == (f"reflectron: rank 1 failed first: exit code 3; the end of {log}:\n  disk gone\n")


def test_a_failure_of_rank_0_needs_no_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn(FAILING + "sys.exit(2)", 2, tmp_path, "0") == 2
    assert capfd.readouterr().err == "reflectron: rank 0 failed first: exit code 2\n"


def test_a_killed_rank_is_named_by_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn(FAILING + "os.kill(os.getpid(), signal.SIGKILL)", 2, tmp_path, "1") == 128 + signal.SIGKILL
    assert "rank 1 failed first: killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    # Rank 0 fails only once rank 1 has said through the fifo that it ignores SIGTERM.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = (
        "import os, signal, sys\n"
        "if os.environ['RANK'] == '0': open(sys.argv[1]).read(); sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(sys.argv[1], 'w').close()\n"
        "while True: signal.pause()\n"
    )
    assert spawn(script, 2, tmp_path, str(fifo), grace_s=0.1) == 4


def test_a_rank_that_hears_nothing_does_not_delay_the_watchdog(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import os, signal, sys\n"
        "if os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGSTOP)\n"
        "print('nothing was heard from rank 0'); sys.exit(86)\n"
    )
    start = time.monotonic()
    assert spawn(script, 2, tmp_path, grace_s=60) == WATCHDOG_EXIT_CODE
    assert time.monotonic() - start < 30
    log = tmp_path / "logs" / "rank_1.log"
    expected = f"reflectron: the watchdog of rank 1 ended the run: exit code 86; the end of {log}:\n"
    assert capfd.readouterr().err == f"{expected}  nothing was heard from rank 0\n"


# Every rank stops the one named on the command line, which may be itself, and waits.
STOPPING = "import os, signal, sys\nif os.environ['RANK'] == sys.argv[1]: os.kill(os.getpid(), signal.SIGSTOP)\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_stays_stopped_ends_the_run(
    rank: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_AFTER_WATCHDOG_S", 0.2)
    monkeypatch.setattr(launch, "_LOOK_S", 0.1)
    command = [sys.executable, "-S", "-c", STOPPING + "signal.pause()", rank]
    code = spawn_local(command, 2, threads_per_process=1, log_dir=tmp_path, silence_s=0.3)
    assert code == WATCHDOG_EXIT_CODE
    assert capfd.readouterr().err.startswith(f"reflectron: rank {rank} was stopped (SIGSTOP) for ")


def test_a_rank_that_stops_for_a_while_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_LOOK_S", 0.05)
    # Each is continued by a child of its own, after a time that the launcher has seen it stand still.
    script = (
        "import os, signal, sys, time\npid = os.getpid()\n"
        "if os.fork() == 0: time.sleep(0.5); os.kill(pid, signal.SIGCONT); os._exit(0)\n"
        "os.kill(pid, signal.SIGSTOP)\nos.wait()\n"
    )
    assert spawn(script, 2, tmp_path) == 0


def test_a_rank_that_ends_just_as_it_continues_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    waitid, events = os.waitid, SimpleQueue[object]()
    with subprocess.Popen(["sleep", "60"]) as process:

        def kill_after_continuing(kind: int, pid: int, options: int) -> os.waitid_result | None:
            result = waitid(kind, pid, options)
            if result is not None and result.si_code == os.CLD_CONTINUED:
                process.kill()
                waitid(kind, pid, os.WEXITED | os.WNOWAIT)
            return result

        monkeypatch.setattr(os, "waitid", kill_after_continuing)
        watcher = threading.Thread(target=launch._watch, args=(0, process.pid, events), daemon=True)
        watcher.start()
        process.send_signal(signal.SIGSTOP)
        assert events.get(timeout=20) == launch._Stopped(0, True)
        process.send_signal(signal.SIGCONT)
        assert events.get(timeout=20) == launch._Stopped(0, False)
        assert events.get(timeout=20) == launch._Exited(0)
        watcher.join()


def test_time_in_which_all_stand_still_is_not_counted(tmp_path: Path) -> None:
    # As in a suspended job: the launcher is stopped as well, and longer than ranks may be alone.
    fifo, done = tmp_path / "fifo", tmp_path / "done"
    os.mkfifo(fifo)
    launcher = LAUNCHER.replace("grace_s=10", "grace_s=10, silence_s=0.3").replace(
        "sys.exit(",
        "from reflectron.engine.parallel import launch\nlaunch._AFTER_WATCHDOG_S, launch._LOOK_S = 0.3, 0.1\nsys.exit(",
    )
    script = (
        "import os, sys, time\nup = open(sys.argv[1], 'w')\nup.write(f'{os.getpid()}\\n'); up.flush()\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.01)\n"
    )
    words = [sys.executable, "-c", launcher, script, str(fifo), str(done), str(tmp_path / "logs")]
    with subprocess.Popen(words) as process:
        with open(fifo) as up:
            everybody = [*(int(up.readline()) for _ in range(2)), process.pid]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
        done.touch()
        assert process.wait(timeout=20) == 0


def test_ranks_share_a_secret_and_stay_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv(launch.RUN_SECRET, "of another run")
    script = "import json, os, sys; json.dump(dict(os.environ), open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w'))"
    secrets = set()
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        assert spawn(script, 2, tmp_path, str(tmp_path / run)) == 0
        found = [json.loads((tmp_path / run / str(rank)).read_text()) for rank in range(2)]
        assert all(env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo" for env in found)
        assert found[0][launch.RUN_SECRET] == found[1][launch.RUN_SECRET]
        secrets.add(found[0][launch.RUN_SECRET])
    assert len(secrets | {"of another run"}) == 3


def test_a_file_cut_short_under_a_memory_map_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn(FAILING + "os.kill(os.getpid(), signal.SIGBUS)", 2, tmp_path, "0") == 128 + signal.SIGBUS
    error = capfd.readouterr().err
    assert error.startswith(
        "reflectron: rank 0 failed first: killed by SIGBUS, as when a file that is mapped into memory"
    )


def test_a_missing_program_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spawn_local([str(tmp_path / "none")], 2, threads_per_process=1, log_dir=tmp_path)


# A launcher in a process of its own. Each rank starts a helper, writes both process ids into the fifo and waits; a fifo
# that nobody holds open for writing any more proves that all of them are gone.
RANK_WITH_HELPER = (
    "import os, signal, subprocess, sys\n"
    "fifo = open(sys.argv[1], 'w')\n"
    "wait = [sys.executable, '-S', '-c', 'import signal; signal.pause()']\n"
    "if sys.argv[2] == 'helper': subprocess.Popen(wait, pass_fds=[fifo.fileno()])\n"
    "fifo.write('up\\n'); fifo.flush()\n"
    "signal.pause()\n"
)
LAUNCHER = (
    "import sys; from pathlib import Path\n"
    "from reflectron.engine.parallel.launch import spawn_local\n"
    "command = [sys.executable, '-S', '-c', sys.argv[1], *sys.argv[2:4]]\n"
    "sys.exit(spawn_local(command, 2, threads_per_process=1, log_dir=Path(sys.argv[4]), grace_s=10))\n"
)


def signal_launcher(number: int, helper: str, folder: Path) -> int:
    """Start a launcher, signal it once both ranks are up, and wait until no process of it is left."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", LAUNCHER, RANK_WITH_HELPER, str(fifo), helper, str(folder / "logs")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher, open(fifo) as alive:
        assert [alive.readline() for _ in range(2)] == ["up\n", "up\n"]
        launcher.send_signal(number)
        assert alive.read() == ""
    return launcher.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_end_ranks_and_their_helpers(number: int, tmp_path: Path) -> None:
    start = time.monotonic()
    assert signal_launcher(number, "helper", tmp_path) == 128 + number
    assert time.monotonic() - start < 9, "the ranks ended by SIGKILL after the grace, not by the signal"


# Ranks that save their state when asked to stop.
SAVING = (
    "import os, signal, sys\n"
    "def save(number, frame): open(f'{sys.argv[3]}/{os.environ[\"RANK\"]}', 'w'); sys.exit(int(sys.argv[2]))\n"
    "signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGUSR1, save)\n"
    "fifo = open(sys.argv[1], 'w'); fifo.write('up\\n'); fifo.flush()\n"
    "while True: signal.pause()\n"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("code", "expected"), [(REQUEUE_EXIT_CODE, REQUEUE_EXIT_CODE), (1, 1)])
def test_ranks_that_save_when_asked_to_stop(number: int, code: int, expected: int, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    launcher = LAUNCHER.replace("[2:4]", "[2:5]").replace("sys.argv[4]", "sys.argv[5]")
    words = [str(fifo), str(code), str(tmp_path), str(tmp_path / "logs")]
    with subprocess.Popen([sys.executable, "-c", launcher, SAVING, *words], stderr=subprocess.PIPE) as process:
        with open(fifo) as ready:
            assert [ready.readline() for _ in range(2)] == ["up\n", "up\n"]
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == expected
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
    assert (b"failed first" in stderr) == (code != REQUEUE_EXIT_CODE)


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    assert signal_launcher(signal.SIGKILL, "no helper", tmp_path) == -signal.SIGKILL
