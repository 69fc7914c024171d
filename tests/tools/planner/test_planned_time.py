"""The planner's seconds against those of real steps on this machine, by rates measured just before.

One process a rank, one thread each; rates and steps are each the least of many rounds. docs/planning.md has results.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from testkit.places import program_path

TOLERANCE = 0.15

# name: ranks, hidden, layers, vocabulary, tokens of a microbatch, samples of a step, layout
JOBS: dict[str, tuple[int, int, int, int, int, int, dict[str, int | bool]]] = {
    "narrow": (1, 256, 4, 2048, 512, 16, {}),
    "wide": (1, 1024, 2, 2048, 512, 8, {}),
    "long": (1, 256, 2, 4096, 2048, 8, {}),
    "large_vocabulary": (1, 256, 2, 32000, 512, 8, {}),
    "dp2": (2, 512, 2, 4096, 1024, 16, {}),
    "tp2": (2, 512, 2, 4096, 1024, 8, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, 512, 4, 4096, 512, 16, {"pipeline_model_parallel_size": 2}),
}
STEPS = 5


@pytest.mark.idle
@pytest.mark.parametrize("ranks", [1, 2])
def test_seconds_of_a_step(ranks: int, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} cores")
    wait_for_cores()
    errors = measure([name for name, job in JOBS.items() if job[0] == ranks], ranks, tmp_path)
    print({name: f"{error:+.1%}" for name, error in errors.items()})
    assert all(abs(error) <= TOLERANCE for error in errors.values()), errors
    assert statistics.median(map(abs, errors.values())) <= TOLERANCE * 2 / 3, errors


def wait_for_cores() -> None:
    """Until other work leaves the cores alone: ranks that are stopped in turns wait for each other, which no rate of a
    part can foresee."""
    for _ in range(30):
        busy = psutil.cpu_percent(interval=2.0)
        if busy < 20:
            return
    pytest.fail(f"for a minute other work has kept the cores busy, at last {busy:.0f} %")


def measure(names: list[str], ranks: int, folder: Path) -> dict[str, float]:
    """By name: prediction over measurement, minus 1."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    rates, plan = folder / "rates.json", folder / "plan.json"
    jobs = [write_job(name, folder) for name in names]
    plan.write_text(json.dumps(jobs))
    for command in (
        ["-m", "reflectron.tools.cli", "bench", "calibrate", "--out", str(rates), "--processes", str(ranks)],
        [program_path("time_ranks"), str(plan)],
    ):
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=900, env=environment, check=False
        )
        assert result.returncode == 0, result.stderr[-4000:]
    results = {name: json.loads(Path(job["out"]).read_bytes()) for name, job in zip(names, jobs, strict=True)}
    return {name: sum(one["predicted"].values()) / min(one["seconds"]) - 1 for name, one in results.items()}


def write_job(name: str, folder: Path) -> dict[str, Any]:
    """For ``time_ranks.py``."""
    ranks, hidden, layers, vocabulary, tokens, samples, layout = JOBS[name]
    model = folder / f"{name}.json"
    sizes = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "vocab_size": vocabulary,
    }
    model.write_text(json.dumps(sizes))
    return {
        "processes": ranks,
        "model": str(model),
        "tokens": tokens,
        "samples": samples,
        "parallel": layout,
        "steps": STEPS,
        "rates": str(folder / "rates.json"),
        "out": str(folder / f"{name}.seconds"),
    }
