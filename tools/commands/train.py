"""``reflectron train``: from a YAML file to a trained Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import netrc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from reflectron.engine.checkpoint.folder import checkpoints_folder, step_folder, steps_to_try
from reflectron.engine.config import Config
from reflectron.engine.parallel.launch import NOT_FINITE_EXIT_CODE, REQUEUE_EXIT_CODE, SUPERVISED, resolve_environment
from reflectron.engine.parallel.machine import check_machine
from reflectron.tools.load_config import add_config_arguments, load_config, to_yaml
from reflectron.tools.ranks import only_job, run_as_ranks

if TYPE_CHECKING:
    from reflectron.engine.job_lock import JobLock
    from reflectron.engine.parallel.process_groups import ParallelGroups
    from reflectron.engine.training.run import RunInputs
    from reflectron.engine.training.trainer import Trainer
    from reflectron.tools.run_log import RunLog

_WITHOUT_KEY = ("offline", "disabled", "dryrun")
_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_config_arguments(parser)
    parser.add_argument("--show-config", action="store_true", help="print the resolved configuration and stop")


def run(args: argparse.Namespace) -> int:
    """Train; return the exit code, that of a stopped run being ``REQUEUE_EXIT_CODE``."""
    config = load_config(args.config, args.overrides)
    if args.show_config:
        print(to_yaml(config), end="")
        return 0
    if not config.data.train:
        raise ValueError("data.train is empty, expected at least one file")
    check_machine(config)
    from reflectron.engine.training.run import look_into_folder
    from reflectron.tools.eval.run import check_evaluation

    check_evaluation(config)
    check_wandb(config)
    words = ["train", args.config, *args.overrides]
    with only_job(config) as lock:
        return _say_what_is_kept_after(
            config, lambda: run_as_ranks(config, words, partial(_train, lock), look_into_folder)
        )


def _train(lock: JobLock | None, config: Config, inputs: RunInputs, groups: ParallelGroups) -> int:
    from reflectron.engine.checkpoint.folder import export_folder
    from reflectron.engine.training.trainer import Trainer
    from reflectron.tools.run_log import RunLog

    trainer = Trainer(config, inputs, groups, lock)
    log = RunLog(config, trainer.total_steps, trainer.first_step) if groups.is_main else None
    report = log.line if log else _say_nothing
    try:
        _say_where_it_begins(trainer, report)
        _run_steps(trainer, log, report)
        if not trainer.may_continue:
            report(_stopped_as_not_finite(config))
            return NOT_FINITE_EXIT_CODE
        if trainer.stopped:
            report(f"stopped by a signal; the same command resumes the run (exit code {REQUEUE_EXIT_CODE})")
            return REQUEUE_EXIT_CODE
        export = export_folder(config.output_dir)
        try:
            trainer.export(export)
        except OSError as error:
            raise ValueError(_not_exported(config, error)) from error
        if log:
            log.finish(export)
        trainer.mark_finished()
        return 0
    finally:
        if log:
            log.close()


def _say_where_it_begins(trainer: Trainer, report: Callable[[str], None]) -> None:
    for line in trainer.backends.lines():
        report(line)
    if trainer.resumed is not None:
        for damage in trainer.resumed.damaged:
            report(damage)
        report(f"resuming after step {trainer.first_step} from {trainer.resumed.folder}")
        if trainer.first_step == trainer.total_steps:
            report("all steps are done; exporting")


def _run_steps(trainer: Trainer, log: RunLog | None, report: Callable[[str], None]) -> None:
    from reflectron.tools.eval.run import evaluate_in_training

    config = trainer.config
    for row in trainer.steps(report):
        if log:
            log.step(row, partial(trainer.sample_ids, row.step))
            if row.skipped:
                log.skipped(row, trainer.findings, trainer.sample_ids(row.step), trainer.skipped.in_a_row)
        if _validates_after(row.step, config, trainer.total_steps):
            terms = trainer.validate()
            if log:
                log.validation(row.step, terms)
        if config.eval.every and row.step % config.eval.every == 0:
            shares = evaluate_in_training(trainer, report)
            if log and shares:
                log.evaluation(row.step, shares)


def _not_exported(config: Config, error: OSError) -> str:
    return (
        f"the export could not be written: {error}; {_kept(config)}: make room, and the same command exports without "
        "training those again"
    )


def _stopped_as_not_finite(config: Config) -> str:
    return (
        f"stopped: more than {config.train.max_skipped_steps} steps in a row (train.max_skipped_steps) were not "
        f"finite; {Path(config.output_dir) / 'nonfinite.jsonl'} names ranks, layers and samples; the last "
        f"checkpoint is the one before (exit code {NOT_FINITE_EXIT_CODE})"
    )


def _say_nothing(line: str) -> None:
    """Report nothing, as ranks other than the main one do."""


def _validates_after(step: int, config: Config, total_steps: int) -> bool:
    every = config.train.validate_every
    return bool(every and config.data.validation) and (step % every == 0 or step == total_steps)


def _say_what_is_kept_after(config: Config, action: Callable[[], int]) -> int:
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


def _kept(config: Config) -> str:
    """Say which steps of the run are on the disk."""
    root = checkpoints_folder(config.output_dir)
    steps = steps_to_try(root).steps
    return f"steps 1-{steps[0]} are kept in {step_folder(root, steps[0])}" if steps else "no step was saved yet"


def _say(config: Config) -> None:
    place = resolve_environment(os.environ)
    # One process speaks: the command that started the ranks, or rank 0 of another launcher's.
    if place is not None and (place.rank > 0 or SUPERVISED in os.environ):
        return
    print(
        f"reflectron train: interrupted; {_kept(config)}; what was tokenised is kept; the same command resumes there "
        "(SIGTERM instead of Ctrl-C saves the steps since then, too)",
        file=sys.stderr,
        flush=True,
    )


def check_wandb(config: Config, env: Mapping[str, str] = os.environ) -> None:
    """Check that package and key are there, if the run logs at all.

    Raises:
        ValueError: naming what is missing.
    """
    project = config.train.wandb_project
    if project is None or int(env.get("RANK") or env.get("SLURM_PROCID") or 0) > 0:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"train.wandb_project is {project!r}, but the package wandb is not installed: "
            "pip install 'reflectron[wandb]'"
        )
    settings = _settings(env)
    mode = env.get("WANDB_MODE") or settings.get("mode", "online")
    if mode in _WITHOUT_KEY or env.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return
    if any(env.get(name) for name in _KEYS) or settings.get("api_key") or _in_netrc(env, settings):
        return
    raise ValueError(
        f"train.wandb_project is {project!r}, but there is no API key of Weights & Biases: run `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE=offline"
    )


def _settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return what wandb's own settings files say; the one of the working directory wins."""
    found = configparser.ConfigParser(interpolation=None)
    home = Path(env.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    with suppress(configparser.Error, UnicodeDecodeError):
        found.read([home / "settings", Path(env.get("WANDB_DIR") or ".") / "wandb" / "settings"])
    return dict(found["default"]) if found.has_section("default") else {}


def _in_netrc(env: Mapping[str, str], settings: Mapping[str, str]) -> bool:
    server = env.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    files = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(str(Path(file).expanduser())).authenticators(urlsplit(server).hostname or server):
                return True
    return False


SUBCOMMANDS = {"": (add_arguments, run)}
