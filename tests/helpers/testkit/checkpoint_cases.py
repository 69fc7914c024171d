"""Cases of saving in one layout and loading in others: how they are run, and what their results must satisfy."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from testkit.places import program_path

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 720,
    "initializer_range": 0.2,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


SAVE = {"do": "save"}
EXACT, FLOAT32, BFLOAT16 = 0.0, 1e-5, 2e-2


Group = tuple[int, dict[str, dict[str, Any]]]
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Jobs on one folder, in groups of the same number of processes."""

    model: str
    groups: list[Group]
    """Processes and jobs by name; the jobs of a group follow each other in the same processes."""
    common: dict[str, Any] = field(default_factory=dict)
    """What all jobs have."""


def run_cases(folder: Path, cases: dict[str, Case]) -> dict[str, Results]:
    """By case, the result of each job; all of them from one start of the ranks' program."""
    plan, files = [], {}
    for name, case in cases.items():
        config = folder / name / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(SIZES | MODELS[case.model]), encoding="utf-8")
        common = {"output_dir": str(config.parent), "model": str(config), "do": "load", **case.common}
        files[name] = {job: config.with_name(f"{job}.result") for _, jobs in case.groups for job in jobs}
        plan += [
            (processes, [common | keys | {"result": str(files[name][job])} for job, keys in jobs.items()])
            for processes, jobs in case.groups
        ]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    script = program_path("checkpoint_ranks")
    ranks = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(folder / "plan.json")], capture_output=True, text=True, check=False
    )
    assert ranks.returncode == 0, ranks.stderr
    return {
        name: {job: json.loads(path.read_text(encoding="utf-8")) for job, path in jobs.items()}
        for name, jobs in files.items()
    }


def assert_follows(loaded: dict[str, Any], saved: dict[str, Any], tolerance: float) -> None:
    expected = saved["while_saving"] + saved["steps"]
    for step, expected_step in zip(loaded["steps"], expected, strict=True):
        assert step == pytest.approx(expected_step, rel=tolerance, abs=0.0)
    if tolerance == EXACT:
        assert loaded["random_numbers"] == saved["random_numbers"]
