"""The drill of faults on its own tiny run, with fewer kills than it does by default."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_is_lost_by_kills_and_damages(tmp_path: Path) -> None:
    words = ["--kills", "12", "--injuries", "20", "--seed", "3", "--folder", str(tmp_path / "drill")]
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("faults.py")), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1\d kills: .*while tokenising", done.stdout, re.MULTILINE)
    assert re.search(r"^2\d injuries to .*checkpoint.*token store", done.stdout, re.MULTILINE)
    faults = re.search(r"^faults (\d+), losses 0$", done.stdout, re.MULTILINE)
    assert faults is not None, done.stdout
    assert int(faults[1]) >= 32


def test_a_number_of_kills_that_makes_no_sense() -> None:
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), "--kills", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--kills is 0, expected at least 1" in done.stderr
