"""Where ranks of one machine meet, no other machine comes in; and what a stranger writes there is nobody's note."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import psutil
import pytest

from reflectron.engine.parallel.judge import Note, Seal, note_text, read_note
from reflectron.engine.parallel.launch import RUN_SECRET
from reflectron.engine.parallel.process_groups import connect_again, is_loopback, join_store


def listening(pid: int | None = None) -> set[tuple[str, int]]:
    """Addresses and ports on which a process listens."""
    found = psutil.Process(pid).net_connections(kind="inet")
    return {(item.laddr.ip, item.laddr.port) for item in found if item.status == psutil.CONN_LISTEN}


def own_addresses() -> list[str]:
    """Return those of this machine's addresses that others may reach."""
    found = [
        item.address for items in psutil.net_if_addrs().values() for item in items if item.family == socket.AF_INET
    ]
    return [address for address in found if not is_loopback(address)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> int:
    """The variables of a job of one process; its port."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    # Set by what is tested; the fixture takes it back.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    return port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.1.1"])
def test_the_store_of_one_machine_listens_on_loopback_alone(
    host: str, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    before = listening()
    store = join_store(5)
    (found,) = listening() - before
    assert is_loopback(found[0])
    assert found[1] == alone
    for address in own_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, alone), timeout=5)
    connect_again(5).set("key", "value")
    assert store.get("key") == b"value"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_store_of_several_machines_listens_where_they_reach_it(alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own_addresses():
        pytest.skip("this machine has no address but loopback")
    monkeypatch.setenv("MASTER_ADDR", own_addresses()[0])
    store = join_store(5)
    connect_again(5).set("key", "value")
    assert store.get("key") == b"value"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_port_that_is_taken_is_named(alone: int) -> None:
    with socket.create_server(("127.0.0.1", alone)), pytest.raises(OSError, match=f"port {alone} of 127.0.0.1, where"):
        join_store(5)


def test_a_sealed_note_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_SECRET, "of this run")
    note, seal = Note(host="node1", step=3, phase="training", beats=7, words="OSError: no room", order=1), Seal()
    text = seal.open("rank1", seal.close("rank1", note_text(note)).encode())
    assert text is not None
    assert read_note(text) == note


def test_what_no_rank_of_this_run_wrote_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_SECRET, "of this run")
    ours = Seal()
    monkeypatch.setenv(RUN_SECRET, "of another")
    theirs = Seal()
    assert theirs.prefix() != ours.prefix()
    text = note_text(Note())
    for sealed in (
        theirs.close("rank1", text),
        ours.close("rank2", text),
        ours.close("rank1", text)[1:],
        text,
        "",
        ours.close("rank1", "x" * 9000),
    ):
        assert ours.open("rank1", sealed.encode()) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 7000,
        json.dumps(asdict(Note()) | {"more": 1}),
        json.dumps(asdict(Note()) | {"step": "1"}),
        json.dumps(asdict(Note()) | {"step": True}),
        json.dumps(asdict(Note()) | {"beats": 1.5}),
        json.dumps(asdict(Note()) | {"words": None}),
        json.dumps(asdict(Note()) | {"words": ["x"]}),
        '{"host": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_note_is_none(content: str) -> None:
    assert read_note(content) is None


def test_words_of_others_are_fit_for_a_terminal() -> None:
    hostile = Note(host="\x1b]0;gotcha\x07", phase="a\nb", words="\x1b[2J" + "x" * 5000, beats=-5, step=10**30)
    found = read_note(note_text(hostile))
    assert found is not None
    assert all(text.isprintable() for text in (found.host, found.phase, found.words))
    assert len(found.words) <= 500
    assert (found.beats, found.step) == (0, 1 << 53)


RANK = """
import os, sys, psutil, torch.distributed as dist
from reflectron.engine.config import ParallelConfig
from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
groups = start_process_groups(ParallelConfig(device="cpu", tensor_model_parallel_size=2), 1)
groups.barrier()
found = [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
open(f"{sys.argv[1]}/{groups.tp.rank()}", "w").write(" ".join(found))
stop_process_groups()
"""


@pytest.mark.slow
def test_nothing_of_local_ranks_listens_elsewhere(tmp_path: os.PathLike[str]) -> None:
    # Whatever the environment of a cluster says.
    launcher = (
        "import sys; from pathlib import Path\n"
        "from reflectron.engine.parallel.launch import spawn_local\n"
        "words = [sys.executable, '-W', 'ignore', '-c', sys.argv[1], sys.argv[2]]\n"
        "sys.exit(spawn_local(words, 2, threads_per_process=1, log_dir=Path(sys.argv[2]) / 'logs'))\n"
    )
    env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", launcher, RANK, str(tmp_path)], env=env, check=True, timeout=120)
    for rank in range(2):
        with open(f"{tmp_path}/{rank}") as file:
            addresses = file.read().split()
        assert addresses, "gloo listens, and rank 0's store"
        assert all(map(is_loopback, addresses)), addresses
