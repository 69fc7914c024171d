"""``reflectron bench calibrate``: the rates that ``reflectron plan`` divides by, measured on this machine in a minute.

As many processes as a plan's ranks on one machine measure at once, because they share what they compute with: on CUDA
one a device, on the CPU as many as ``--processes`` says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("reflectron", "torch", "megatron-core")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the rates go, and how many processes measure at once."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file of the rates")
    parser.add_argument(
        "--processes",
        type=int,
        default=None,
        metavar="N",
        help="that measure at once, as many as a plan has ranks on a machine (default: CUDA devices, else 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit code."""
    import torch

    devices = torch.cuda.device_count()
    processes = args.processes or devices or 1
    if processes < 1 or (devices and processes > devices):
        raise ValueError(f"--processes is {args.processes}, expected 1 to the machine's devices")
    content = calibrate(processes)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for line in summary(content):
        print(line)
    return 0


def calibrate(processes: int) -> dict[str, Any]:
    """The content of a calibration file."""
    import torch
    from torch.multiprocessing.spawn import start_processes

    from reflectron.tools.bench.calibration_ranks import rank_main
    from reflectron.tools.bench.machine import machine

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(DISTRIBUTIONS)
    if kind == "cuda":
        name, memory_bytes = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    else:
        name, memory_bytes = "CPU", about["memory_gib"] * 2**30 / processes
    with tempfile.TemporaryDirectory() as folder:
        start_processes(rank_main, (kind, processes, folder), nprocs=processes, start_method="spawn")
        measured = json.loads(Path(folder, "measured.json").read_bytes())
    return {"device": name, "processes": processes, "memory_bytes": memory_bytes, **measured, **about}


def summary(content: dict[str, Any]) -> list[str]:
    """One line a table: its slowest and its fastest point."""
    import numpy as np

    lines = [f"{content['device']}, {content['dtype']}, {content['processes']} processes at once"]
    for name, table in content["tables"].items():
        rates = np.array(table["rates"])
        lines.append(f"{name}: {rates.min():.3g} to {rates.max():.3g} a second")
    return [*lines, *(f"host, {name}: {s * 1e3:.2f} ms" for name, s in content["host_seconds"].items())]
