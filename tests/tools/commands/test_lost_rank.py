"""``reflectron train`` as srun starts it, a process a rank and nobody above: a killed rank is named by the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.engine.parallel.launch import SUPERVISED, ProcessPlace
from reflectron.tools.bench.harness import write_tiny_run


def start_rank(rank: int, port: int, config: Path) -> subprocess.Popen[str]:
    place = ProcessPlace(rank=rank, world_size=2, local_rank=rank, master_address="127.0.0.1", master_port=port)
    settings = ["train.steps=4000", "checkpoint.save_every=0", "train.heartbeat_timeout_seconds=10"]
    env = {name: value for name, value in os.environ.items() if name != SUPERVISED}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "reflectron.tools.cli", "train", str(config), *settings],
        env=env | place.variables() | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_rank_is_named_with_its_last_step(tmp_path: Path) -> None:
    config = write_tiny_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with start_rank(0, port, config) as main, start_rank(1, port, config) as other:
        assert main.stdout is not None
        for line in main.stdout:
            # Every rank has told several times where it is.
            if line.startswith("step 200/"):
                break
        other.send_signal(signal.SIGKILL)
        output = main.stdout.read()
    assert main.returncode == 86, output
    assert "reflectron: rank 0 ends: nothing was heard from rank 1 (" in output
    assert "it was last seen in step " in output
