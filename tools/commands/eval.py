"""``reflectron eval``: generate answers, score completions, both at once, and ablations of the method."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TypeVar, get_args

from reflectron.engine.files import write_text
from reflectron.engine.job_lock import lock_folder
from reflectron.tools.benchmarks.benchmark import STYLES
from reflectron.tools.benchmarks.catalogue import BENCHMARKS, find_problems, load_problems
from reflectron.tools.eval.ablation import GROUPS, AblationBase, check_ablation, chosen_variants, plan_ablation
from reflectron.tools.eval.backends import Unanswered
from reflectron.tools.eval.generate import BackendName, Generation, generate, report_unanswered
from reflectron.tools.eval.run import evaluate, run_ablation
from reflectron.tools.eval.score import Scoring, describe, read_samples, score_samples, verdicts_beside
from reflectron.tools.load_config import add_config_arguments
from reflectron.tools.sandbox.process import add_sandbox_arguments

Options = TypeVar("Options", Generation, Scoring)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``eval generate``."""
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL file of answers; continued if it exists")
    _add_generation(parser)


def generate_answers(args: argparse.Namespace) -> int:
    """Generate what is missing in the file; return 1 when a server does not answer."""
    try:
        rows = generate(_options(Generation, args), find_problems(args.dataset, args.data), Path(args.out))
    except Unanswered as failure:
        return report_unanswered(failure, args.out)
    print(f"{rows} samples in {args.out}")
    return 0


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``eval score``."""
    parser.add_argument("completions", metavar="FILE", help="JSONL: task_id and solution, or completion of the prompt")
    _add_problems(parser)
    parser.add_argument("--partial", action="store_true", help="score the tasks that the file has, and no others")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    _add_scoring(parser)


def score(args: argparse.Namespace) -> int:
    """Score and print; return 0 whatever the score is."""
    settings = _options(Scoring, args).settings()
    file = find_problems(args.dataset, args.data)
    problems = load_problems(file.benchmark, file.path)
    samples = read_samples(Path(args.completions), problems, partial=args.partial)
    result = score_samples(file, problems, samples, settings, verdicts_beside(args.completions, args.json))
    print(describe(result))
    if args.json:
        write_text(Path(args.json), json.dumps(result, indent=2) + "\n")
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``eval run``."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for answers, score and report")
    parser.add_argument("--against", metavar="DIR", help="folder of another run, to compare task by task")
    _add_generation(parser)
    _add_scoring(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, score and report in one go."""
    return evaluate(_options(Generation, args), _options(Scoring, args), Path(args.out), args.against)


def add_ablate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``eval ablate``."""
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
    parser.add_argument("--keep-going", action="store_true", help="when a run fails, continue with the next")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers")
    _add_answers(parser)
    _add_scoring(parser)


def ablate(args: argparse.Namespace) -> int:
    """Train, score and tabulate what is missing; return 0, or the exit code of the first run that failed."""
    base = AblationBase(args.config, tuple(args.overrides), Path(args.out))
    scoring = _options(Scoring, args)
    seeds = check_ablation(base, args.seeds, os.environ)
    scoring.settings()
    file = find_problems(args.dataset, args.data)
    load_problems(file.benchmark, file.path)
    with lock_folder(base.out, "--out"):
        if args.same_tokens:
            # Half a minute a run with the paper's 400,000 samples.
            print("counting the tokens of every run", flush=True)
        names = chosen_variants(args.groups, args.variants)
        runs = plan_ablation(base, names, seeds, args.same_tokens, sys.stderr.isatty())
        # Model and prompt are each run's own.
        asked = _options(Generation, args, model="")
        return run_ablation(base, runs, asked, scoring, same_tokens=args.same_tokens, keep_going=args.keep_going)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_problems(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(benchmark.name for benchmark in BENCHMARKS)
    parser.add_argument("--dataset", required=True, metavar="NAME|FILE", help=f"{names}, or a file of your own")
    parser.add_argument("--data", metavar="FILE", help="a benchmark's problems, as published, .jsonl or .jsonl.gz")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """Add what ``eval ablate`` has in common with ``eval generate`` and ``eval run``."""
    _add_problems(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once; endpoint: requests")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--bos", action="store_true", help="put BOS before prompts; the student never saw it")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint folder, or the name that the endpoint knows")
    _add_answers(parser)
    parser.add_argument("--prompt", choices=STYLES, default="reflection", help="style (default: reflection)")
    parser.add_argument("--backend", choices=get_args(BackendName), default="transformers")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--endpoint-body", metavar="JSON", default="{}", help="more fields of a request's body")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers a problem (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="samples at once; 0: cores and memory say")
    parser.add_argument(
        "--min-time-limit", type=float, default=1.0, metavar="S", help="CPU seconds an input has at least (1)"
    )
    parser.add_argument("--javatuples", metavar="JAR", help="javatuples-1.2.jar, for MultiPL-E's Java problems")
    add_sandbox_arguments(parser)


def _options(kind: type[Options], args: argparse.Namespace, **given: str) -> Options:
    """Return the options that a dataclass names, and its defaults where a command has no such argument."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(args, field.name)]
    return kind(**{name: getattr(args, name) for name in names} | given)


SUBCOMMANDS = {
    "generate": (add_generate_arguments, generate_answers),
    "score": (add_score_arguments, score),
    "run": (add_run_arguments, run),
    "ablate": (add_ablate_arguments, ablate),
}
