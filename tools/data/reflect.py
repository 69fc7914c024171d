"""``reflectron data reflect``: problems come in, verified reflection samples in the published schema go out.

A generator behind an endpoint writes code with tests, an interpreter in a sandbox runs it, the generator repairs it
until the tests pass, and answers once more as if at the first attempt. The same command goes on where a run ended,
however it ended.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.tools.llm.arguments import add_client_arguments, require
from reflectron.tools.sandbox.process import add_sandbox_arguments

if TYPE_CHECKING:
    from reflectron.tools.data.reflection.dialogue import Problem
    from reflectron.tools.data.reflection.problems import Reject
    from reflectron.tools.data.reflection.results import Results
    from reflectron.tools.data.reflection.sequence import Reflection
    from reflectron.tools.llm.client import LlmClient
    from reflectron.tools.llm.progress import Progress

STATS = "stats.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Problems, the generator, and how far to go with a problem."""
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
    parser.add_argument("--mutants", type=int, default=8, help="changed answers the tests see (default: %(default)s)")
    parser.add_argument("--interpreters", type=int, help="in use at a time; as many wait (default: --concurrency)")
    parser.add_argument("--run-seconds", type=float, default=10.0, help="of a program (default: %(default)s)")
    add_sandbox_arguments(parser)
    add_client_arguments(parser, temperature=0.7)


def run(args: argparse.Namespace) -> int:
    """Make the samples; 1 when the run ended before every problem was done, or when there is not one sample."""
    import asyncio

    require("openai", "tenacity", "jupyter_client", "ipykernel")
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    from reflectron.tools.data.reflection.dialogue import Chat, Dialogue, Problem, Tags
    from reflectron.tools.data.reflection.executions import Interpreters
    from reflectron.tools.data.reflection.results import Results
    from reflectron.tools.data.reflection.sequence import Reflection, Settings
    from reflectron.tools.data.reflection.verification import sandbox_runner
    from reflectron.tools.llm.arguments import make_client
    from reflectron.tools.llm.progress import Progress
    from reflectron.tools.llm.request import content_hash
    from reflectron.tools.llm.work import Stop, ending
    from reflectron.tools.sandbox.limits import Limits
    from reflectron.tools.sandbox.process import choose_sandbox

    settings = Settings(rounds=args.rounds, answers=args.answers, mutants=args.mutants)
    limits = Limits(wall_seconds=args.run_seconds, cpu_seconds=math.ceil(args.run_seconds))
    dialogue: Dialogue = Chat() if args.protocol == "chat" else Tags()
    records = _records(args)
    problems = [record for record in records if isinstance(record, Problem)]
    kind = choose_sandbox(args.sandbox, args.i_understand)
    stop = Stop()
    async with make_client(args, args.out, stop) as client:
        pipeline = content_hash(
            [dialogue.template, args.model, asdict(client.sampling), asdict(settings), kind, asdict(limits)]
        )
        with Results(args.out, pipeline) as results:
            todo = [problem for problem in problems if not results.known(problem)]
            progress = Progress(client, len(problems), len(problems) - len(todo))
            if todo:
                size = args.concurrency if args.interpreters is None else args.interpreters
                with progress, stop.on_signals(), Interpreters(args.out, kind, limits, size) as interpreters:
                    runner = sandbox_runner(kind, limits)
                    reflection = Reflection(client, interpreters, dialogue, runner, settings)
                    await _solve(reflection, todo, results, progress, args.concurrency)
            made = _report(args, records, results, client, progress)
            left = sum(not results.known(problem) for problem in problems)
    end = ending(stop, made=made, left=left, unit="problems")
    if end.line is not None:
        progress.line(end.line)
    return end.code


def _records(args: argparse.Namespace) -> list[Problem | Reject]:
    from reflectron.engine.config import DataFile
    from reflectron.tools.data.reflection.executions import EXECUTIONS
    from reflectron.tools.data.reflection.problems import read_problems
    from reflectron.tools.data.reflection.results import OUTCOMES, REJECTS, SAMPLES
    from reflectron.tools.llm.work import ATTEMPTS

    own = {(args.out / name).resolve() for name in (ATTEMPTS, EXECUTIONS, OUTCOMES, SAMPLES, REJECTS, STATS)}
    if taken := [path for path in args.problems if Path(path).resolve() in own]:
        raise ValueError(f"{taken[0]} is a file that this command writes; name another folder with --out")
    files = [DataFile(path=path, split=args.split) for path in args.problems]
    return list(islice(read_problems(files, args.column), args.limit))


async def _solve(
    reflection: Reflection, todo: Sequence[Problem], results: Results, progress: Progress, at_a_time: int
) -> None:
    from reflectron.tools.llm.work import for_each

    async def work(problem: Problem) -> None:
        outcome = await reflection.solve(problem)
        await results.add(problem, outcome)
        progress.step("accepted" if outcome.reason is None else "rejected")

    await for_each(todo, work, at_a_time=at_a_time, stop=reflection.client.stop)


def _report(
    args: argparse.Namespace,
    records: Sequence[Problem | Reject],
    results: Results,
    client: LlmClient,
    progress: Progress,
) -> int:
    """Write the files of the run and say what they hold; returns the samples."""
    from reflectron.tools.data.reflection.report import Tally, lines
    from reflectron.tools.data.reflection.results import SAMPLES

    count = client.count
    tally = Tally(count, "tokens") if count is not None else Tally(len, "characters")
    results.write(records, tally)
    stats = {"pipeline": results.pipeline, "model": args.model, "protocol": args.protocol, **tally.stats(client)}
    (args.out / STATS).write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    for line in lines(stats):
        progress.line(line)
    progress.line(f"samples    {args.out / SAMPLES}")
    return int(stats["accepted"])
