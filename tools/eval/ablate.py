"""``reflectron eval ablate``: one configuration in, the method's ablation with seeds and confidence intervals out.

Each variant is the configuration with a few settings changed. Its runs are trained by ``reflectron train`` and scored
as ``reflectron eval run`` scores, one after the other; the same command goes on where it was stopped. The table is
written anew after each run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from reflectron.engine.files import write_text
from reflectron.engine.job_lock import lock_folder
from reflectron.engine.parallel.launch import REQUEUE_EXIT_CODE, resolve_environment
from reflectron.engine.parallel.machine import check_machine
from reflectron.tools.eval.generate import add_answer_arguments
from reflectron.tools.eval.problems import find_problems, load_problems
from reflectron.tools.eval.score import add_scoring_arguments, scoring_limits
from reflectron.tools.eval.variants import GROUPS, chosen
from reflectron.tools.load_config import add_config_arguments, load_config
from reflectron.tools.sandbox.process import choose_sandbox


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    add_config_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the table")
    parser.add_argument(
        "--groups", type=_listed, default=["method"], metavar="A,B", help=f"of {', '.join(GROUPS)} (default: method)"
    )
    parser.add_argument("--variants", type=_listed, default=[], metavar="A,B", help="instead of groups; full is added")
    parser.add_argument("--seeds", type=_listed, default=[], metavar="N,N", help="default: CONFIG's alone")
    parser.add_argument(
        "--same-tokens", action="store_true", help="train every variant on as many tokens as full, instead of as long"
    )
    parser.add_argument("--keep-going", action="store_true", help="when a run fails, go on with the next")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    add_answer_arguments(parser)
    add_scoring_arguments(parser)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run(args: argparse.Namespace) -> int:
    """Train, score and tabulate what is missing; returns 0, or the exit code of the first run that failed."""
    _check(args)
    with lock_folder(Path(args.out), "--out"):
        return _run_alone(args)


def _run_alone(args: argparse.Namespace) -> int:
    from reflectron.tools.eval.ablation_plan import Base, plan
    from reflectron.tools.eval.ablation_run import RunFailed, evaluate, train

    base = Base(args.config, tuple(args.overrides), Path(args.out))
    seeds = [int(seed) for seed in dict.fromkeys(args.seeds)]
    if args.same_tokens:
        # Half a minute a run with the paper's 400,000 samples.
        print("counting the tokens of every run", flush=True)
    runs = plan(base, chosen(args.groups, args.variants), seeds, args.same_tokens, sys.stderr.isatty())
    rows: list[dict[str, Any]] = []
    first_failure = 0
    for number, one in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {one}"
        print(f"{place}: {one.folder}", flush=True)
        try:
            train(one)
            rows.append(evaluate(one, args))
        except RunFailed as error:
            print(f"{place}: {error}", file=sys.stderr, flush=True)
            first_failure = first_failure or error.code
            if error.code == REQUEUE_EXIT_CODE or not args.keep_going:
                break
            continue
        print(f"{place}: {_described(rows[-1])}", flush=True)
        _write(args, rows)
    if rows:
        print(f"table: {base.out / 'ablation.md'}")
    return first_failure


def _check(args: argparse.Namespace) -> None:
    """Find out before any training what can be wrong.

    Raises:
        ValueError: naming the argument, key or file at fault.
    """
    if resolve_environment(os.environ) is not None:
        raise ValueError("eval ablate starts its training runs itself: start it once, without torchrun or srun")
    for seed in args.seeds:
        if not seed.isdecimal():
            raise ValueError(f"--seeds holds {seed!r}, expected numbers of 0 or more")
    config = load_config(args.config, args.overrides)
    if not config.data.train:
        raise ValueError("data.train is empty, expected at least one file")
    check_machine(config)
    scoring_limits(args)
    choose_sandbox(args.sandbox, args.i_understand)
    file = find_problems(args.dataset, args.data)
    load_problems(file.dataset, file.path)


def _described(row: dict[str, Any]) -> str:
    passed = ", ".join(f"{count} {suite}" for suite, count in row["n_passed"].items())
    loss = "not finite" if row["last_loss"] is None else f"{row['last_loss']:.3f}"
    return f"{row['steps']} steps, {row['tokens']:,} tokens, loss {loss}; {row['n_tasks']} tasks, passed: {passed}"


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from reflectron.tools.eval.ablation_report import write_report

    out = Path(args.out)
    write_text(out / "ablation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_report(out, rows, config=args.config, same_tokens=args.same_tokens)
