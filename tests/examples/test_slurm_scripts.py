"""The parts of ``examples/slurm`` that a cluster is not needed for, or that one without pyxis cannot run."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from testkit.places import ROOT

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "reflectron", "SLURM_CPUS_PER_TASK": "12"}


def bash(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"]} | JOB | env
    return subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["a800", "h100"])
def test_an_environment_says_why(kind: str) -> None:
    """It can be sourced, and each of its variables follows a comment, or the line that sets it."""
    done = bash("-euc", f"source examples/slurm/env/{kind}.sh; env")
    assert done.returncode == 0, done.stderr
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert variables["NCCL_IB_TIMEOUT"] == "22"
    assert variables["PYTHONSAFEPATH"] == "1"
    for name in ("common", kind):
        lines = (ROOT / "examples" / "slurm" / "env" / f"{name}.sh").read_text(encoding="utf-8").splitlines()
        for before, line in pairwise(lines):
            if line.startswith("export"):
                is_set_before = before.startswith(f"{line.split()[1]}=")
                assert before.startswith(("#", "export")) or is_set_before, f"{line} has no reason"


def test_pyxis_gets_image_mounts_and_variables(tmp_path: Path) -> None:
    """An srun that shows its arguments stands for the one with the plugin."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["examples/slurm/pyxis.sbatch", "run.yaml", "train.steps=2"]
    done = bash(*script, PATH=path, CONTAINER_IMAGE="image.sqsh", CONTAINER_MOUNTS="/data:/data")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[-4:] == ["reflectron", "train", "run.yaml", "train.steps=2"]
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    assert options["--container-image"] == "image.sqsh"
    assert options["--container-mounts"] == f"{ROOT}:{ROOT},/data:/data"
    assert options["--cpus-per-task"] == "12"
    named = options["--container-env"].split(",")
    assert {"NCCL_DEBUG", "NVTE_FWD_LAYERNORM_SM_MARGIN", "TORCH_FR_BUFFER_SIZE", "PYTHONSAFEPATH"} <= {*named}
    assert not {"PATH", "SLURM_JOB_ID"} & {*named}


def test_a_container_needs_an_image() -> None:
    done = bash("examples/slurm/pyxis.sbatch", "run.yaml")
    assert done.returncode != 0
    assert "CONTAINER_IMAGE: an image with reflectron" in done.stderr
