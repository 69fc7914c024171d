"""``reflectron bench faults``: kill a training again and again, damage its checkpoints, and count what was lost."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drilled, and how hard."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file of the run; a tiny one of 2 ranks if none"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that win over CONFIG")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs in all (default 30)")
    parser.add_argument("--injuries", type=int, default=60, help="damaged files in all (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and damages (default 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs in DIR, which must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Drill; 0 when nothing was lost, 1 otherwise."""
    if args.kills < 1:
        raise ValueError(f"--kills is {args.kills}, expected at least 1")
    if args.injuries < 0:
        raise ValueError(f"--injuries is {args.injuries}, expected 0 or more")
    # Before torch is imported: this process forks the ranks, and they are a run on the CPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    from reflectron.tools.bench.fault_drill import drill

    with tempfile.TemporaryDirectory(prefix="reflectron-faults-") as temporary:
        folder = Path(temporary) / "drill" if args.folder is None else args.folder
        folder.mkdir(parents=True)
        return drill(folder, args.config, args.overrides, kills=args.kills, injuries=args.injuries, seed=args.seed)
