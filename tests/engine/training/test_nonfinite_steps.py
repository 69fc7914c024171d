"""A step whose loss is not finite is named by rank, layers and samples, skipped, remembered over restarts, counted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reflectron.engine.config import DataConfig, DataFile
from reflectron.engine.data.store import build_store
from reflectron.engine.data.tokenizer import load_tokenizer
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
SAMPLES = str(GOLDEN_DIR / "samples.jsonl")
STEPS = 8
OF_THE_MACHINE = ("step_time_ms", "data_wait_ms", "tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model with an infinite embedding of a token that one sample alone has, and the record of that sample."""
    folder = tmp_path_factory.mktemp("infinite")
    data = DataConfig(train=(DataFile(path=SAMPLES),), max_length=448, workers=1)
    store = build_store(
        data, data.train, load_tokenizer(str(GOLDEN_DIR / "tokenizer_before"), "reflection"), folder / "store"
    )
    weights = load_file(GOLDEN_DIR / "llama_before" / "model.safetensors")
    rows = len(weights["model.embed_tokens.weight"])
    holders = np.zeros((len(store), rows), bool)
    for index in range(len(store)):
        ids = store[index].input_ids
        holders[index, ids[ids < rows]] = True
    token = int(np.flatnonzero(holders.sum(axis=0) == 1)[0])
    shutil.copytree(GOLDEN_DIR / "llama_before", folder / "model")
    weights["model.embed_tokens.weight"][token] = torch.inf
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return folder / "model", int(store.record_index[holders[:, token].argmax()])


class Run:
    """A run of two replicas in a folder."""

    def __init__(self, folder: Path, model: Path, **train: Any) -> None:
        folder.mkdir()
        self.folder = folder
        config = {
            "output_dir": str(folder),
            "model": {"path": str(model), "dtype": "float32"},
            "tokenizer": {"path": str(GOLDEN_DIR / "tokenizer_before")},
            "data": {"train": [{"path": SAMPLES}], "max_length": 448},
            "batch": {"global_batch_size": 6, "tokens_per_microbatch": 1024},
            "parallel": {"data_parallel_size": 2},
            "optimizer": {"learning_rate": 1e-3},
            "train": {"steps": STEPS, "tensorboard": False, **train},
        }
        (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
        self.words = [sys.executable, "-m", "reflectron.tools.cli", "train", str(folder / "run.yaml")]

    def finish(self, code: int = 0) -> str:
        done = subprocess.run(self.words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def stop_after(self, text: str) -> None:
        """Send SIGTERM once a line holds ``text``."""
        with subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if text in line:
                    process.send_signal(signal.SIGTERM)
                    break
            process.stdout.read()
        assert process.returncode == 85

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [{key: value for key, value in row.items() if key not in OF_THE_MACHINE} for row in rows]


@pytest.mark.slow
def test_steps_are_skipped_and_named_also_over_a_restart(model: tuple[Path, int], tmp_path: Path) -> None:
    path, record = model
    whole, stopped = Run(tmp_path / "whole", path), Run(tmp_path / "stopped", path)
    output = whole.finish()
    rows = whole.rows("metrics")
    skipped = [row for row in rows if row["skipped"]]
    # 24 samples an epoch, so each is seen in the steps 1 to 4 and again in 5 to 8.
    assert [len([row for row in skipped if row["step"] in steps]) for steps in (range(1, 5), range(5, 9))] == [1, 1]
    assert all(row["loss"] is None and row["grad_norm"] is None for row in skipped)
    assert all(row["loss"] > 0 for row in rows if not row["skipped"])
    found = whole.rows("nonfinite")
    assert [row["step"] for row in found] == [row["step"] for row in skipped]
    for row in found:
        # Both replicas hold the infinite weight; only one of them had the sample, and few others beside it.
        assert [finding["weights"] for finding in row["findings"] if finding["weights"]] == [["embedding"]] * 2
        (met,) = (finding for finding in row["findings"] if finding["samples"])
        assert "loss" in met["loss"]
        assert met["activations"][:2] == ["embedding", "layer 0"]
        assert "output layer" in met["gradients"]
        assert {"file": SAMPLES, "record": record} in met["samples"]
        assert len(met["samples"]) < 6
    assert f"step {skipped[0]['step']}/{STEPS}  skipped: loss " in output
    assert "not finite: weights of embedding" in output

    stopped.stop_after("skipped: loss")
    stopped.finish()
    assert stopped.rows("metrics") == rows
    assert stopped.rows("nonfinite") == found
    weights, expected = (load_file(run.folder / "export" / "model.safetensors") for run in (stopped, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run(model: tuple[Path, int], tmp_path: Path) -> None:
    run = Run(tmp_path / "run", model[0], max_skipped_steps=0)
    output = run.finish(code=87)
    assert "stopped: more than 0 steps in a row (train.max_skipped_steps) were not finite" in output
    assert "failed first" not in output
    rows = run.rows("metrics")
    assert [row["skipped"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert not (tmp_path / "run" / "export").exists()
