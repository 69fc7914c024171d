"""A real Slurm: the job scripts of ``examples/slurm`` as they are, stopped by their time limit and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testkit.places import ROOT
from testkit.slurm_cluster import GPUS_PER_NODE, NODES, SlurmCluster, missing, running_cluster, wait_until

STEPS = 12
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
OF_THE_MACHINE = ("step_time_ms", "data_wait_ms", "tokens_per_second", "peak_memory_gib")
# The quickstart, smaller: two ranks share the model, one on each node.
TRAINING = [
    "examples/quickstart/train.yaml",
    f"train.steps={STEPS}",
    "train.validate_every=0",
    "train.tensorboard=false",
    "batch.global_batch_size=4",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    # Not pytest's own folder, whose path is too long for Unix sockets on some machines.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_cluster(Path(folder)) as cluster:
        # Where `reflectron` and `python` are.
        cluster.env["PATH"] = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        # The machine's own name need not resolve either.
        cluster.env["GLOO_SOCKET_IFNAME"] = "lo"
        # No GPUs and no settings for them.
        cluster.env["NODE_ENV"] = "examples/slurm/env/common.sh"
        yield cluster


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that was never stopped."""
    folder = tmp_path_factory.mktemp("unstopped")
    words = [sys.executable, "-m", "reflectron.tools.cli", "train", *TRAINING, f"output_dir={folder}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Job:
    """A submitted job that writes into ``folder``."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *words: str) -> None:
        self.cluster, self.folder, self.log = cluster, folder, folder / "job.log"
        self.id = cluster.run("sbatch", "--parsable", f"--output={self.log}", *words, cwd=ROOT).strip()

    def show(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        return metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    def update(self, setting: str) -> None:
        self.cluster.run("scontrol", "update", f"JobId={self.id}", setting)

    def signal(self, name: str) -> None:
        """To all processes of the training."""
        self.cluster.run("scancel", f"--signal={name}", f"{self.id}.0")

    def failed(self) -> str | None:
        shown = self.show()
        return f"{shown}\n{self.output()}" if shown["JobState"] in ENDED else None

    def is_in(self, state: str) -> bool:
        return self.show()["JobState"] == state


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Complete rows, without what differs between machines."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["srun.sbatch", "torchrun.sbatch"])
def test_a_time_limit_requeues_and_nothing_is_lost(
    cluster: SlurmCluster, unstopped: Path, tmp_path: Path, script: str
) -> None:
    one_rank_each = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    job = Job(cluster, tmp_path, *one_rank_each, f"examples/slurm/{script}", *TRAINING, f"output_dir={tmp_path}")
    wait_until(lambda: len(job.rows()) >= 3, "step 3", job.failed)
    # Slurm looks at time limits twice a minute; the training must not end before it does.
    job.signal("STOP")
    job.update("EndTime=now+10minutes")
    wait_until(lambda: "asked to stop" in job.output(), "the signal before the time limit", job.failed)
    job.signal("CONT")
    wait_until(lambda: job.show()["Restarts"] == "1" and job.is_in("PENDING"), "the requeue", job.failed)
    steps_before = len(job.rows())
    # Until its old credential is out of date, two minutes, a requeued job rests; seconds will do to tell them apart.
    job.update("StartTime=now+3")
    # The limit that was set above counts from the new start, and a slow machine would meet it again.
    job.update("TimeLimit=60")
    wait_until(lambda: job.is_in("COMPLETED"), "the end", job.failed)

    shown = job.show()
    assert {key: shown[key] for key in ("Restarts", "ExitCode", "NodeList", "NumNodes")} == {
        "Restarts": "1",
        "ExitCode": "0:0",
        "NodeList": "node[1-2]",
        "NumNodes": "2",
    }
    output = job.output()
    assert 3 <= steps_before < STEPS
    assert output.count("stopped by a signal; the same command resumes the run (exit code 85)") == 1
    assert f"resuming after step {steps_before} from {tmp_path}/checkpoints/step_{steps_before:08d}" in output
    assert metrics(tmp_path) == metrics(unstopped)
    export, expected = (folder / "export" / "model.safetensors" for folder in (tmp_path, unstopped))
    assert export.read_bytes() == expected.read_bytes()


def submit_step(cluster: SlurmCluster, folder: Path, task: str) -> Job:
    """A job whose one step is not a training but the shell command ``task``."""
    script = folder / "job.sh"
    script.write_text(
        f'#!/usr/bin/env bash\nset -eu\nsource examples/slurm/requeue.sh\nrun_or_requeue srun bash -c "{task}"\n',
        encoding="utf-8",
    )
    return Job(cluster, folder, "--requeue", str(script))


@pytest.mark.slow
def test_a_failed_job_stays_ended(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit_step(cluster, tmp_path, "exit 3")
    wait_until(lambda: job.is_in("FAILED"), "its failure", lambda: None)
    shown = job.show()
    assert (shown["ExitCode"], shown["Restarts"]) == ("3:0", "0"), job.output()


@pytest.mark.slow
def test_a_cancelled_job_stays_ended(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Also when its ranks save and return 85."""
    job = submit_step(cluster, tmp_path, "trap 'exit 85' TERM; echo ready; sleep infinity & wait")
    wait_until(lambda: "ready" in job.output(), "the task", job.failed)
    cluster.run("scancel", job.id)
    wait_until(lambda: job.is_in("CANCELLED"), "its end", lambda: None)
    assert job.show()["Restarts"] == "0", job.output()


PLACE = """
import os
from reflectron.engine.parallel.launch import resolve_environment
place = resolve_environment(os.environ)
shown = place and (place.rank, place.world_size, place.local_rank, place.master_address)
print(shown, os.environ.get("SLURMD_NODENAME"), os.environ.get("CUDA_VISIBLE_DEVICES"), sep=";")
"""


def places(cluster: SlurmCluster, *words: str) -> list[str]:
    return sorted(cluster.run(*words, sys.executable, "-c", PLACE).splitlines())


@pytest.mark.slow
def test_tasks_of_a_real_step_know_their_places(cluster: SlurmCluster) -> None:
    """A task a GPU on both nodes, whose names only Slurm knows."""
    size = [f"--nodes={len(NODES)}", "--ntasks-per-node=4", "--cpus-per-task=1"]
    expected = [(rank, 8, rank % 4, "127.0.0.1") for rank in range(8)]
    all_visible = places(cluster, "srun", *size, f"--gpus-per-node={GPUS_PER_NODE}")
    assert all_visible == [f"{place};{NODES[place[0] // 4]};0,1,2,3,4,5,6,7" for place in expected]
    own_only = places(cluster, "srun", *size, "--gpus-per-task=1")
    assert own_only == [f"{place};{NODES[place[0] // 4]};{place[2]}" for place in expected]


@pytest.mark.slow
def test_who_is_alone_in_a_real_allocation_starts_its_own_ranks(cluster: SlurmCluster) -> None:
    allocation = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"]
    assert places(cluster, *allocation) == ["None;None;None"]
    assert places(cluster, *allocation, "srun", "--interactive", "--preserve-env") == ["None;node1;0,1,2,3"]
    assert places(cluster, *allocation, "srun", "--nodes=1", "--ntasks=1") == ["None;node1;0,1,2,3"]
