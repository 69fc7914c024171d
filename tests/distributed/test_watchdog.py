"""Three real ranks without anybody over them, as srun starts them: who is lost or late is named by all the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.engine.parallel.launch import SUPERVISED, ProcessPlace

SCRIPT = str(Path(__file__).with_name("watchdog_ranks.py"))
RANKS = 3


def run(case: str) -> list[tuple[int, str]]:
    """Exit code and output of each rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != SUPERVISED}
    processes = []
    for rank in range(RANKS):
        place = ProcessPlace(rank=rank, world_size=RANKS, local_rank=rank, master_address="127.0.0.1", master_port=port)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", SCRIPT, case],
                env=env | place.variables() | {"GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    stopped = {"stopped": 1}.get(case)
    # A stopped rank ends only by SIGKILL, once the others have.
    outputs = {rank: process.communicate(timeout=120)[0] for rank, process in enumerate(processes) if rank != stopped}
    if stopped is not None:
        processes[stopped].kill()
        outputs[stopped] = processes[stopped].communicate()[0]
    return [(process.returncode, outputs[rank]) for rank, process in enumerate(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "lost", "code", "verdict"),
    [
        ("hang", 1, 86, "ranks 0, 2 arrived at step 3, training; not arrived: rank 1 in step 3, waiting for data ("),
        ("killed", 2, -signal.SIGKILL, "nothing was heard from rank 2 ("),
        ("killed main", 0, -signal.SIGKILL, "nothing was heard from rank 0 ("),
        ("stopped", 1, -signal.SIGKILL, "nothing was heard from rank 1 ("),
        ("failing", 1, 1, "failed first, in step 3, waiting for data: MemoryError: no room for the activations"),
    ],
)
def test_the_rank_at_fault_is_named_by_the_others(case: str, lost: int, code: int, verdict: str) -> None:
    results = run(case)
    assert results[lost][0] == code, results
    for rank in set(range(RANKS)) - {lost}:
        assert results[rank][0] == 86, results
        assert f"reflectron: rank {rank} ends: " in results[rank][1]
        assert verdict in results[rank][1], results
        assert "finished" not in results[rank][1]


@pytest.mark.slow
def test_a_job_that_comes_to_its_end_is_left_alone() -> None:
    assert run("none") == [(0, "finished\n")] * RANKS
