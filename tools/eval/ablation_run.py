"""One run of an ablation: trained by ``reflectron train``, scored by ``reflectron eval run``, kept as a row.

``<folder>`` is the run's ``output_dir``; beside what training writes there stand ``train.log``, ``eval/`` and
``result.json``. A run that is trained and scored is not looked at again while its settings are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from reflectron.engine.checkpoint.retention import checkpoints_folder
from reflectron.engine.files import write_text
from reflectron.engine.parallel.launch import die_with
from reflectron.tools.bench.rows import commit, installed_version
from reflectron.tools.eval import run as eval_run
from reflectron.tools.eval.ablation_plan import Run
from reflectron.tools.eval.generate import generation_settings
from reflectron.tools.eval.problems import find_problems
from reflectron.tools.eval.rows import read_json_lines

_RESULT_FILE = "result.json"
_TOKENS = ("tokens_teacher", "tokens_student", "tokens_generation")


class RunFailed(Exception):
    """A run's process ended with an exit code other than 0."""

    def __init__(self, what: str, code: int, log: Path) -> None:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        super().__init__(f"{what} ended with exit code {code}; {log} ends with: {last.strip()}")
        self.code = code


def train(run: Run) -> None:
    """Train what is not yet trained; SIGTERM and SIGUSR1 are passed on, so that the run saves and ends.

    Raises:
        ValueError: when the folder holds another run.
        RunFailed: when the run did not come to its end.
    """
    from reflectron.engine.training.run import look_into_folder

    if look_into_folder(run.config, run.inputs) is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        _start(f"{run}: training", run.words, run.folder / "train.log")


def evaluate(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The run's row, from its score; made unless it is there.

    Raises:
        ValueError: when answers of other settings stand in the folder.
        RunFailed: when the evaluation's process failed.
    """
    words = _evaluation_words(run, args)
    parser = argparse.ArgumentParser()
    eval_run.add_arguments(parser)
    parsed = parser.parse_args(words)
    settings = generation_settings(parsed, find_problems(parsed.dataset, parsed.data))
    settings |= {"limit": parsed.limit, "min-time-limit": parsed.min_time_limit}
    path = run.folder / _RESULT_FILE
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        # As it comes back from a file.
        if found["settings"] == json.loads(json.dumps(settings)):
            row: dict[str, Any] = found["row"]
            return row | _names(run)
    _run_evaluation(f"{run}: evaluation", words, parsed, run.folder / "eval.log")
    row = _row(run)
    write_text(path, json.dumps({"settings": settings, "row": row}, indent=1) + "\n")
    # They are large, and nothing is left to continue.
    shutil.rmtree(checkpoints_folder(run.config.output_dir), ignore_errors=True)
    return row


def _evaluation_words(run: Run, args: argparse.Namespace) -> list[str]:
    words = ["--model", str(run.folder / "export"), "--out", str(run.folder / "eval"), "--dataset", args.dataset]
    words += ["--prompt", run.config.data.template, "--backend", args.backend, "--dtype", args.dtype]
    for name in ("max_new_tokens", "batch_size", "min_time_limit", "workers", "sandbox"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in ("data", "limit"):
        words += [f"--{name}", str(getattr(args, name))] if getattr(args, name) is not None else []
    return words + [f"--{name.replace('_', '-')}" for name in ("bos", "i_understand") if getattr(args, name)]


def _run_evaluation(what: str, words: Sequence[str], parsed: argparse.Namespace, log: Path) -> None:
    import torch

    if torch.cuda.is_available():
        # A process of its own gives the GPU's memory back to the next training.
        _start(what, ["eval", "run", *words], log)
        return
    # Here imports are what takes time, and one process pays for them once.
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        eval_run.run(parsed)


def _row(run: Run) -> dict[str, Any]:
    """What a reader of ``ablation.jsonl`` gets."""
    score = json.loads((run.folder / "eval" / eval_run.SCORE_FILE).read_text(encoding="utf-8"))
    steps = [row for _, row in read_json_lines(run.folder / "metrics.jsonl")]
    return {
        **_names(run),
        "seed": run.seed,
        "overrides": list(run.overrides),
        "dataset": score["dataset"],
        "n_tasks": score["n_tasks"],
        "n_passed": score["n_passed"],
        "passed": score["passed"],
        "steps": len(steps),
        "samples": run.samples,
        "tokens": sum(row[name] for row in steps for name in _TOKENS),
        **{name: sum(row[name] for row in steps) for name in _TOKENS},
        "last_loss": steps[-1]["loss"],
        "train_seconds": round(sum(row["step_time_ms"] for row in steps) / 1e3, 1),
        "versions": {name: installed_version(name) for name in ("torch", "megatron-core", "transformers", "evalplus")},
        "commit": commit(),
    }


def _names(run: Run) -> dict[str, Any]:
    return {"variant": run.variant, "same_as": list(run.same_as)}


def _start(what: str, words: Sequence[str], log: Path) -> None:
    """Run a command of ours to its end, its output appended to ``log``."""
    parent = os.getpid()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "reflectron.tools.cli", *words],
            # Started from a clone, `python -m` would put the clone's kernels/ and tools/ before installed packages.
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A killed ablation must leave no training that the next one would meet.
            preexec_fn=lambda: die_with(parent),
        )
        with _passing_signals_to(process):
            code = process.wait()
    if code:
        raise RunFailed(what, code, log)


@contextlib.contextmanager
def _passing_signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
