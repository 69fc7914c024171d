"""Three real ranks without anybody over them, as srun starts them: who is lost or late is named by all the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from reflectron.engine.parallel.launch import SUPERVISED
from testkit.places import program_path

SCRIPT = program_path("watchdog_ranks")
RANKS = 3
# case: the rank at fault, its exit code, what the others say
CASES = {
    "hang": (1, 86, "ranks 0, 2 arrived at step 3, training; not arrived: rank 1 in step 3, waiting for data ("),
    "killed": (2, -signal.SIGKILL, "nothing was heard from rank 2 ("),
    "killed main": (0, -signal.SIGKILL, "nothing was heard from rank 0 ("),
    "stopped": (1, -signal.SIGKILL, "nothing was heard from rank 1 ("),
    "stopped main": (0, -signal.SIGKILL, "nothing was heard from rank 0 ("),
    "stopped two": (0, -signal.SIGKILL, "nothing was heard from rank 0 ("),
    "stopped before it joins": (1, -signal.SIGKILL, "rank 1 did not join the job in "),
    "stopped main before others join": (0, -signal.SIGKILL, "nothing was heard from rank 0 ("),
    "failing": (1, 1, "failed first, in step 3, waiting for data: MemoryError: no room for the activations"),
}
UNHARMED = ("none", "stopped for a while", "stranger")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """By case, exit code and output of each rank."""
    folder = tmp_path_factory.mktemp("watchdog")
    plan = folder / "plan.json"
    plan.write_text(json.dumps(dict.fromkeys([*CASES, *UNHARMED], RANKS)), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != SUPERVISED} | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", SCRIPT, str(plan)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    codes: dict[str, list[int]] = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    return {
        case: [(code, (folder / f"{case}.{rank}.log").read_text()) for rank, code in enumerate(of_case)]
        for case, of_case in codes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_rank_at_fault_is_named_by_the_others(case: str, results: dict[str, list[tuple[int, str]]]) -> None:
    (lost, code, verdict), found = CASES[case], results[case]
    assert found[lost][0] == code, found
    for rank in set(range(RANKS)) - {lost, *({1} if case == "stopped two" else ())}:
        assert found[rank][0] == 86, found
        assert f"reflectron: rank {rank} ends: " in found[rank][1]
        assert verdict in found[rank][1], found
        assert "finished" not in found[rank][1]


@pytest.mark.slow
@pytest.mark.parametrize("case", UNHARMED)
def test_a_job_that_comes_to_its_end_is_left_alone(case: str, results: dict[str, list[tuple[int, str]]]) -> None:
    for code, output in results[case]:
        assert code == 0, output
        # Where no name server answers, torch warns of it.
        said = [line for line in output.splitlines() if not re.match(r"(\[rank\d\]:)?\[W\d", line)]
        assert said == ["finished"], output
