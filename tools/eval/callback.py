"""pass@1 of a model in training: a temporary export goes through ``reflectron eval run`` on the main rank.

A process of its own does the work, so that nothing of it stays in the trainer's memory and no failure of it ends the
run. The other ranks wait, which is why it is cut off before their patience with a collective ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.engine.config import Config

if TYPE_CHECKING:
    from reflectron.engine.training.trainer import Trainer

# Less than the 30 minutes after which process groups give up at the earliest.
_MOST_SECONDS = 25 * 60
# And less than the watchdog allows a slow phase.
_SHARE_OF_LIMIT = 0.8


def check_evaluation(config: Config) -> None:
    """Find out before training whether evaluations can run.

    Raises:
        ValueError: when the benchmark's file or the sandbox is missing.
    """
    if config.eval.every and "RANK" not in os.environ:
        from reflectron.tools.eval.problems import find_data
        from reflectron.tools.sandbox.process import choose_sandbox

        find_data(config.eval.dataset, config.eval.data)
        choose_sandbox("bubblewrap", False)


def evaluate(trainer: Trainer, report: Callable[[str], None]) -> dict[str, float] | None:
    """pass@1 by suite, 0 to 1, on the main rank; every rank calls it.

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
    words = [sys.executable, "-m", "reflectron.tools.cli", "eval", "run", "--model", str(folder / "export")]
    words += ["--out", str(folder / "result"), "--dataset", settings.dataset, "--prompt", config.data.template]
    words += ["--max-new-tokens", str(settings.max_new_tokens)]
    words += ["--data", settings.data] if settings.data else []
    return [*words, "--limit", str(settings.limit)] if settings.limit else words
