"""What a measured number needs to be read alone: the hardware, the installed versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from reflectron.engine.files import installed_version


def provenance(distributions: Sequence[str], *, cuda: bool = False) -> dict[str, Any]:
    """Return hardware, versions and commit, and the load before the start, which slows all that is measured.

    Args:
        distributions: whose versions matter.
        cuda: whether CUDA's current device computes; else its facts are null.
    """
    return {
        **(_cuda_device() if cuda else _no_device()),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in distributions},
        "commit": source_commit(),
    }


def _cuda_device() -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "device_memory_gib": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30,
        "compute_capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
    }


def _no_device() -> dict[str, Any]:
    return {"device": f"CPU {cpu_name()}", "device_memory_gib": None, "compute_capability": None, "cuda": None}


def cpu_name() -> str:
    """Return the processor's name as the kernel knows it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def source_commit() -> str | None:
    """Return the commit of the clone that this file is in, ``-dirty`` where it has changes; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
