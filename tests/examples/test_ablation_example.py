"""The ablation example from its generator to its table, in a few steps of its own model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.tools.sandbox.wall import SandboxKind
from testkit.places import ROOT

CLONE = ROOT
FOLDER = CLONE / "examples" / "ablation"
MAKE = ["--instructions", "60", "--reflections", "20", "--validations", "4", "--tests", "3"]


def run(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_problems_to_table(tmp_path: Path, sandbox: SandboxKind) -> None:
    out = tmp_path / "outputs" / "ablation"
    # The configuration names its files from the clone's root.
    (tmp_path / "examples").symlink_to(CLONE / "examples")
    run(tmp_path, str(FOLDER / "make_problems.py"), "--out", str(out / "data"), *MAKE)
    run(tmp_path, str(FOLDER / "train_tokenizer.py"), "--data", str(out / "data"), "--out", str(out / "tokenizer"))
    words = ["eval", "ablate", "examples/ablation/cpu.yaml", "--out", str(out / "cpu"), "--same-tokens", "--bos"]
    words += ["--variants", "no_reflection_data", "--seeds", "1", "--dataset", str(out / "data" / "held_out.jsonl")]
    words += ["--max-new-tokens", "8", "--batch-size", "3", "train.steps=3", "train.validate_every=0"]
    run(tmp_path, "-m", "reflectron.tools.cli", *words, "batch.global_batch_size=8")
    rows = [json.loads(line) for line in (out / "cpu" / "ablation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["variant"] for row in rows] == ["full", "no_reflection_data"]
    full, plain = rows
    assert full["tokens_student"] > 0
    assert plain["tokens_student"] == plain["tokens_teacher"] == 0
    # To within a step.
    assert abs(plain["tokens"] - full["tokens"]) <= plain["tokens"] / plain["steps"]
    assert all(row["n_tasks"] == 3 for row in rows)
    assert "| no_reflection_data |" in (out / "cpu" / "ablation.md").read_text(encoding="utf-8")
