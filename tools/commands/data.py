"""``reflectron data ...``: the arguments of each subcommand, and the calls that serve it.

The work itself is done in ``tools/data``. Everything heavy is imported in the functions, so that ``--help`` answers at
once.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from reflectron.engine.files import require
from reflectron.tools.llm.arguments import add_client_arguments, make_client
from reflectron.tools.planner.request import add_cluster_arguments, cluster_of, planned_architecture
from reflectron.tools.sandbox.process import add_sandbox_arguments


def add_reflect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the problems, the generator, and how far to go with a problem."""
    parser.add_argument("problems", nargs="+", metavar="FILE", help="JSON lines, Parquet, or the id of a hub dataset")
    parser.add_argument("--out", required=True, type=Path, help="folder of the samples and of all that was asked")
    parser.add_argument("--split", default="train", help="of a hub dataset (default: %(default)s)")
    parser.add_argument("--column", help="of the problem's text (default: instruction, problem, query, ..., messages)")
    parser.add_argument("--limit", type=int, help="records to read")
    parser.add_argument(
        "--protocol",
        choices=("chat", "tags"),
        default="chat",
        help="chat: any instruction-tuned model; tags: a checkpoint trained on reflection samples (default: chat)",
    )
    parser.add_argument("--rounds", type=int, default=4, help="programs run for a problem (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=2, help="one-off answers drawn (default: %(default)s)")
    parser.add_argument("--mutants", type=int, default=8, help="mutants the tests are run on (default: %(default)s)")
    parser.add_argument("--interpreters", type=int, help="in use at a time; as many wait (default: --concurrency)")
    parser.add_argument("--run-seconds", type=float, default=10.0, help="of a program (default: %(default)s)")
    add_sandbox_arguments(parser)
    add_client_arguments(parser, temperature=0.7)


def reflect(args: argparse.Namespace) -> int:
    """Make verified samples; return 1 when problems are left to do, or when there is not one sample."""
    require("openai", "tenacity", "jupyter_client", "ipykernel")
    from reflectron.engine.config import DataFile
    from reflectron.tools.data.reflection.reflect import ReflectionRun, ReflectionSettings, check_inputs, reflect_all
    from reflectron.tools.data.reflection.results import read_problems
    from reflectron.tools.llm.work import Stop
    from reflectron.tools.sandbox.process import choose_sandbox
    from reflectron.tools.sandbox.wall import SandboxLimits

    settings = ReflectionSettings(rounds=args.rounds, answers=args.answers, mutants=args.mutants)
    limits = SandboxLimits(wall_seconds=args.run_seconds, cpu_seconds=math.ceil(args.run_seconds))
    check_inputs(args.problems, args.out)
    files = [DataFile(path=path, split=args.split) for path in args.problems]
    records = read_problems(files, args.column, args.limit)
    run = ReflectionRun(
        out=args.out,
        protocol=args.protocol,
        settings=settings,
        limits=limits,
        at_a_time=args.concurrency,
        interpreters=args.concurrency if args.interpreters is None else args.interpreters,
        sandbox=choose_sandbox(args.sandbox, args.i_understand),
    )

    async def ask() -> int:
        async with make_client(args, args.out, Stop()) as client:
            return await reflect_all(run, records, client)

    return asyncio.run(ask())


def add_oss_instruct_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source code, the seeds drawn from it, and the generator."""
    parser.add_argument(
        "data",
        nargs="+",
        metavar="[LANGUAGE=]DATA",
        help="source code: JSONL or Parquet file, or id of a hub dataset, one document a record",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; it can be resumed")
    parser.add_argument("--quota", nargs="+", metavar="LANGUAGE=N", help="seeds (default: the paper's 40k and 8 x 5k)")
    parser.add_argument("--content-column", default="content", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--language-column", default="lang", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--split", default="train", help="split of hub datasets (default: %(default)s)")
    add_client_arguments(parser, temperature=0.0)


def oss_instruct(args: argparse.Namespace) -> int:
    """Draw seeds and have problems written; return 1 when seeds are left unanswered or there is no sample."""
    require("openai", "tenacity")
    from reflectron.tools.data.oss_instruct import PAPER_QUOTAS, draw_tasks, parse_quotas, seed_file, write_problems
    from reflectron.tools.llm.work import Stop

    quotas = parse_quotas(args.quota) if args.quota else PAPER_QUOTAS
    files = [seed_file(word, args.split) for word in args.data]
    tasks = draw_tasks(files, quotas, args.seed, args.content_column, args.language_column)

    async def ask() -> int:
        async with make_client(args, args.out, Stop()) as client:
            return await write_problems(tasks, client, args.out, args.concurrency)

    return asyncio.run(ask())


def add_decontaminate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the data, the benchmarks, and what counts as evidence."""
    _add_files_and_folder(parser)
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files of JSON or Parquet, or hub datasets as name:configuration@split",
    )
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="look at these only (default: all)")
    parser.add_argument("--min-words", type=int, default=10, help="shorter matches are no evidence (default: 10)")
    parser.add_argument("--ngram", type=int, default=6, help="words of an n-gram (default: 6)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of n-grams that is evidence (default: 0.5)")
    parser.add_argument("--allow", metavar="FILE", help="JSON lines with benchmark, task_id or text of allowed matches")


def decontaminate(args: argparse.Namespace) -> int:
    """Decontaminate; return 0 also when records were excluded."""
    require("ahocorasick")
    from reflectron.tools.benchmarks.catalogue import load_benchmark
    from reflectron.tools.data.corpus import data_files
    from reflectron.tools.data.decontaminate import Detector, Evidence, decontaminate_files, read_allowed

    evidence = Evidence(args.min_words, args.ngram, args.overlap)
    files = data_files(args.data, args.split)
    fragments = tuple(fragment for source in args.benchmarks for fragment in load_benchmark(source))
    allowed = read_allowed(args.allow) if args.allow else ()
    detector = Detector(fragments, evidence, allowed, tuple(args.columns))
    decontaminate_files(files, detector, args.out, args.workers)
    return 0


def add_deduplicate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the data, and what counts as a duplicate."""
    _add_files_and_folder(parser)
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="compare these only (default: all)")
    parser.add_argument(
        "--threshold", type=float, default=0.7, help="least Jaccard similarity (default: 0.7; above 1: exact only)"
    )
    parser.add_argument("--words", type=int, default=5, help="words of a shingle (default: 5)")
    parser.add_argument("--permutations", type=int, default=128, help="of MinHash (default: 128)")


def deduplicate(args: argparse.Namespace) -> int:
    """Deduplicate; return 0 also when records were removed."""
    from reflectron.tools.data.corpus import data_files
    from reflectron.tools.data.deduplicate import Similarity, deduplicate_files

    similarity = Similarity(args.threshold, args.words, args.permutations)
    deduplicate_files(data_files(args.data, args.split), args.columns, similarity, args.out, args.workers)
    return 0


def _add_files_and_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.add_argument("--split", default="train", help="split of hub datasets that are read (default: train)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one per core (default)")


def add_analyse_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the data, HumanEval, and the page."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--humaneval", required=True, metavar="SOURCE", help="HumanEval as a file or hub dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--tokenizer", metavar="DIR", help="lengths in its tokens; in words without one")
    parser.add_argument("--split", default="train", help="split of hub datasets that are read (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N records of each file only")


def analyse(args: argparse.Namespace) -> int:
    """Write the page."""
    require("sklearn")
    from reflectron.engine.config import DataFile
    from reflectron.tools.data.analyse import human_eval_tasks, write_page

    tasks = human_eval_tasks(args.humaneval)
    files = [DataFile(path=path, split=args.split) for path in args.data]
    write_page(files, args.limit, tasks, args.tokenizer, args.out)
    return 0


def add_stats_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the training set, and the cluster to predict GPU hours for."""
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG] key=value", help="YAML file of a run, and settings that win over it"
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", help="training files, instead of CONFIG")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, with --data")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="evenly spaced steps to look at, 0 for all (default: 20)"
    )
    parser.add_argument(
        "--reference-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="samples that the reference pads to one length (default: 1, as published)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything there as well")
    parser.add_argument(
        "--plan", metavar="FILE", help="config.json of a model: also predict its GPU hours on this data, as `plan` does"
    )
    add_cluster_arguments(parser)


def stats(args: argparse.Namespace) -> int:
    """Count tokens, and predict GPU hours with ``--plan``."""
    from reflectron.tools.data.stats import best_layout, count, show, stats_config, training_store, write_json

    for name, least in (("steps", 0), ("reference_batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    with tempfile.TemporaryDirectory() as scratch:
        config = stats_config(args.words, args.data, args.tokenizer, Path(scratch))
        store = training_store(config, show_progress=sys.stderr.isatty())
        found = count(store, config, args.steps, args.reference_batch_size)
        best = None
        if args.plan:
            best = best_layout(store, config, planned_architecture(args.plan, config), cluster_of(args))
    show(found, best)
    if args.json:
        write_json(args.json, found, best)
    return 0


def add_visible_tags_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare two folders."""
    parser.add_argument("checkpoint", type=Path, help="folder with tokenizer.json, as `reflectron train` exports it")
    parser.add_argument("out", type=Path, help="new folder for the server")


def visible_tags(args: argparse.Namespace) -> int:
    """Write the folder."""
    from reflectron.tools.data.reflection.dialogue import show_tags

    show_tags(args.checkpoint, args.out)
    print(f"{args.out}: serve this folder, then reflectron data reflect --protocol tags")
    return 0


SUBCOMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "reflect": (add_reflect_arguments, reflect),
    "oss-instruct": (add_oss_instruct_arguments, oss_instruct),
    "decontaminate": (add_decontaminate_arguments, decontaminate),
    "deduplicate": (add_deduplicate_arguments, deduplicate),
    "analyse": (add_analyse_arguments, analyse),
    "stats": (add_stats_arguments, stats),
    "visible-tags": (add_visible_tags_arguments, visible_tags),
}
