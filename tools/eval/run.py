"""``reflectron eval run``: from a checkpoint to a folder with answers, score and a report page.

``completions.jsonl`` is continued where it was left (``eval generate``), and so is ``verdicts.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from reflectron.engine.files import write_text
from reflectron.tools.eval.decoding import Unanswered
from reflectron.tools.eval.generate import add_generation_arguments, generate, stopped
from reflectron.tools.eval.problems import ProblemFile, find_problems, load_problems
from reflectron.tools.eval.samples import read_samples
from reflectron.tools.eval.score import add_scoring_arguments, describe, score_samples, scoring_limits
from reflectron.tools.sandbox.process import choose_sandbox

SCORE_FILE = "score.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for answers, score and report")
    parser.add_argument("--against", metavar="DIR", help="folder of another run, to compare task by task")
    add_generation_arguments(parser)
    add_scoring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, score, report; returns 0 whatever the score is, and 1 when a server does not answer."""
    from reflectron.tools.eval.report import write_report

    kind, limits = choose_sandbox(args.sandbox, args.i_understand), scoring_limits(args)
    file, out = find_problems(args.dataset, args.data), Path(args.out)
    other = _read_other(args, file)
    problems = load_problems(file.dataset, file.path)[: args.limit]
    completions = out / "completions.jsonl"
    try:
        generate(args, file, completions)
    except Unanswered as failure:
        return stopped(failure, completions)
    samples = read_samples(completions, problems, partial=False)
    result = score_samples(args, file, problems, samples, limits, kind, out / "verdicts.jsonl")
    write_text(out / SCORE_FILE, json.dumps({"model": args.model, **result}, indent=2) + "\n")
    print(describe(result))
    print(f"report: {write_report(out, args.model, result, other)}")
    return 0


def _read_other(args: argparse.Namespace, file: ProblemFile) -> dict[str, Any] | None:
    if not args.against:
        return None
    path = Path(args.against) / SCORE_FILE
    if not path.is_file():
        raise ValueError(f"{path} is not there, expected the folder of another eval run (--against)")
    other: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if other["dataset"] != file.name:
        raise ValueError(f"{path} is of {other['dataset']}, expected {file.name}")
    return other
