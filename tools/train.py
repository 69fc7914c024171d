"""``reflectron train``: from a YAML file to a trained Hugging Face checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.engine.config import Config
from reflectron.engine.parallel.launch import NOT_FINITE_EXIT_CODE, REQUEUE_EXIT_CODE
from reflectron.engine.parallel.machine import check_machine
from reflectron.tools.interruption import kept, run_saying_what_is_kept
from reflectron.tools.load_config import add_config_arguments, load_config, to_yaml
from reflectron.tools.ranks import only_job, run_as_ranks

if TYPE_CHECKING:
    from reflectron.engine.job_lock import JobLock
    from reflectron.engine.parallel.process_groups import ParallelGroups
    from reflectron.engine.training.run import RunInputs
    from reflectron.engine.training.trainer import Trainer
    from reflectron.tools.run_log import RunLog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_config_arguments(parser)
    parser.add_argument("--show-config", action="store_true", help="print the resolved configuration and stop")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code, that of a stopped run being ``REQUEUE_EXIT_CODE``."""
    config = load_config(args.config, args.overrides)
    if args.show_config:
        print(to_yaml(config), end="")
        return 0
    if not config.data.train:
        raise ValueError("data.train is empty, expected at least one file")
    check_machine(config)
    from reflectron.engine.training.run import look_into_folder
    from reflectron.tools.eval.callback import check_evaluation
    from reflectron.tools.wandb_account import check_wandb

    check_evaluation(config)
    check_wandb(config)
    words = ["train", args.config, *args.overrides]
    with only_job(config) as lock:
        return run_saying_what_is_kept(
            config, lambda: run_as_ranks(config, words, partial(_train, lock), look_into_folder)
        )


def _train(lock: JobLock | None, config: Config, inputs: RunInputs, groups: ParallelGroups) -> int:
    from reflectron.engine.checkpoint.retention import export_folder
    from reflectron.engine.training.trainer import Trainer
    from reflectron.tools.run_log import RunLog

    trainer = Trainer(config, inputs, groups, lock)
    log = RunLog(config, trainer.total_steps, trainer.first_step) if groups.is_main else None
    report = log.line if log else _say_nothing
    try:
        _say_where_it_begins(trainer, report)
        _run_steps(trainer, log, report)
        if not trainer.may_go_on:
            report(_stopped_as_not_finite(config))
            return NOT_FINITE_EXIT_CODE
        if trainer.stopped:
            report(f"stopped by a signal; the same command goes on (exit code {REQUEUE_EXIT_CODE})")
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
        report(f"going on after step {trainer.first_step} from {trainer.resumed.folder}")
        if trainer.first_step == trainer.total_steps:
            report("all steps are done; the export is made")


def _run_steps(trainer: Trainer, log: RunLog | None, report: Callable[[str], None]) -> None:
    from reflectron.tools.eval.callback import evaluate

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
            shares = evaluate(trainer, report)
            if log and shares:
                log.evaluation(row.step, shares)


def _not_exported(config: Config, error: OSError) -> str:
    return (
        f"the export could not be written: {error}; {kept(config)}: make room, and the same command exports without "
        "training those again"
    )


def _stopped_as_not_finite(config: Config) -> str:
    return (
        f"stopped: more than {config.train.max_skipped_steps} steps in a row (train.max_skipped_steps) were not "
        f"finite; {Path(config.output_dir) / 'nonfinite.jsonl'} names ranks, layers and samples; the last "
        f"checkpoint is the one before (exit code {NOT_FINITE_EXIT_CODE})"
    )


def _say_nothing(line: str) -> None:
    """What ranks other than the main one report."""


def _validates_after(step: int, config: Config, total_steps: int) -> bool:
    every = config.train.validate_every
    return bool(every and config.data.validation) and (step % every == 0 or step == total_steps)
