"""`reflectron train` on the GPU beside the same command on the CPU -> rows: losses and gradient norms of every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reflectron.tools.bench.tiny_run import write_tiny_run

STEPS = 5
# Relative. In float32 sums are added up in another order; bfloat16 rounds every activation to 8 bits. A gradient norm
# follows the weights of the steps before it.
TOLERANCES = {"float32": {"loss": 1e-4, "grad_norm": 1e-3}, "bfloat16": {"loss": 2e-2, "grad_norm": 5e-2}}
# Heads of 64: what attention kernels for GPUs can do.
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}


def step_rows(cuda: bool, scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for each number of each step; without ``cuda`` both runs are on the CPU, to test the comparison.

    Raises:
        RuntimeError: when a run fails; its last lines.
    """
    truth = _train(scratch / "cpu", "float32", cuda=False)
    for dtype, tolerances in TOLERANCES.items():
        found = _train(scratch / dtype, dtype, cuda=cuda)
        for step, (mine, theirs) in enumerate(zip(found, truth, strict=True), 1):
            for key, tolerance in tolerances.items():
                error = abs(mine[key] / theirs[key] - 1)
                yield {
                    "part": "training step",
                    "case": f"step {step}",
                    "backend": "cuda" if cuda else "cpu",
                    "dtype": dtype,
                    "tensor": key,
                    "error": error,
                    "limit": tolerance,
                    "passed": error <= tolerance,
                }


def _train(folder: Path, dtype: str, cuda: bool) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` of a run of ``STEPS`` steps with one rank."""
    folder.mkdir(parents=True)
    path = write_tiny_run(folder)
    model = folder / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text(encoding="utf-8")) | _SIZES), encoding="utf-8")
    words = [sys.executable, "-W", "ignore", "-m", "reflectron.tools.cli", "train", str(path)]
    words += [
        f"model.dtype={dtype}",
        f"train.steps={STEPS}",
        "parallel.data_parallel_size=1",
        "checkpoint.save_every=0",
    ]
    words += ["optimizer.learning_rate=1e-3"]
    env = os.environ | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"reflectron train with {dtype} ended with {result.returncode}: {' '.join(last)}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
