"""A scoring that is stopped, however that comes, keeps what it has judged, and the same command judges the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reflectron.tools.benchmarks.judging import VerdictFile

PROBLEM = {
    "task_id": "own/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert [candidate(x) for x in range(40)] == list(range(40))\n",
}
SAMPLES = 24


def rows(path: Path) -> list[dict[str, object]]:
    """The rows that are whole."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reflectron.tools.cli", "eval", "score", tmp_path / "c.jsonl", "--workers", "2"]
    command += ["--dataset", tmp_path / "own.jsonl", "--json", tmp_path / "score.json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_rows(verdicts: Path, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while len(rows(verdicts)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_a_stopped_scoring_resumes(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "own.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    codes = [f"def f(x): return x if x < {n + 30} else -1" for n in range(SAMPLES)]
    lines = [json.dumps({"task_id": "own/0", "solution": code}) + "\n" for code in codes]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    verdicts = tmp_path / "score.verdicts.jsonl"

    with VerdictFile(verdicts, 1):
        process = start(tmp_path)
        assert "is being written by another scorer" in process.communicate()[1]
        assert process.returncode == 2

    process = start(tmp_path)
    wait_for_rows(verdicts, 2, process)
    process.kill()
    process.communicate()
    kept = rows(verdicts)
    assert 2 <= len(kept) < SAMPLES
    # As a kill in the middle of a write leaves it.
    with verdicts.open("a") as file:
        file.write(json.dumps(kept[0])[:100])

    process = start(tmp_path)
    wait_for_rows(verdicts, len(kept) + 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert f"{len(kept)} of {SAMPLES} samples were judged before" in said
    whole = rows(verdicts)
    assert f"stopped: {len(whole)} of {SAMPLES} samples are judged" in said
    assert "the same command resumes" in said
    assert "Traceback" not in said
    assert not (tmp_path / "score.json").exists()

    # The text of a sample that changes is another sample's.
    lines[0] = json.dumps({"task_id": "own/0", "solution": codes[0] + " # changed"}) + "\n"
    (tmp_path / "c.jsonl").write_text("".join(lines))
    process = start(tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["n_samples"], score["n_passed"]) == (SAMPLES, {"base": 14})
    assert [row["sample"] for row in score["failed"]] == list(range(10))
    written = rows(verdicts)
    assert written[: len(whole)] == whole
    assert len({row["key"] for row in written}) == len(written) == SAMPLES + 1
    assert list((tmp_path / "tmp").iterdir()) == []
