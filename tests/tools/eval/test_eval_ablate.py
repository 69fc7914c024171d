"""An ablation of the quickstart from one command: killed in a training and continued, or stopped by a signal."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from reflectron.tools.eval.ablation import AblationBase, plan_ablation, tokens_of_run
from reflectron.tools.eval.run import RunFailed, _start
from testkit.places import ROOT

CONFIG = "examples/quickstart/train.yaml"
SMALL = (
    "train.steps=5",
    "batch.global_batch_size=2",
    "parallel.tensor_model_parallel_size=1",
    "train.tensorboard=false",
    "data.validation=[]",
    "data.workers=1",
    "checkpoint.save_every=1",
)
# The second is passed by every program that compiles, such as a prompt alone.
PROBLEMS = (
    ("def add(a, b):\n    '''The sum.'''\n", "add", "def check(candidate):\n    assert candidate(1, 2) == 3\n"),
    ("def nothing():\n    '''Nothing.'''\n", "nothing", "def check(candidate):\n    pass\n"),
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    problems = tmp_path / "mine.jsonl"
    rows = [
        {"task_id": f"mine/{number}", "prompt": prompt, "entry_point": name, "test": test}
        for number, (prompt, name, test) in enumerate(PROBLEMS)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "ablate", CONFIG, *SMALL, "--out", str(tmp_path / "out"), "--dataset", str(problems)]
    return [sys.executable, "-m", "reflectron.tools.cli", *words, "--max-new-tokens", "4"]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_rows(count: int, path: Path, process: subprocess.Popen[str]) -> None:
    """Return when a run has written so many rows; a loaded machine takes minutes."""
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        select.select([], [], [], 0.02)


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_killed_ablation_resumes(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command += ["--variants", "no_reflection_data", "--seeds", "0,1", "--same-tokens"]
    killed = start(command)
    # The row of the second step comes after the first step's checkpoint.
    wait_for_rows(2, out / "full" / "seed-1" / "metrics.jsonl", killed)
    killed.kill()
    killed.communicate()
    _, alive = psutil.wait_procs(processes_of(out), timeout=60)
    assert not alive, "a killed ablation leaves no training"
    done = [out / "full" / "seed-0" / name for name in ("finished.json", "result.json", "eval/score.json")]
    before = [path.stat().st_mtime_ns for path in done]
    assert len((out / "ablation.jsonl").read_text().splitlines()) == 1

    again = start(command)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert [path.stat().st_mtime_ns for path in done] == before, "what is done is not done again"
    assert "resuming after step" in (out / "full" / "seed-1" / "train.log").read_text()
    rows: list[dict[str, Any]] = [json.loads(line) for line in (out / "ablation.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (variant, seed) for variant in ("full", "no_reflection_data") for seed in (0, 1)
    ]
    for row in rows:
        score = json.loads((out / row["variant"] / f"seed-{row['seed']}" / "eval" / "score.json").read_text())
        assert row["n_passed"] == score["n_passed"]
        assert set(row["passed"]["base"]) == {"mine/0", "mine/1"}
        assert row["tokens"] == row["tokens_teacher"] + row["tokens_student"] + row["tokens_generation"]
    assert all(row["tokens_teacher"] == 0 for row in rows[2:])
    page = (out / "ablation.md").read_text()
    assert "| full | 2 |" in page
    assert "| no_reflection_data | 2 |" in page
    assert not list(out.glob("*/*/checkpoints"))
    monkeypatch.chdir(ROOT)
    check_tokens(out, rows)


def check_tokens(out: Path, rows: list[dict[str, Any]]) -> None:
    """What the plan counted before training is what the runs recorded; budgets differ by less than a step."""
    base = AblationBase(CONFIG, SMALL, out)
    runs = plan_ablation(base, ["full", "no_reflection_data"], [0, 1], same_tokens=True, progress=False)
    for run, row in zip(runs, rows, strict=True):
        assert run.inputs.train is not None
        assert tokens_of_run(run.config, run.inputs.train) == row["tokens"]
        assert run.samples == row["samples"] == 2 * row["steps"]
    for full, other in zip(rows[:2], rows[2:], strict=True):
        assert abs(full["tokens"] - other["tokens"]) < full["tokens"] / 5


@pytest.mark.slow
def test_a_signal_saves_the_run_in_training(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "out" / "full" / "seed-3407"
    stopped = start([*command, "--variants", "full", "train.steps=200", "checkpoint.save_every=0"])
    wait_for_rows(1, run / "metrics.jsonl", stopped)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate()[0]
    assert stopped.returncode == 85, said
    assert "the same command resumes the run (exit code 85)" in said
    assert list(run.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with pytest.raises(RunFailed, match=r"training ended with exit code 2; .*train\.log ends with: .*/nowhere\.yaml"):
        _start("full, seed 0: training", ["train", "/nowhere.yaml"], log)
