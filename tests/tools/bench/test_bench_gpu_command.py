"""``reflectron bench gpu`` on the CPU: its stages run one after the other and leave rows and a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = "kernels,parity,step,calibrate,memory"


@pytest.mark.slow
def test_stages_leave_rows_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "cpu"
    words = ["bench", "gpu", "--device", "cpu", "--stages", STAGES, "--minutes", "90", "--out", str(out)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "reflectron.tools.cli", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    stages = [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["outcome"], row["reason"]) for row in stages] == [
        (name, "passed", None) for name in STAGES.split(",")
    ]
    assert result.returncode == 0, result.stderr
    for name in ("kernels", "parity", "step"):
        rows = [json.loads(line) for line in (out / name / "rows.jsonl").read_text().splitlines()]
        assert any("passed" in row for row in rows)
        assert all(row["passed"] for row in rows if "passed" in row)
    # Both runs were the same command on the CPU.
    assert all(row["p50"] == 0 for row in rows if row["dtype"] == "float32")
    assert any(row["p50"] > 0 for row in rows if row["dtype"] == "bfloat16")
    builds = {json.loads(line)["variant"] for line in (out / "memory" / "rows.jsonl").read_text().splitlines()}
    assert builds == {"engine", "engine[mlp]", "engine[full]"}
    page = (out / "README.md").read_text()
    assert page.count("| passed |") == 5
    assert "| not measured |" in page
    assert json.loads((out / "calibration.json").read_text())["device"] == "CPU"
