"""A gradient that is NaN on one replica: all leave the step out alike, and the second look tells where it came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from reflectron.engine.parallel.launch import spawn_local
from testkit.places import TESTS_DIR, program_path

GOLDEN_DIR = TESTS_DIR / "golden"


@pytest.mark.slow
def test_one_rank_with_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(GOLDEN_DIR / "llama_before"), "dtype": "float32"},
        "tokenizer": {"path": str(GOLDEN_DIR / "tokenizer_before")},
        "data": {"train": [{"path": str(GOLDEN_DIR / "samples.jsonl")}], "max_length": 448, "workers": 1},
        "batch": {"global_batch_size": 6, "tokens_per_microbatch": 1024},
        "parallel": {"data_parallel_size": 2},
        "train": {"steps": 4, "tensorboard": False},
        "checkpoint": {"save_every": 0},
    }
    path, result = tmp_path / "run.yaml", tmp_path / "result.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    script = program_path("nonfinite_ranks")
    command = [sys.executable, "-W", "ignore", script, str(path), str(result)]
    assert spawn_local(command, 2, threads_per_process=1, log_dir=tmp_path / "logs") == 0
    first, recurring, passing, last = json.loads(result.read_text(encoding="utf-8"))
    assert [step["skipped"] for step in (first, recurring, passing, last)] == [False, True, True, False]
    assert [step["changed"] for step in (first, recurring, passing, last)] == [True, False, False, True]
    assert [step["in_a_row"] for step in (first, recurring, passing, last)] == [0, 1, 2, 0]
    # Every microbatch of the second replica, and only the layer whose gradient was spoilt.
    assert set(recurring["findings"]) == {"rank 1: not finite: gradients of layer 1"}
    assert all(recurring["samples"])
    assert passing["findings"] == []
