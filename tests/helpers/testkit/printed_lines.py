"""What a command under test prints, as it prints it."""

from __future__ import annotations

import subprocess

import pytest


def lines_to(process: subprocess.Popen[str], text: str) -> list[str]:
    """What it prints up to a line that holds ``text``."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    pytest.fail("".join(lines))
