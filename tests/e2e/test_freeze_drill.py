"""``reflectron bench freezes``: ten freezes, rank 0's among them, each noticed in the time that docs/faults.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.tools import cli

FREEZES = 10


@pytest.mark.slow
def test_every_freeze_is_noticed_and_nothing_is_lost(tmp_path: Path) -> None:
    words = ["bench", "freezes", "--freezes", str(FREEZES), "--seed", "1", "--folder", str(tmp_path / "drill")]
    command = [sys.executable, "-W", "ignore", "-m", "reflectron.tools.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^frozen {FREEZES}, noticed {FREEZES} in at most .* losses 0;", done.stdout, re.MULTILINE)
    assert done.stdout.count("frozen: rank 0, ") >= 4
    assert "frozen: all ranks, " in done.stdout


def test_a_number_of_freezes_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "freezes", "--freezes", "0"]) == 2
    assert capsys.readouterr().err == "reflectron bench freezes: error: --freezes is 0, expected at least 1\n"
