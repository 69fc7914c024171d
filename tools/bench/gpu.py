"""``reflectron bench gpu``: everything that needs a GPU, in one command and a given time, as rows and a page of them.

Stages run in order of importance, each in a process of its own with a limit of its own. What a stage has measured is on
disk before the next one begins; one that fails or takes too long is reported and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectron.engine.parallel.launch import die_with

if TYPE_CHECKING:
    from reflectron.tools.bench.gpu_stages import Stage

NO_DEVICE = "no CUDA device is visible; --device cpu runs the stages that can do without one, on tiny sizes"
# Between asking a stage's processes to end and killing them.
_GRACE_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which stages, for how long, and where the rows go."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: examples/benchmarks/<GPU>")
    parser.add_argument("--stages", metavar="A,B", help="only these; all by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages together (default 9)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: a test of this command")


def run(args: argparse.Namespace) -> int:
    """Run the stages; 1 when one that checks correctness failed."""
    import torch

    from reflectron.tools.bench.gpu_report import write_page
    from reflectron.tools.bench.gpu_stages import STAGES
    from reflectron.tools.bench.rows import environment

    device = torch.device("cpu" if args.device == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(NO_DEVICE)
    chosen = tuple(args.stages.split(",")) if args.stages else tuple(STAGES)
    if unknown := set(chosen) - set(STAGES):
        raise ValueError(f"--stages names {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}")
    if args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}, expected a number above 0")
    common = environment(device)
    out = args.out or Path("examples/benchmarks") / slug(common["device"])
    if (out / "stages.jsonl").exists():
        raise ValueError(f"{out}/stages.jsonl exists; name another folder with --out, rows are never overwritten")
    out.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), []
    for stage in (stage for name, stage in STAGES.items() if name in chosen):
        left = 60 * args.minutes - (time.monotonic() - began)
        row = run_stage(stage, out, device.type, min(left, stage.minutes / _all_minutes() * 60 * args.minutes))
        with (out / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | common) + "\n")
        write_page(out)
        if row["outcome"] != "passed" and stage.checks:
            failed.append(stage.name)
    print(write_page(out))
    if failed:
        print(f"reflectron bench gpu: correctness is not shown by {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _all_minutes() -> float:
    from reflectron.tools.bench.gpu_stages import STAGES

    return sum(stage.minutes for stage in STAGES.values())


def run_stage(stage: Stage, out: Path, device_type: str, limit_s: float) -> dict[str, Any]:
    """Run one stage, its output in ``<out>/logs/<stage>.log``; what became of it."""
    print(f"[{stage.name}] {stage.what}", flush=True)
    row = {"stage": stage.name, "checks": stage.checks, "limit_s": round(limit_s, 1)}
    if limit_s < 1:
        return row | {"outcome": "not run", "seconds": 0.0, "reason": "the time of the run was spent"}
    log = out / "logs" / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    # 10 seconds for what a stage does after its own deadline.
    words = stage.words(out, device_type, max(limit_s - 10, 1) / 60)
    parent = os.getpid()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        code = _wait(process, limit_s)
    seconds = round(time.monotonic() - began, 1)
    outcome = "passed" if code == 0 else "took too long" if code is None else "failed"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    reason = None if code == 0 else (lines or ["no output"])[-1][:300]
    print(f"[{stage.name}] {outcome} after {seconds} s{f': {reason}' if reason else ''}", flush=True)
    return row | {"outcome": outcome, "seconds": seconds, "exit_code": code, "reason": reason}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code, or None for a stage that was ended at its limit, with the processes that it started."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # whoever started ranks ends them
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # ranks die with their parent
            process.wait()
        return None


def slug(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia_h100_80gb_hbm3``"""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
