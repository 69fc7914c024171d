"""``reflectron data oss-instruct``: source code in; coding problems that it inspired, with solutions, out.

OSS-Instruct (Magicoder, arXiv 2312.02120): a model is shown some lines of open-source code and writes a problem and its
solution. The same command goes on where it was stopped; no answer is paid for twice. What it writes is in the schema of
Magicoder-OSS-Instruct-75K, which ``data.train`` reads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.tools.data.corpus import new_file, require_unicode, write_row
from reflectron.tools.data.oss_rows import Cleaner, Row, Unusable, parse_answer
from reflectron.tools.data.seeds import PAPER_QUOTAS, Seed, SeedFile, draw_seeds, language_name
from reflectron.tools.llm.arguments import add_client_arguments, make_client
from reflectron.tools.llm.reply import FINAL
from reflectron.tools.llm.request import PromptTemplate, Request, content_hash
from reflectron.tools.llm.work import Stop, ending, for_each

if TYPE_CHECKING:
    from reflectron.tools.llm.client import LlmClient

_STAGE = "oss-instruct"
_SYSTEM = PromptTemplate("oss-instruct-system-1", "You write original programming exercises and solve them correctly.")
_PROMPT = PromptTemplate(
    "oss-instruct-1",
    """\
Below are a few lines taken at random from a $language program. Let them give you an idea, and write a new programming
problem of high quality with its solution. The problem may go far beyond the lines; a reader of the problem never sees
them.

Lines:
```
$seed
```

Answer in two sections, each under its heading on a line of its own:

[Problem Description]
The problem. It must be complete in itself: give all context, names, inputs and expected results that a programmer
needs, and quote any code it builds on. Do not solve it here.

[Solution]
A correct and complete solution in $language that does all that the problem asks, with a short explanation where it
helps.""",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "data",
        nargs="+",
        metavar="[LANGUAGE=]DATA",
        help="source code: JSONL or Parquet file, or id of a hub dataset, one document a record",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; it can be continued")
    parser.add_argument("--quota", nargs="+", metavar="LANGUAGE=N", help="seeds (default: the paper's 40k and 8 x 5k)")
    parser.add_argument("--content-column", default="content", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--language-column", default="lang", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--split", default="train", help="split of hub datasets (default: %(default)s)")
    add_client_arguments(parser, temperature=0.0)


@dataclass(frozen=True)
class _Task:
    """A seed and its number among those of its language."""

    index: int
    seed: Seed


def run(args: argparse.Namespace) -> int:
    """Draw, ask, clean and write; 1 when not every seed has its answer, or when there is not one sample."""
    quotas = _quotas(args.quota) if args.quota else PAPER_QUOTAS
    files = [_seed_file(word, args.split) for word in args.data]
    seeds, counts = draw_seeds(files, quotas, args.seed, args.content_column, args.language_column)
    tasks = [_Task(index, seed) for language in quotas for index, seed in enumerate(seeds[language])]
    for language, quota in quotas.items():
        print(f"{language}: {len(seeds[language])} of {quota} seeds from {counts.documents[language]} documents")
    for reason, count in counts.skipped.most_common():
        print(f"{count} documents skipped: {reason}")
    answers, stop = asyncio.run(_ask_all(args, tasks))
    end = ending(stop, **_write(tasks, answers, args.out), unit="seeds")
    if end.line is not None:
        print(end.line)
    return end.code


def _quotas(words: Sequence[str]) -> dict[str, int]:
    quotas = {}
    for word in words:
        language, _, number = word.partition("=")
        if not language or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--quota is {word!r}, expected LANGUAGE=N with N of at least 1, such as python=40000")
        quotas[language_name(language)] = int(number)
    return quotas


def _seed_file(word: str, split: str) -> SeedFile:
    language, equals, path = word.partition("=")
    if equals and not Path(word).exists():
        return SeedFile(DataFile(path=path, split=split), language)
    return SeedFile(DataFile(path=word, split=split), None)


async def _ask_all(args: argparse.Namespace, tasks: Sequence[_Task]) -> tuple[dict[_Task, str | Unusable], Stop]:
    """The answers that there are, and whether and why the run ended early."""
    from reflectron.tools.llm.client import RequestFailed
    from reflectron.tools.llm.progress import Progress

    answers: dict[_Task, str | Unusable] = {}
    stop = Stop()
    cleaner = Cleaner()
    async with make_client(args, args.out, stop) as client:
        with stop.on_signals(), Progress(client, total=len(tasks)) as progress:

            async def ask(task: _Task) -> None:
                try:
                    cleaner.check_seed(task.seed.text)
                    answers[task] = await _ask(client, task.seed)
                except Unusable as error:
                    answers[task] = error
                except RequestFailed as error:
                    if error.kind not in FINAL:
                        # The server's failure says nothing about the seed, which stays to be asked about.
                        progress.step(f"request failed: {error.kind}")
                        return
                    answers[task] = Unusable(f"request failed: {error.kind}")
                result = answers[task]
                progress.step("answered" if isinstance(result, str) else str(result))

            await for_each(tasks, ask, at_a_time=args.concurrency, stop=stop)
    return answers, stop


async def _ask(client: LlmClient, seed: Seed) -> str:
    messages = (
        {"role": "system", "content": _SYSTEM.text},
        {"role": "user", "content": _PROMPT.fill(language=seed.language, seed=seed.text.rstrip("\n"))},
    )
    request = Request(
        problem=content_hash([seed.language, seed.text]),
        stage=_STAGE,
        template=f"{_SYSTEM.fingerprint},{_PROMPT.fingerprint}",
        input=messages,
    )
    answer = await client.ask(request)
    if answer.outcome != "ok":
        raise Unusable(f"answer {answer.outcome}")
    try:
        require_unicode(answer.text, "the answer")
    except BadRecord as error:
        raise Unusable(str(error)) from None
    return answer.text


def _write(tasks: Sequence[_Task], answers: dict[_Task, str | Unusable], out: Path) -> dict[str, int]:
    """Clean the answers in the order of their seeds, write and count them; returns the samples made and seeds left."""
    cleaner = Cleaner()
    results: dict[str, Counter[str]] = {}
    with new_file(out / "oss_instruct.jsonl") as kept, new_file(out / "rejected.jsonl") as rejected:
        for task in tasks:
            counts = results.setdefault(task.seed.language, Counter())
            if task not in answers:
                counts["not answered"] += 1
                continue
            start = {"lang": task.seed.language, "raw_index": task.seed.raw_index, "index": task.index}
            try:
                row = _row(task, answers[task])
                cleaner.check(row)
                write_row(kept, asdict(row))
                counts["kept"] += 1
            except Unusable as error:
                answer = answers[task]
                text = answer if isinstance(answer, str) else None
                write_row(rejected, {**start, "seed": task.seed.text, "answer": text, "reason": str(error)})
                counts[str(error)] += 1
    report: dict[str, Any] = {language: dict(counts.most_common()) for language, counts in results.items()}
    with new_file(out / "report.json") as stream:
        stream.write(json.dumps(report, indent=2).encode() + b"\n")
    for language, row_counts in report.items():
        print(f"{language}: " + ", ".join(f"{reason} {count}" for reason, count in row_counts.items()))
    return {"made": _total(results, "kept"), "left": _total(results, "not answered")}


def _total(results: dict[str, Counter[str]], reason: str) -> int:
    return sum(counts[reason] for counts in results.values())


def _row(task: _Task, answer: str | Unusable) -> Row:
    if isinstance(answer, Unusable):
        raise answer
    problem, solution = parse_answer(answer)
    return Row(task.seed.language, task.seed.raw_index, task.index, task.seed.text, problem, solution)
