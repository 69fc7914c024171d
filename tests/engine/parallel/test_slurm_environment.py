"""Ranks from Slurm's variables, as recorded in steps of a two-node job on Slurm 22.05."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from reflectron.engine.parallel.launch import first_host, resolve_environment
from reflectron.engine.parallel.process_groups import device_index

# What salloc's shell on the login node sees, and what steps inherit: 2 nodes, 2 tasks on each.
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "node[1-2]",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_SUBMIT_HOST": "login",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# The body of an sbatch script: task 0 of the job, but no step.
BATCH_SCRIPT = JOB | {"SLURMD_NODENAME": "node1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
# Last task of `srun` over the whole job.
STEP = JOB | {
    "SLURMD_NODENAME": "node2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# Last task of `srun -N1 -n2 -w node2` in the same job.
STEP_ON_NODE2 = STEP | {
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEPID": "2",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}
# salloc's shell on the first node (LaunchParameters=use_interactive_step): a step of one task that keeps SLURM_NTASKS.
INTERACTIVE_STEP = STEP | {
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def known_hosts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names that resolve; there is neither DNS nor Slurm otherwise."""
    known = {"node1", "node2"}

    def lookup(host: str, port: None) -> None:
        if host not in known and not host[0].isdecimal():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("PATH", "")
    return known


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def placed(env: dict[str, str]) -> tuple[int, int, int, str]:
    place = resolve_environment(env)
    assert place is not None
    return place.rank, place.world_size, place.local_rank, place.master_address


def port(**changes: str) -> int:
    place = resolve_environment(STEP | changes)
    assert place is not None
    return place.master_port


def test_a_task_of_a_step() -> None:
    assert placed(STEP) == (3, 4, 1, "node1")


def test_a_step_on_some_of_the_nodes_has_ranks_of_its_own() -> None:
    assert placed(STEP_ON_NODE2) == (1, 2, 1, "node2")


@pytest.mark.parametrize(
    "env",
    [
        JOB,
        BATCH_SCRIPT,
        INTERACTIVE_STEP,
        STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        without(STEP, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["salloc", "batch script", "interactive step", "one task", "one task, by the job's variable"],
)
def test_who_is_alone_starts_its_own_ranks(env: dict[str, str]) -> None:
    assert resolve_environment(env) is None


def test_the_port_is_alike_in_a_step_and_differs_between_steps() -> None:
    assert port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0") == port()
    assert len({port(SLURM_JOB_ID=job, SLURM_STEP_ID=step) for job in ("7", "8") for step in ("0", "1")}) == 4


@pytest.mark.parametrize("job", ["1", "7", "09", "4711", "99999999"])
@pytest.mark.parametrize("step", ["0", "4294967290"])
def test_the_port_is_below_those_of_the_kernel(job: str, step: str) -> None:
    assert 15000 <= port(SLURM_JOB_ID=job, SLURM_STEP_ID=step) < 30000


def test_an_address_that_is_set_wins() -> None:
    place = resolve_environment(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"})
    assert place is not None
    assert (place.master_address, place.master_port) == ("10.0.0.9", 1234)


def test_without_variables_of_the_step_those_of_the_job_are_taken() -> None:
    assert placed(without(STEP, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")) == (3, 4, 1, "node1")


def test_torchrun_inside_srun_wins() -> None:
    assert placed(STEP | TORCHRUN) == (5, 8, 1, "node1")


def test_a_container_that_names_ranks_without_their_address() -> None:
    """What enroot's 50-slurm-pytorch.sh adds where the container has no scontrol."""
    hook = {"MASTER_PORT": "61007", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert placed(STEP | hook) == (3, 4, 1, "node1")


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """A command that answers as ``scontrol --oneliner show node`` does."""
    command = folder / "scontrol"
    command.write_text(f"#!/bin/sh\n[ \"$*\" = '--oneliner show node node1' ] && echo '{line}'\n", encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")


def test_a_name_that_does_not_resolve_is_asked_of_slurm(
    known_hosts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_hosts.clear()
    scontrol(tmp_path, monkeypatch, "NodeName=node1 Gres=gpu:8 NodeAddr=10.0.0.5 NodeHostName=node1 Port=6818")
    assert placed(STEP)[-1] == "10.0.0.5"


@pytest.mark.parametrize("answer", ["NodeName=node1 NodeAddr=node1 NodeHostName=node1", ""], ids=["name", "nothing"])
def test_where_slurm_knows_no_more_the_node_of_srun_is_taken(
    answer: str, known_hosts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_hosts.clear()
    scontrol(tmp_path, monkeypatch, answer)
    assert placed(STEP)[-1] == "10.0.0.1"


def test_a_node_without_any_address_is_named(known_hosts: set[str]) -> None:
    known_hosts.clear()
    with pytest.raises(ValueError, match="MASTER_ADDR is not set, expected an address of node1, a name that"):
        resolve_environment(without(STEP, "SLURM_LAUNCH_NODE_IPADDR"))


def test_an_incomplete_step_is_named() -> None:
    with pytest.raises(ValueError, match="SLURM_LOCALID is not set"):
        resolve_environment(without(STEP, "SLURM_LOCALID"))


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node003", "node003"),
        ("node1,node2", "node1"),
        ("node[003-005,9],other", "node003"),
        ("node[7,9]", "node7"),
        ("rack[1-2]-n[01-04].cluster", "rack1-n01.cluster"),
        ("gpu-a100-[12]", "gpu-a100-12"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (7, 1, 0)], ids=["first", "last", "--gpus-per-task=1"]
)
def test_the_device_of_a_rank(local_rank: int, visible: int, index: int) -> None:
    assert device_index(local_rank, visible) == index


def test_a_rank_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="local rank 4 sees 4 CUDA devices, expected one for each rank of a machine"):
        device_index(4, 4)
