"""Evaluates a checkpoint into a folder of answers, score and report: by itself, in training, or in an ablation.

``completions.jsonl`` is continued where it was left, and so is ``verdicts.jsonl``. In training and on a GPU a process
of its own does the work, so that nothing of it stays in memory and no failure of it ends what has asked for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from reflectron.engine.checkpoint.folder import checkpoints_folder
from reflectron.engine.config import Config
from reflectron.engine.files import installed_version, write_text
from reflectron.engine.parallel.launch import REQUEUE_EXIT_CODE, die_with
from reflectron.engine.training.run import look_into_folder
from reflectron.tools.benchmarks.catalogue import ProblemFile, find_problems, load_problems, read_json_lines
from reflectron.tools.eval.ablation import AblationBase, AblationRun
from reflectron.tools.eval.backends import Unanswered
from reflectron.tools.eval.generate import Generation, generate, generation_settings, report_unanswered
from reflectron.tools.eval.report import write_ablation_report, write_report
from reflectron.tools.eval.score import Scoring, describe, read_samples, score_samples
from reflectron.tools.provenance import source_commit
from reflectron.tools.sandbox.process import choose_sandbox

if TYPE_CHECKING:
    from reflectron.engine.training.trainer import Trainer

SCORE_FILE = "score.json"
# Less than the 30 minutes after which process groups give up at the earliest.
_MOST_SECONDS = 25 * 60
# And less than the watchdog allows a slow phase.
_SHARE_OF_LIMIT = 0.8
_RESULT_FILE = "result.json"
_TOKENS = ("tokens_teacher", "tokens_student", "tokens_generation")


def evaluate(asked: Generation, scoring: Scoring, out: Path, against: str | None = None) -> int:
    """Generate, score and report; return 0 whatever the score is, and 1 when a server does not answer.

    Args:
        out: folder of what is written.
        against: folder of another run, to compare task by task.
    """
    settings, file = scoring.settings(), find_problems(asked.dataset, asked.data)
    other = _read_other(against, file) if against else None
    problems = load_problems(file.benchmark, file.path)[: asked.limit]
    completions = out / "completions.jsonl"
    try:
        generate(asked, file, completions)
    except Unanswered as failure:
        return report_unanswered(failure, completions)
    samples = read_samples(completions, problems, partial=False)
    result = score_samples(file, problems, samples, settings, out / "verdicts.jsonl")
    write_text(out / SCORE_FILE, json.dumps({"model": asked.model, **result}, indent=2) + "\n")
    print(describe(result))
    print(f"report: {write_report(out, file.benchmark, asked.model, result, other)}")
    return 0


def _read_other(against: str, file: ProblemFile) -> dict[str, Any]:
    path = Path(against) / SCORE_FILE
    if not path.is_file():
        raise ValueError(f"{path} is not there, expected the folder of another eval run (--against)")
    other: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if other["dataset"] != file.name:
        raise ValueError(f"{path} is of {other['dataset']}, expected {file.name}")
    return other


def _words(out: Path, *options: Generation | Scoring) -> list[str]:
    """Return the command line of ``evaluate`` after ``reflectron``."""
    words = ["eval", "run", "--out", str(out)]
    for option in options:
        for field in dataclasses.fields(option):
            value, name = getattr(option, field.name), f"--{field.name.replace('_', '-')}"
            if value is True:
                words.append(name)
            elif value != field.default:
                words += [name, str(value)]
    return words


def check_evaluation(config: Config) -> None:
    """Find out before training whether evaluations can run.

    Raises:
        ValueError: when the benchmark's file or the sandbox is missing.
    """
    if config.eval.every and "RANK" not in os.environ:
        find_problems(config.eval.dataset, config.eval.data)
        choose_sandbox("bubblewrap", False)


def evaluate_in_training(trainer: Trainer, report: Callable[[str], None]) -> dict[str, float] | None:
    """Return pass@1 by suite, 0 to 1, on the main rank; every rank calls it.

    The other ranks wait, which is why it is cut off before their patience with a collective ends.

    Args:
        report: told why there is no result, when there is none.
    """
    folder = Path(trainer.config.output_dir) / "evaluation.tmp"
    try:
        trainer.export(folder / "export")
    except OSError as error:
        # On all ranks alike.
        report(f"no evaluation: its export could not be written, training continues: {error}")
        if trainer.groups.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        return None
    trainer.groups.progress.enter("evaluating", slow=True)
    shares = None
    if trainer.groups.is_main:
        shares = _pass_at_1(trainer.config, folder, report)
        shutil.rmtree(folder, ignore_errors=True)
    trainer.groups.barrier()
    return shares


def _pass_at_1(config: Config, folder: Path, report: Callable[[str], None]) -> dict[str, float] | None:
    from reflectron.engine.parallel.judge import SLOW_PHASE_FACTOR

    limit = 60 * config.train.collective_timeout_minutes * SLOW_PHASE_FACTOR * _SHARE_OF_LIMIT
    limit = min(_MOST_SECONDS, limit or _MOST_SECONDS)
    try:
        done = subprocess.run(_command(config, folder), capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        report(f"evaluation stopped after {limit / 60:.0f} minutes: set eval.limit or eval.max_new_tokens")
        return None
    if done.returncode:
        report(f"evaluation failed: {done.stderr.strip()[-500:]}")
        return None
    score = json.loads((folder / "result" / "score.json").read_text(encoding="utf-8"))
    return {str(suite): float(share) for suite, share in score["pass_at_1"].items()}


def _command(config: Config, folder: Path) -> list[str]:
    settings = config.eval
    asked = Generation(
        dataset=settings.dataset,
        data=settings.data,
        model=str(folder / "export"),
        prompt=config.data.template,
        limit=settings.limit or None,
        max_new_tokens=settings.max_new_tokens,
    )
    return [sys.executable, "-m", "reflectron.tools.cli", *_words(folder / "result", asked)]


def run_ablation(
    base: AblationBase,
    runs: Sequence[AblationRun],
    asked: Generation,
    scoring: Scoring,
    *,
    same_tokens: bool,
    keep_going: bool,
) -> int:
    """Train and score what is missing; return 0, or the exit code of the first run that failed.

    A run's folder has what training writes there, and beside it ``train.log``, ``eval/`` and ``result.json``. A run
    that is trained and scored is not looked at again while its settings are the same.

    Args:
        asked: of every run; model and prompt are the run's own.
    """
    rows: list[dict[str, Any]] = []
    first_failure = 0
    for number, run in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {run}"
        print(f"{place}: {run.folder}", flush=True)
        try:
            _train(run)
            rows.append(_evaluate_run(run, asked, scoring))
        except RunFailed as error:
            print(f"{place}: {error}", file=sys.stderr, flush=True)
            first_failure = first_failure or error.code
            if error.code == REQUEUE_EXIT_CODE or not keep_going:
                break
            continue
        print(f"{place}: {_described(rows[-1])}", flush=True)
        page = write_ablation_report(base.out, rows, config=base.path, same_tokens=same_tokens)
    if rows:
        print(f"table: {page}")
    return first_failure


def _described(row: dict[str, Any]) -> str:
    passed = ", ".join(f"{count} {suite}" for suite, count in row["n_passed"].items())
    loss = "not finite" if row["last_loss"] is None else f"{row['last_loss']:.3f}"
    return f"{row['steps']} steps, {row['tokens']:,} tokens, loss {loss}; {row['n_tasks']} tasks, passed: {passed}"


def _train(run: AblationRun) -> None:
    """Train what is not yet trained.

    Raises:
        ValueError: when the folder holds another run.
        RunFailed: when the run did not come to its end.
    """
    if look_into_folder(run.config, run.inputs) is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        _start(f"{run}: training", run.words, run.folder / "train.log")


def _evaluate_run(run: AblationRun, asked: Generation, scoring: Scoring) -> dict[str, Any]:
    """Return the run's row, from its score; made unless it is there.

    Raises:
        ValueError: when answers of other settings stand in the folder.
        RunFailed: when the evaluation's process failed.
    """
    asked = dataclasses.replace(asked, model=str(run.folder / "export"), prompt=run.config.data.template)
    settings = generation_settings(asked, find_problems(asked.dataset, asked.data))
    settings |= {"limit": asked.limit, "min-time-limit": scoring.min_time_limit}
    path = run.folder / _RESULT_FILE
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        # As it comes back from a file.
        if found["settings"] == json.loads(json.dumps(settings)):
            row: dict[str, Any] = found["row"]
            return row | _variant_names(run)
    _evaluate_apart(f"{run}: evaluation", asked, scoring, run.folder)
    row = _row(run)
    write_text(path, json.dumps({"settings": settings, "row": row}, indent=1) + "\n")
    # They are large, and nothing is left to continue.
    shutil.rmtree(checkpoints_folder(run.config.output_dir), ignore_errors=True)
    return row


def _evaluate_apart(what: str, asked: Generation, scoring: Scoring, folder: Path) -> None:
    import torch

    log = folder / "eval.log"
    if torch.cuda.is_available():
        # A process of its own gives the GPU's memory back to the next training.
        _start(what, _words(folder / "eval", asked, scoring), log)
        return
    # Here imports are what takes time, and one process pays for them once.
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        evaluate(asked, scoring, folder / "eval")


def _row(run: AblationRun) -> dict[str, Any]:
    """Return what a reader of ``ablation.jsonl`` gets."""

    score = json.loads((run.folder / "eval" / SCORE_FILE).read_text(encoding="utf-8"))
    steps = [row for _, row in read_json_lines(run.folder / "metrics.jsonl")]
    return {
        **_variant_names(run),
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
        "commit": source_commit(),
    }


def _variant_names(run: AblationRun) -> dict[str, Any]:
    return {"variant": run.variant, "same_as": list(run.same_as)}


class RunFailed(Exception):
    """A run's process ended with an exit code other than 0."""

    def __init__(self, what: str, code: int, log: Path) -> None:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        super().__init__(f"{what} ended with exit code {code}; {log} ends with: {last.strip()}")
        self.code = code


def _start(what: str, words: Sequence[str], log: Path) -> None:
    """Run a command of ours to its end, its output appended to ``log``.

    SIGTERM and SIGUSR1 are passed on, so that a training saves and ends.
    """
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
