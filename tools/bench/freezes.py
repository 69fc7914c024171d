"""``reflectron bench freezes``: stop ranks of a training again and again; when is it noticed, and what is lost?"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How hard."""
    parser.add_argument("--freezes", type=int, default=10, help="how often ranks are stopped (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the runs in DIR, which must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Drill; 0 when every freeze was noticed in time and nothing was lost, 1 otherwise."""
    if args.freezes < 1:
        raise ValueError(f"--freezes is {args.freezes}, expected at least 1")
    # Before torch is imported: this process forks the ranks, and they are a run on the CPU.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    from reflectron.tools.bench.freeze_drill import drill

    with tempfile.TemporaryDirectory(prefix="reflectron-freezes-") as temporary:
        folder = Path(temporary) / "drill" if args.folder is None else args.folder
        folder.mkdir(parents=True)
        return drill(folder, freezes=args.freezes, seed=args.seed)
