"""``reflectron plan``: predict which layouts of a model on a cluster fit, how long they take and what they cost.

Nothing is run: memory is counted, time is predicted from the rates of datasheets or of ``reflectron bench calibrate``,
and everything assumed is printed.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from reflectron.tools.planner.request import add_cluster_arguments, make_planner, requested_layouts

_LENGTHS = ("papers", "oss-instruct", "evol-instruct", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG] key=value", help="YAML file of a run, and settings that win over it"
    )
    parser.add_argument("--model", metavar="FILE", help="config.json of the model; model.path of CONFIG otherwise")
    add_cluster_arguments(parser)
    parser.add_argument("--lengths", choices=_LENGTHS, default="papers", help="assumed, or of data.train in CONFIG")
    parser.add_argument("--as-is", action="store_true", help="predict CONFIG's own layout instead of searching")
    parser.add_argument("--tokens", action="store_true", help="also count tokens over the mask schedule")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: 5)")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="also show money, in its currency")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the best layout as the YAML file of a run")


def run(args: argparse.Namespace) -> int:
    """Predict; return the exit code."""
    from reflectron.tools.planner import report
    from reflectron.tools.planner.report import write_recipe

    if args.top < 1:
        raise ValueError(f"--top is {args.top}, expected at least 1")
    planner = make_planner(args)
    predictions = requested_layouts(args, planner)
    best = predictions[0]
    report.show_layouts(predictions[: args.top], args.price_per_gpu_hour)
    paper = f"ReflectionCoder's 34B run took {report.PAPER_GPU_HOURS} on 16 A800"
    print(f"The first of them: {best.gpu_hours:.0f} GPU hours; {paper}.\n")
    report.show_parts(best)
    if args.tokens:
        report.show_tokens(planner)
    print("Assumptions:")
    for line in report.assumptions(planner, best):
        print(f"- {line}")
    if args.write:
        write_recipe(args.write, best, f"reflectron plan {shlex.join(_words(args))}")
        print(f"\nwrote {args.write}")
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """Return the arguments that a recipe depends on."""
    words = [*args.words, "--gpu", args.gpu, "--gpus", str(args.gpus), "--gpus-per-node", str(args.gpus_per_node)]
    words += ["--lengths", args.lengths]
    for name in ("backends", "model", "network_gbit", "calibration"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words


SUBCOMMANDS = {"": (add_arguments, run)}
