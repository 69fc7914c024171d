"""``reflectron train``: from a YAML file to a trained Hugging Face checkpoint."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.engine.config import Config
from reflectron.engine.parallel.launch import NOT_FINITE_EXIT_CODE, REQUEUE_EXIT_CODE
from reflectron.engine.parallel.machine import check_machine
from reflectron.tools.load_config import add_config_arguments, load_config, to_yaml
from reflectron.tools.ranks import run_as_ranks

if TYPE_CHECKING:
    from reflectron.engine.parallel.process_groups import ParallelGroups
    from reflectron.engine.preparation import RunInputs


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
    from reflectron.engine.checkpoint.run_identity import look_into_folder
    from reflectron.tools.eval.callback import check_evaluation

    check_evaluation(config)
    return run_as_ranks(config, ["train", args.config, *args.overrides], _train, look_into_folder)


def _train(config: Config, inputs: RunInputs, groups: ParallelGroups) -> int:
    from reflectron.engine.trainer import Trainer
    from reflectron.tools.eval.callback import evaluate
    from reflectron.tools.run_log import RunLog

    trainer = Trainer(config, inputs, groups)
    log = RunLog(config, trainer.total_steps, trainer.first_step) if groups.is_main else None
    report = log.line if log else _say_nothing
    try:
        for line in trainer.backends.lines():
            report(line)
        if trainer.resumed is not None:
            for damage in trainer.resumed.damaged:
                report(f"{damage}; the checkpoint before it is used")
            report(f"going on after step {trainer.first_step} from {trainer.resumed.folder}")
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
        if not trainer.may_go_on:
            report(_stopped_as_not_finite(config))
            return NOT_FINITE_EXIT_CODE
        if trainer.stopped:
            report(f"stopped by a signal; the same command goes on (exit code {REQUEUE_EXIT_CODE})")
            return REQUEUE_EXIT_CODE
        export = Path(config.output_dir) / "export"
        trainer.export(export)
        if log:
            log.finish(export)
        trainer.mark_finished()
        return 0
    finally:
        if log:
            log.close()


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
