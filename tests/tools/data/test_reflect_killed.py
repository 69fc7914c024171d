"""``reflectron data reflect`` killed by SIGKILL at random points: resumed, it asks nothing again and loses nothing.

``REFLECTRON_KILLS=30 pytest -m slow -s tests/tools/data/test_reflect_killed.py`` kills more often than CI has time for.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools.llm.scripted_server import Scripted, ScriptedServer
from testkit.scripted_generator import number_of, problem, speak

KILLS = int(os.environ.get("REFLECTRON_KILLS", "5"))
JOURNALS = ("attempts.jsonl", "executions.jsonl", "outcomes.jsonl")


class Killer:
    """A script that kills the run under way some time after a random number of requests."""

    def __init__(self) -> None:
        self.rng = random.Random(7)
        self.process: subprocess.Popen[bytes] | None = None
        self.requests_left = 0
        self.seeds: list[int] = []
        self.lock = threading.Lock()

    def arm(self, process: subprocess.Popen[bytes] | None) -> None:
        """Forget the requests of the last run, and kill this one, if any."""
        with self.lock:
            self.requests_left, self.process, self.seeds = self.rng.randrange(1, 5), process, []

    def __call__(self, body: dict[str, Any]) -> Scripted:
        with self.lock:
            self.seeds.append(body["seed"])
            self.requests_left -= 1
            if self.requests_left == 0 and self.process is not None:
                # From before the answer leaves the server to long after it was recorded, executed and answered again.
                threading.Timer(self.rng.choice((0.0, 0.005, 0.05, 0.5)) * self.rng.random(), self.process.kill).start()
        return speak(body, first_attempt=number_of(body) % 3)


def whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def rows(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines() if line]


@pytest.mark.slow
def test_killed_at_any_point_nothing_is_repeated_or_lost(tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem(number)) + "\n" for number in range(KILLS + 3)))
    killer, kills, kept = Killer(), 0, dict.fromkeys(JOURNALS, b"")
    command = [sys.executable, "-m", "reflectron.tools.cli", "data", "reflect", str(problems), "--model", "tiny"]
    command += ["--concurrency", "2", "--interpreters", "1"]
    with ScriptedServer(killer) as server:

        def start(folder: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [*command, "--endpoint", server.url, "--out", str(tmp_path / folder)], stderr=subprocess.PIPE
            )

        while True:
            answered = {row["seed"] for row in rows(kept["attempts.jsonl"])}
            process = start("killed")
            killer.arm(process if kills < KILLS else None)
            _, errors = process.communicate()
            repeated = answered & set(killer.seeds)
            assert not repeated, f"{len(repeated)} recorded attempts were repeated after {kills} kills"
            for name in JOURNALS:
                now = whole_lines(tmp_path / "killed" / name)
                assert now.startswith(kept[name]), f"{name} lost records at kill {kills}"
                kept[name] = now
            if process.returncode == 0:
                break
            assert process.returncode == -9, errors.decode()
            kills += 1
        for name, key in (("attempts.jsonl", "key"), ("executions.jsonl", "key"), ("outcomes.jsonl", "problem")):
            counts = Counter(row[key] for row in rows(kept[name]))
            assert set(counts.values()) == {1}, f"{name} holds a record twice"
        killer.arm(None)
        process = start("whole")
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    samples = (tmp_path / "killed" / "reflection.jsonl").read_bytes()
    assert len(rows(samples)) == KILLS + 3
    assert samples == (tmp_path / "whole" / "reflection.jsonl").read_bytes()
    assert kills == KILLS
    attempts = len(rows(kept["attempts.jsonl"]))
    print(f"{kills} kills, {len(rows(samples))} samples, {attempts} attempts: none repeated, none lost")
