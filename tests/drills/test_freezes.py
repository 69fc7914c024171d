"""The drill of freezes: ten freezes, rank 0's among them, each noticed in the time that docs/faults.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FREEZES = 10


@pytest.mark.slow
def test_every_freeze_is_noticed_and_nothing_is_lost(tmp_path: Path) -> None:
    words = ["--freezes", str(FREEZES), "--seed", "1", "--folder", str(tmp_path / "drill")]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("freezes.py")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^frozen {FREEZES}, noticed {FREEZES} in at most .* losses 0;", done.stdout, re.MULTILINE)
    assert done.stdout.count("frozen: rank 0, ") >= 4
    assert "frozen: all ranks, " in done.stdout


def test_a_number_of_freezes_that_makes_no_sense() -> None:
    command = [sys.executable, str(Path(__file__).with_name("freezes.py")), "--freezes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--freezes is 0, expected at least 1" in done.stderr
