"""From a training run to pass@1 without a step by hand, and generation from a real server."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.data.tokenizer import load_tokenizer
from testkit.places import ROOT

DATA = ROOT / "tests" / "benchmarks" / "humaneval_plus_subset.jsonl"
SMALL = ["--dataset", "humaneval", "--data", str(DATA), "--limit", "3", "--max-new-tokens", "8"]


def reflectron(*words: object, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "reflectron.tools.cli", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_quickstart_is_evaluated_in_training_and_after(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    during = ["eval.every=2", f"eval.data={DATA}", "eval.limit=2", "eval.max_new_tokens=4"]
    small = ["train.steps=2", "batch.global_batch_size=2", "data.validation=[]"]
    train = ["train", "examples/quickstart/train.yaml", *small, f"output_dir={run}", *during]
    assert "humaneval pass@1: base 0.0 %" in reflectron(*train, cache=cache)
    (row,) = rows(run / "evaluation.jsonl")
    assert row == {"step": 2, "base": 0.0, "plus": 0.0}
    assert not (run / "evaluation.tmp").exists()

    said = reflectron("eval", "run", "--model", run / "export", "--out", tmp_path / "a", *SMALL, cache=cache)
    assert "3 tasks, 3 samples, passed: 0 base, 0 plus" in said
    # As if a later checkpoint had learnt one task.
    better = rows(tmp_path / "a" / "completions.jsonl")
    canonical = {task["task_id"]: task["prompt"] + task["canonical_solution"] for task in rows(DATA)}
    better[0]["solution"] = canonical[better[0]["task_id"]]
    other = tmp_path / "b"
    other.mkdir()
    (other / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in better))
    (other / "completions.settings.json").write_bytes((tmp_path / "a" / "completions.settings.json").read_bytes())
    words = ["eval", "run", "--model", run / "export", "--out", other, "--against", tmp_path / "a", *SMALL]
    reflectron(*words, cache=cache)
    page = (other / "report.md").read_text()
    assert f"- better here (1): {better[0]['task_id']}\n- worse here (0): none" in page
    assert "| ReflectionCoder-DS-33B | 82.9 | 76.8 | arXiv 2405.17057" in page
    assert re.search(r"export \| 33\.3 \| 33\.3 \| this run, 3 tasks", page)
    assert (other / "report.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("style", ["completion", "chat"])
def test_answers_of_a_server_are_those_of_transformers(style: str, tmp_path: Path, golden_dir: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (golden_dir / "llama_after").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    load_tokenizer(str(model), "reflection").save(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    log = (tmp_path / "server.log").open("w+")
    server = subprocess.Popen(
        [*words, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], stdout=log, stderr=log
    )
    try:
        wait_for(port, server)
        same = ["eval", "generate", "--model", model, *SMALL, "--prompt", style]
        local, remote = tmp_path / "local.jsonl", tmp_path / "remote.jsonl"
        # Where it completes a text, this server puts BOS before it.
        reflectron(*same, "--out", local, *(["--bos"] if style == "completion" else []), cache=tmp_path)
        url = f"http://127.0.0.1:{port}/v1"
        reflectron(*same, "--out", remote, "--backend", "endpoint", "--endpoint", url, cache=tmp_path)
    finally:
        server.terminate()
        server.wait()
    ours, theirs = ({row["task_id"]: row for row in rows(path)} for path in (local, remote))
    assert len(ours) == 3
    for task, row in ours.items():
        assert theirs[task]["raw"] == row["raw"], log.name
        assert theirs[task]["finish_reason"] == row["finish_reason"]


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return when the server listens; on a loaded machine its imports take minutes."""
    while server.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        select.select([], [], [], 0.1)
    raise AssertionError("the server ended before it listened")
