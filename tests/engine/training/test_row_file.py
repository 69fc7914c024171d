"""Rows of JSON: whole or not at all, also where the disk is full."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reflectron.engine.config import Config, TrainConfig
from reflectron.engine.training.metrics import MetricsFile, MetricsLog, read_rows


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """A limit on the size of files stands for the end of the disk; it ends before pytest writes of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_rows_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "rows.jsonl")
    rows = [{"step": step, "text": "x" * 20} for step in range(6)]
    with full_after(100):
        for row in rows:
            file.append(row)
    assert file.waiting == f"{tmp_path / 'rows.jsonl'}: File too large"
    # What fits is whole.
    assert read_rows(tmp_path / "rows.jsonl") == rows[:2]
    assert (tmp_path / "rows.jsonl").read_bytes().endswith(b"\n")
    file.append({"step": 6})
    assert file.waiting == ""
    file.close()
    assert read_rows(tmp_path / "rows.jsonl") == [*rows, {"step": 6}]


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "rows.jsonl")
    file.append({"loss": math.nan, "grad_norm": math.inf, "kl": 1.5, "mask_rate": None})
    file.close()
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert row == {"loss": None, "grad_norm": None, "kl": 1.5, "mask_rate": None}


def test_a_log_that_is_closed_again_leaves_other_files_alone(tmp_path: Path) -> None:
    log = MetricsLog(Config(output_dir=str(tmp_path), train=TrainConfig(tensorboard=False)), first_step=0)
    log.append("evaluation", {"step": 1})
    log.close()
    # They have the descriptors that the log gave back.
    with (tmp_path / "a").open("w") as one, (tmp_path / "b").open("w") as other:
        log.close()
        one.write("still open")
        other.write("still open")
    assert read_rows(tmp_path / "evaluation.jsonl") == [{"step": 1}]
