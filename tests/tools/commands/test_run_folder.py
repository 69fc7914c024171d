"""The folder of a run: one job at a time, what Ctrl-C leaves, and one run at Weights & Biases for all starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.engine.config import Config, TrainConfig
from reflectron.engine.job_lock import LOCK_NAME, Holder
from reflectron.engine.training.metrics import wandb_run_id
from reflectron.tools import cli
from reflectron.tools.bench.harness import write_tiny_run
from reflectron.tools.commands.train import check_wandb
from testkit.printed_lines import lines_to


def command(config: Path, *overrides: str) -> list[str]:
    words = ["train", str(config), "parallel.data_parallel_size=1", "checkpoint.save_every=2", *overrides]
    return [sys.executable, "-W", "ignore", "-m", "reflectron.tools.cli", *words]


def start(words: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}
    )


@pytest.mark.slow
def test_one_job_at_a_time(tmp_path: Path) -> None:
    """A second job is refused; Ctrl-C says what is kept; a job whose place another one took writes nothing more."""
    out = tmp_path / "run"
    words = command(write_tiny_run(tmp_path), f"output_dir={out}", "train.steps=100000")
    with start(words) as first:
        lines_to(first, "checkpoint  ")
        second = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert second.stdout == ""
        refusal = rf"reflectron train: error: output_dir {out} is in use by process {first.pid} on [^\n]*\n"
        assert re.fullmatch(refusal, second.stderr)
        first.send_signal(signal.SIGINT)
        (said,) = (line for line in lines_to(first, "interrupted;") if "interrupted;" in line)
    assert first.returncode == 130
    latest = int((out / "checkpoints" / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))
    assert f"interrupted; steps 1-{latest} are kept in {out}/checkpoints/step_{latest:08d}; " in said
    assert not (out / LOCK_NAME).exists()
    with start(words) as resumed:
        assert any(f"resuming after step {latest} " in line for line in lines_to(resumed, "checkpoint  "))
        holder = dataclasses.replace(Holder.this_process({}), host="node07", pid=77, machine="another")
        (tmp_path / "theirs").write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
        (tmp_path / "theirs").replace(out / LOCK_NAME)
        lines_to(resumed, f"error: {out / LOCK_NAME} is held by process 77 on node07")
        assert resumed.stdout is not None
        assert "Traceback" not in resumed.stdout.read()
    assert resumed.returncode == 2
    assert json.loads((out / LOCK_NAME).read_text(encoding="utf-8"))["host"] == "node07"
    # No checkpoint was begun after the loss.
    assert not list((out / "checkpoints").glob("*.partial"))


@pytest.mark.slow
def test_every_start_of_a_run_is_one_run_at_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    words = command(write_tiny_run(tmp_path), f"output_dir={out}", "train.steps=8", "train.wandb_project=demo")
    with start(words, WANDB_MODE="offline", WANDB_SILENT="true") as first:
        lines_to(first, "step 3/")
        first.send_signal(signal.SIGTERM)
        lines_to(first, "stopped by a signal")
        assert first.stdout is not None
        first.stdout.read()
    assert first.returncode == 85
    with start(words, WANDB_MODE="offline", WANDB_SILENT="true") as second:
        lines_to(second, "resuming after step ")
        assert second.stdout is not None
        second.stdout.read()
    assert second.returncode == 0
    runs = [path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert set(runs) == {json.loads((out / "wandb_run.json").read_text(encoding="utf-8"))["id"]}


def test_the_id_at_wandb_is_kept(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path), train=TrainConfig(wandb_project="demo"))
    first = wandb_run_id(config)
    assert wandb_run_id(config) == first
    other = dataclasses.replace(config, train=TrainConfig(wandb_project="another"))
    assert wandb_run_id(other) != first
    again = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume="never"))
    over = wandb_run_id(again)
    assert over != first
    assert wandb_run_id(config) == over
    for damage in (b"", b"\xff", b"[]", b'{"project": "demo", "id": "../../x"}', b'{"project": "demo", "id": 1}'):
        (tmp_path / "wandb_run.json").write_bytes(damage)
        assert re.fullmatch("[0-9a-f]{8}", wandb_run_id(config))


@pytest.mark.parametrize(
    ("env", "netrc", "settings", "ok"),
    [
        ({}, "", "", False),
        ({"WANDB_API_KEY": "k"}, "", "", True),
        ({"WANDB_MODE": "offline"}, "", "", True),
        ({"WANDB_MODE": "disabled"}, "", "", True),
        ({"WANDB_MODE": "online"}, "", "[default]\nmode = offline\n", False),
        ({}, "", "[default]\nmode = offline\n", True),
        ({}, "machine api.wandb.ai login user password k\n", "", True),
        ({}, "machine example.org login user password k\n", "", False),
        ({"WANDB_BASE_URL": "https://example.org"}, "machine example.org login user password k\n", "", True),
        ({}, "garbage", "garbage", False),
        # Rank 0 looks for all.
        ({"RANK": "1"}, "", "", True),
    ],
)
def test_a_missing_key_is_found_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], netrc: str, settings: str, ok: bool
) -> None:
    # Whether the package is there is another question.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "netrc").write_text(netrc, encoding="utf-8")
    (tmp_path / "settings").write_text(settings, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = Config(train=TrainConfig(wandb_project="demo"))
    env = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)} | env
    if ok:
        check_wandb(config, env)
    else:
        with pytest.raises(
            ValueError, match="there is no API key of Weights & Biases: run `wandb login`, set WANDB_API"
        ):
            check_wandb(config, env)


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["train", str(write_tiny_run(tmp_path)), "train.wandb_project=demo"]
    assert cli.main(words) == 2
    said = "train.wandb_project is 'demo', but the package wandb is not installed: pip install 'reflectron[wandb]'"
    assert capsys.readouterr().err == f"reflectron train: error: {said}\n"
    assert not (tmp_path / "run" / "logs").exists()
