"""Who am I among the processes of a run, and if nobody started them: start them here.

``resolve_environment`` reads the variables of torchrun or srun, and ``spawn_local`` starts the ranks of one machine,
which then find torchrun's variables. Invariant: no rank outlives ``spawn_local``, nor its process, however that one
ends. Linux only; no torch, so that a launcher costs little memory.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

# A run that was asked to stop has saved its state and is to be started again: neither success nor failure.
REQUEUE_EXIT_CODE = 85
# The watchdog ended a job in which a rank was lost or a collective hung.
WATCHDOG_EXIT_CODE = 86
# Too many steps in a row had a loss or gradient that was not finite; all ranks end alike.
NOT_FINITE_EXIT_CODE = 87
# For the rendezvous: below the range that the kernel hands out itself.
_PORTS = range(15000, 30000)
# Set for the ranks of spawn_local, which sees itself which of them ends first.
SUPERVISED = "REFLECTRON_SUPERVISED"
# A secret of one run's ranks: they sign with it what they tell each other. spawn_local sets it.
RUN_SECRET = "REFLECTRON_RUN_SECRET"
# The watchdogs of the ranks say more of a rank that stands still; the launcher speaks where none of them is left to.
_AFTER_WATCHDOG_S = 10.0
_LOOK_S = 1.0
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class ProcessPlace:
    """Place of this process in the run, and where rank 0 listens."""

    rank: int
    """0 to ``world_size - 1``."""
    world_size: int
    """Processes of the run, over all machines."""
    local_rank: int
    """Index among the processes of this machine; picks the device."""
    master_address: str
    """Host of rank 0."""
    master_port: int
    """TCP port of the rendezvous on that host."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, expected 0 to {self.world_size - 1} (world size {self.world_size})")

    def variables(self) -> dict[str, str]:
        """Return the five variables of torchrun, as ``torch.distributed``'s ``env://`` reads them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


def resolve_environment(env: Mapping[str, str]) -> ProcessPlace | None:
    """Return the place that a launcher gave this process, or None when there was no launcher.

    torchrun wins over Slurm, so that one torchrun per Slurm task works. A Slurm step of one task counts as no launcher,
    be it that of an interactive shell, and so do salloc without srun and the body of an sbatch script: they see
    SLURM_NTASKS of the whole job, but only srun sets SLURM_STEP_*.

    Raises:
        ValueError: the launcher's variables are incomplete or not numbers, or the first node has no address.
    """
    in_step = "SLURM_STEP_ID" in env or "SLURM_STEP_NODELIST" in env
    # enroot's hook for PyTorch names the ranks of a step, but their address only where the container has scontrol.
    if ("RANK" in env or "LOCAL_RANK" in env) and (env.get("MASTER_ADDR") or not in_step):
        return ProcessPlace(
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK"),
            master_address=_text(env, "MASTER_ADDR"),
            master_port=_integer(env, "MASTER_PORT"),
        )
    if in_step:
        tasks = _integer(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
        return _slurm_place(env, tasks) if tasks > 1 else None
    return None


def _slurm_place(env: Mapping[str, str], tasks: int) -> ProcessPlace:
    nodes = _text(env, "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST")
    return ProcessPlace(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=tasks,
        local_rank=_integer(env, "SLURM_LOCALID"),
        master_address=env.get("MASTER_ADDR") or _resolvable_address(first_host(nodes), env),
        master_port=_integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else _slurm_port(env),
    )


def _resolvable_address(node: str, env: Mapping[str, str]) -> str:
    """Return ``node``, or where this machine cannot resolve that name, another address of it that it can."""
    for address in _addresses(node, env):
        with suppress(OSError):
            socket.getaddrinfo(address, None)
            return address
    raise ValueError(f"MASTER_ADDR is not set, expected an address of {node}, a name that this machine cannot resolve")


def _addresses(node: str, env: Mapping[str, str]) -> Iterator[str]:
    """Yield what ``node``, the first of the step, may be reached by; in containers and without DNS not by its name."""
    yield node
    if shutil.which("scontrol"):
        command = ["scontrol", "--oneliner", "show", "node", node]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        if found := re.search(r"\bNodeAddr=(\S+)", shown):
            yield found[1]
    # Where srun ran: the first node, if that was in a batch script.
    if address := env.get("SLURM_LAUNCH_NODE_IPADDR"):
        yield address


def first_host(node_list: str) -> str:
    """Return the first host of Slurm's compressed list: ``node[003-005,9],other`` -> ``node003``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", node_list).split(",")[0]


def _slurm_port(env: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step compute alike."""
    # The prime keeps the steps of consecutive jobs apart, which often share a machine.
    job, step = _integer(env, "SLURM_JOB_ID"), int(env.get("SLURM_STEP_ID", 0))
    return _PORTS[(job * 131 + step) % len(_PORTS)]


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} is not set, expected the launcher (torchrun or srun) to set it")
    return env[name]


def _integer(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r}, expected a number from the launcher (torchrun or srun)")
    return int(text)


@dataclass(frozen=True)
class _Exited:
    """Rank ``rank`` has ended and waits to be reaped."""

    rank: int


@dataclass(frozen=True)
class _Stopped:
    """Rank ``rank`` was stopped, or continued."""

    rank: int
    stopped: bool


@dataclass(frozen=True)
class _Signalled:
    """This process received the signal ``number``."""

    number: int


_Event = _Exited | _Stopped | _Signalled


def spawn_local(
    command: list[str],
    processes: int,
    *,
    threads_per_process: int,
    log_dir: Path,
    grace_s: float = 30.0,
    silence_s: float = 40.0,
) -> int:
    """Run ``processes`` copies of ``command`` as the ranks of one run on this machine, and wait for all of them.

    Rank 0 writes to this terminal, rank N to ``<log_dir>/rank_N.log``. When one fails, the others get SIGTERM; who
    still runs ``grace_s`` seconds later is killed. SIGINT, SIGTERM and SIGUSR1 to this process are passed on to all.
    After SIGINT they have ``grace_s`` seconds as well; after the other two as long as they need to save their state,
    for whoever sent the signal knows the time limit. At a second SIGINT or SIGTERM all are killed. Must be called from
    the main thread: signal handlers live there, and a rank dies with the thread that started it.

    A rank that stays stopped (SIGSTOP) for ``silence_s`` seconds and some more, in which the others may notice it
    themselves, ends the run. Time in which this process stood still itself is not counted.

    Returns:
        0 when all ranks returned 0; ``REQUEUE_EXIT_CODE`` when they ended with that; ``WATCHDOG_EXIT_CODE`` when one
        stayed stopped; otherwise the exit code of the rank that failed first, or 128 + n after signal n. A line on
        stderr names that rank and shows the end of its log.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    port, secret = free_port(), secrets.token_hex(16)
    events: SimpleQueue[_Event] = SimpleQueue()
    ranks: list[subprocess.Popen[bytes]] = []
    # SimpleQueue.put is reentrant, the one thing a signal handler may safely do here.
    with _signals_to(events):
        try:
            for rank in range(processes):
                place = ProcessPlace(
                    rank=rank, world_size=processes, local_rank=rank, master_address="127.0.0.1", master_port=port
                )
                ranks.append(_start(command, place, threads_per_process, log_dir, secret))
            for rank, process in enumerate(ranks):
                threading.Thread(target=_watch, args=(rank, process.pid, events), daemon=True).start()
            return _Supervisor(ranks, events, log_dir, grace_s, silence_s + _AFTER_WATCHDOG_S).run()
        finally:
            for process in ranks:
                _end(process)


class _Supervisor:
    """Handles exits, stops and signals in the order they happened until no rank runs."""

    def __init__(
        self,
        ranks: list[subprocess.Popen[bytes]],
        events: SimpleQueue[_Event],
        log_dir: Path,
        grace_s: float,
        stopped_s: float,
    ) -> None:
        self.ranks, self.events, self.log_dir = ranks, events, log_dir
        self.grace_s, self.stopped_s = grace_s, stopped_s
        self.running = set(range(len(ranks)))
        self.stopped: dict[int, float] = {}
        """Ranks that stand still, with the seconds that they were seen to."""
        self.asked = self.failure = self.requeue = 0
        self.sent: set[int] = set()
        self.ending = False
        self.deadline: float | None = None

    def run(self) -> int:
        """Return the exit code of the run."""
        while self.running:
            event = self._next()
            if isinstance(event, _Signalled):
                self._signalled(event.number)
            elif isinstance(event, _Exited):
                self._exited(event.rank)
            elif isinstance(event, _Stopped):
                self.stopped.pop(event.rank, None)
                if event.stopped:
                    self.stopped[event.rank] = 0.0
            elif self.deadline is not None and time.monotonic() >= self.deadline:
                self._send(signal.SIGKILL)
                self.deadline = None
            if not self.ending and any(seconds > self.stopped_s for seconds in self.stopped.values()):
                self._stands_still()
        return self.failure or self.requeue or (128 + self.asked if self.asked else 0)

    def _next(self) -> _Event | None:
        """Return the next event; None when it is time to look at the clock."""
        began = time.monotonic()
        waits = [max(0.0, self.deadline - began)] if self.deadline is not None else []
        waits += [_LOOK_S] if self.stopped else []
        try:
            return self.events.get(timeout=min(waits, default=None))
        except Empty:
            return None
        finally:
            # Longer only if this process stood still itself, as all do in a suspended job.
            passed = min(time.monotonic() - began, 2 * _LOOK_S)
            self.stopped = {rank: seconds + passed for rank, seconds in self.stopped.items()}

    def _send(self, number: int) -> None:
        self.sent.add(number)
        for rank in self.running:
            _signal_group(self.ranks[rank], number)

    def _signalled(self, number: int) -> None:
        self.asked = self.asked or number
        # Slurm sends SIGTERM some time after the SIGUSR1 that it was told to send; that is not impatience.
        gently = not self.ending or number == signal.SIGUSR1
        self._send(number if gently else signal.SIGKILL)
        self.ending = self.ending or number != signal.SIGUSR1
        if number == signal.SIGINT:
            self.deadline = time.monotonic() + self.grace_s

    def _exited(self, rank: int) -> None:
        self.running.discard(rank)
        self.stopped.pop(rank, None)
        code = _end(self.ranks[rank])
        if code == REQUEUE_EXIT_CODE:
            self.requeue = code
        elif code and not self.failure and not any(code in (-number, 128 + number) for number in self.sent):
            self.failure = code if code > 0 else 128 - code
            if code != NOT_FINITE_EXIT_CODE:
                _report_failure(rank, code, self.log_dir)
            # A rank that the watchdog found stopped does not hear SIGTERM.
            self._send(signal.SIGKILL if code == WATCHDOG_EXIT_CODE else signal.SIGTERM)
            self.ending, self.deadline = True, time.monotonic() + self.grace_s

    def _stands_still(self) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(self.stopped))
        seconds = max(self.stopped.values())
        print(
            f"reflectron: rank {ranks} was stopped (SIGSTOP) for {seconds:.0f} s; all ranks are ended, and the same "
            f"command resumes from the last checkpoint (exit code {WATCHDOG_EXIT_CODE})",
            file=sys.stderr,
            flush=True,
        )
        self.failure, self.ending = WATCHDOG_EXIT_CODE, True
        self._send(signal.SIGKILL)


def _start(
    command: list[str], place: ProcessPlace, threads: int, log_dir: Path, secret: str
) -> subprocess.Popen[bytes]:
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(threads))
    # Gloo resolves the machine's own name, which fails in many containers, and would listen where others reach it.
    env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = "lo"
    env[RUN_SECRET] = secret
    # A killed rank must not take the last lines of its log along.
    env["PYTHONUNBUFFERED"] = "1"
    env[SUPERVISED] = "1"
    # Started from a clone, `python -m` would put the clone's kernels/ and tools/ before installed packages.
    env["PYTHONSAFEPATH"] = "1"
    parent = os.getpid()
    with nullcontext() if place.rank == 0 else open(_log_file(log_dir, place.rank), "wb") as log:
        return subprocess.Popen(
            command,
            env=env | place.variables(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            # A session of its own: signals reach a rank's helper processes too, and Ctrl-C comes once, through us.
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with(parent: int) -> None:
    """Have the kernel kill a new rank, before its exec, when its parent dies, even by SIGKILL."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)


def _watch(rank: int, pid: int, events: SimpleQueue[_Event]) -> None:
    while True:
        # WNOWAIT leaves the rank a zombie: until _end reaps it, its process group cannot belong to a stranger.
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOWAIT)
        assert result is not None, "WNOHANG is not set"
        if result.si_code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
            events.put(_Exited(rank))
            return
        # A rank that has exited in the meantime is no child to wait for here; the next turn finds it.
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
        events.put(_Stopped(rank, result.si_code == os.CLD_STOPPED))


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill what is left of a rank and its processes; return its exit code, negative for a signal."""
    if process.returncode is None:
        _signal_group(process, signal.SIGKILL)
    return process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    os.killpg(process.pid, number)


@contextmanager
def _signals_to(events: SimpleQueue[_Event]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        events.put(_Signalled(number))

    previous = {number: signal.signal(number, forward) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Return a port that nobody listens on. Rank 0 takes it seconds later, so not one that the kernel hands out
    meanwhile."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {_PORTS[0]} to {_PORTS[-1]} is free, expected one for the rendezvous of the ranks")


def _log_file(log_dir: Path, rank: int) -> Path:
    return log_dir / f"rank_{rank}.log"


def _report_failure(rank: int, code: int, log_dir: Path) -> None:
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    line = f"reflectron: rank {rank} failed first: {how}"
    if code == WATCHDOG_EXIT_CODE:
        line = f"reflectron: the watchdog of rank {rank} ended the run: {how}"
    if code == -signal.SIGBUS:
        line += ", as when a file that is mapped into memory was cut short (token store, weights)"
    if rank > 0:
        path = _log_file(log_dir, rank)
        tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        line = "\n".join([f"{line}; the end of {path}:", *(f"  {text}" for text in tail)])
    print(line, file=sys.stderr, flush=True)
