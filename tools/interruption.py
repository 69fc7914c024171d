"""What a stopped training leaves behind, in words, and how it is continued."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from reflectron.engine.checkpoint.retention import checkpoints_folder, step_folder, steps_to_try
from reflectron.engine.config import Config
from reflectron.engine.parallel.launch import SUPERVISED, resolve_environment


def run_saying_what_is_kept(config: Config, action: Callable[[], int]) -> int:
    """Call ``action``; after Ctrl-C, one line on stderr says what is kept and how to resume.

    Returns:
        The exit code of ``action``.
    """
    try:
        code = action()
    except KeyboardInterrupt:
        _say(config)
        raise
    if code == 128 + signal.SIGINT:
        _say(config)
    return code


def kept(config: Config) -> str:
    """Which steps of the run are on the disk."""
    root = checkpoints_folder(config.output_dir)
    steps = steps_to_try(root).steps
    return f"steps 1-{steps[0]} are kept in {step_folder(root, steps[0])}" if steps else "no step was saved yet"


def _say(config: Config) -> None:
    place = resolve_environment(os.environ)
    # One process speaks: the command that started the ranks, or rank 0 of another launcher's.
    if place is not None and (place.rank > 0 or SUPERVISED in os.environ):
        return
    print(
        f"reflectron train: interrupted; {kept(config)}; what was tokenised is kept; the same command resumes there "
        "(SIGTERM instead of Ctrl-C saves the steps since then, too)",
        file=sys.stderr,
        flush=True,
    )
