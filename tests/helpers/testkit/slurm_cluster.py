"""A Slurm cluster on this machine: munged, slurmctld and two slurmd, each a node with eight GPUs of no use.

Everything lies in one folder and listens on the loopback interface, on free ports. The nodes' names do not resolve, as
on clusters without DNS. No process outlives the cluster: all that carry its SLURM_CONF are killed at its end.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NODES = ("node1", "node2")
GPUS_PER_NODE = 8
# Of the real machine there are fewer cores; nothing is bound to them.
CPUS_PER_NODE = 16
# Generous: a test ends when its condition holds, and CI machines may be busy.
DEADLINE_S = 600.0
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else None


def wait_until(condition: Callable[[], bool], what: str, failed: Callable[[], str | None]) -> None:
    """Return when ``condition`` holds; fail when ``failed`` names a reason or at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while True:
        # Before the condition: what ended meanwhile may have ended as it should.
        reason = failed()
        if condition():
            return
        assert not reason, f"{what} will not happen: {reason}"
        assert time.monotonic() < end, f"{what} has not happened in {DEADLINE_S} s"
        time.sleep(0.1)


class SlurmCluster:
    """A running cluster.

    Args:
        folder: a short path, for it holds Unix sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self._write_configuration()
        munge = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in munge.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        wait_until((self.folder / "munge.socket").exists, "munged's socket", self._dead_daemon)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon(node, "slurmd", "-D", "-N", node)
        wait_until(self._all_idle, "idle nodes", self._dead_daemon)

    def stop(self) -> None:
        """Kill the daemons and everything that they started."""
        # Again until none is left: one may start another meanwhile.
        while pids := self._processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for daemon in self._daemons.values():
                daemon.poll()
            time.sleep(0.02)

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command printed that must succeed."""
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def _write_configuration(self) -> None:
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        for gpu in range(GPUS_PER_NODE):
            # A twin of /dev/null: Slurm numbers only what is a device.
            os.mknod(self.folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        gpus = f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus, encoding="utf-8")
        host = socket.gethostname().split(".")[0]
        controller, *nodes = _free_ports(1 + len(NODES))
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            f"AuthInfo=socket={self.folder}/munge.socket",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/%n.pid",
            # Neither cgroups nor cores of our own, as in a container.
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "GresTypes=gpu",
            "SchedulerParameters=sched_interval=1",
            # The port of a training follows from the id of its job: two clusters on a machine must not meet there.
            f"FirstJobId={random.randint(1, 60_000)}",
            # On a busy machine everything takes its time.
            "MessageTimeout=100",
            "BatchStartTimeout=300",
            # Jobs that have ended are asked about.
            "MinJobAge=86400",
            "KillWait=5",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} "
                f"Gres=gpu:{GPUS_PER_NODE}"
                for node, port in zip(NODES, nodes, strict=True)
            ),
            "PartitionName=all Nodes=ALL Default=YES",
        ]
        Path(self.env["SLURM_CONF"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "state").mkdir()

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _dead_daemon(self) -> str | None:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                return f"{name} ended with {daemon.returncode}:\n{log[-2000:]}"
        return None

    def _all_idle(self) -> bool:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=self.env, capture_output=True, text=True)
        return done.stdout.split() == ["idle"] * len(NODES)

    def _processes(self) -> list[int]:
        ours = f"\0SLURM_CONF={self.env['SLURM_CONF']}\0".encode()
        pids = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if ours in b"\0" + (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
        return pids


@contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster in ``folder``, stopped at the end, however that comes."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, above those of trainings and below those that the kernel hands out."""
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(30000, 32768), 2768):
            held = stack.enter_context(socket.socket())
            with suppress(OSError):
                held.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError("no ports from 30000 to 32767 are free")
