"""Draw excerpts of source files, the seeds, and have a model write problems with solutions inspired by them.

OSS-Instruct (Magicoder, arXiv 2312.02120): so many seeds for each language, drawn by contents and a random seed alone,
not by the order, names or number of files; a larger quota keeps the seeds of a smaller one and adds to them. A run that
is started again resumes; no answer is paid for twice. Cleaning is Magicoder's: of the same seed, problem or solution,
whitespace aside, only the first stays, and a solution must not copy code of its problem. What is kept is in the schema
of Magicoder-OSS-Instruct-75K, which ``data.train`` reads.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.conversation import checked_text as storable_text
from reflectron.engine.data.sources import parse_record, read_records
from reflectron.engine.files import write_text
from reflectron.tools.data.corpus import fault_kind, new_file, write_row
from reflectron.tools.llm.arguments import ProblemProgress
from reflectron.tools.llm.client import LlmClient, RequestFailed
from reflectron.tools.llm.fences import find_fences
from reflectron.tools.llm.request import PromptTemplate, Request, content_hash
from reflectron.tools.llm.work import ending, for_each

# Magicoder (arXiv 2312.02120), section 2: 40k Python and 5k of each of eight other languages, 1 to 15 lines.
PAPER_QUOTAS = {"python": 40_000} | dict.fromkeys(
    ("cpp", "java", "typescript", "shell", "csharp", "rust", "php", "swift"), 5_000
)
_MOST_LINES = 15
_ALIASES = {"c++": "cpp", "c#": "csharp", "c-sharp": "csharp", "bash": "shell", "sh": "shell"}


@dataclass(frozen=True, order=True)
class Seed:
    """An excerpt of one document; seeds sort in the order in which they are drawn."""

    rank: bytes
    """Digest of the run's seed and the document."""
    language: str
    raw_index: int
    """0-based number of the document in its file."""
    text: str
    """1 to 15 consecutive lines, less at the end of the document."""


@dataclass(frozen=True)
class SeedFile:
    """A file of documents."""

    data: DataFile
    language: str | None
    """The language of all its documents; None where a column tells."""


@dataclass
class SeedCounts:
    """Counts the documents read and skipped."""

    documents: Counter[str] = field(default_factory=Counter)
    """Documents by language, for languages with a quota."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""


def parse_quotas(words: Sequence[str]) -> dict[str, int]:
    """Read words such as ``python=40000``.

    Raises:
        ValueError: naming the word at fault.
    """
    quotas = {}
    for word in words:
        language, _, number = word.partition("=")
        if not language or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--quota is {word!r}, expected LANGUAGE=N with N of at least 1, such as python=40000")
        quotas[language_name(language)] = int(number)
    return quotas


def seed_file(word: str, split: str) -> SeedFile:
    """Read a word such as ``rust=code.jsonl``; a file whose own name holds the sign is taken as it is."""
    language, equals, path = word.partition("=")
    if equals and not Path(word).exists():
        return SeedFile(DataFile(path=path, split=split), language)
    return SeedFile(DataFile(path=word, split=split), None)


def draw_seeds(
    files: Iterable[SeedFile], quotas: Mapping[str, int], seed: int, content_column: str, language_column: str
) -> tuple[dict[str, list[Seed]], SeedCounts]:
    """Draw for each language of ``quotas`` at most that many seeds, one a document, in the order of their ranks.

    Raises:
        ValueError: when a file cannot be read, or no document has the two columns.
    """
    # The heaps hold the lowest ranks so far, the highest of them on top.
    heaps: dict[str, list[_Highest]] = {language: [] for language in quotas}
    taken: dict[str, set[bytes]] = {language: set() for language in quotas}
    counts = SeedCounts()
    for file in files:
        for record in read_records(file.data):
            try:
                document, language = _document(record.decoded(), file.language, content_column, language_column)
            except BadRecord as error:
                counts.skipped[str(error)] += 1
                continue
            if language not in quotas:
                counts.skipped["language without a quota"] += 1
                continue
            counts.documents[language] += 1
            rank = hashlib.blake2b(f"{seed}\n{document}".encode(), digest_size=16).digest()
            heap, ranks = heaps[language], taken[language]
            if rank in ranks or (len(heap) >= quotas[language] and not (heap and rank < heap[0].seed.rank)):
                continue
            text = _excerpt(document, rank)
            if not any(letter.isalpha() for letter in text):
                counts.skipped["no letter in the lines drawn"] += 1
                continue
            heapq.heappush(heap, _Highest(Seed(rank, language, record.index, text)))
            ranks.add(rank)
            if len(heap) > quotas[language]:
                ranks.remove(heapq.heappop(heap).seed.rank)
    if not counts.documents:
        reason, _ = counts.skipped.most_common(1)[0] if counts.skipped else ("the files are empty", 0)
        raise ValueError(f"no document to draw seeds from: {reason}")
    return {language: sorted(item.seed for item in heap) for language, heap in heaps.items()}, counts


def language_name(name: str) -> str:
    """Return the name under which Magicoder's dataset has a language."""
    return _ALIASES.get(name.strip().lower(), name.strip().lower())


@dataclass(frozen=True)
class _Highest:
    """A seed in a heap that has the highest rank on top."""

    seed: Seed

    def __lt__(self, other: _Highest) -> bool:
        return other.seed < self.seed


def _document(row: object, language: str | None, content_column: str, language_column: str) -> tuple[str, str]:
    columns = row if isinstance(row, dict) else {}
    document = columns.get(content_column)
    if not isinstance(document, str) or not document.strip():
        raise BadRecord(f"no text in column {content_column!r} (--content-column)")
    storable_text(document, f"column {content_column!r}")
    named = language if language is not None else columns.get(language_column)
    if not isinstance(named, str):
        raise BadRecord(f"no column {language_column!r} (--language-column, or LANGUAGE=FILE)")
    return document, language_name(named)


def _excerpt(document: str, rank: bytes) -> str:
    """Draw start and number of lines uniformly, as Magicoder does; the end of the document cuts them short."""
    lines = document.splitlines(keepends=True)
    start = int.from_bytes(rank[:8], "little") % len(lines)
    count = 1 + int.from_bytes(rank[8:], "little") % _MOST_LINES
    return "".join(lines[start : start + count])


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
_PROBLEM = re.compile(r"^[^\w\n]*problem description[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
_SOLUTION = re.compile(r"^[^\w\n]*solution[^\w\n]*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class SeedTask:
    """A seed and its number among those of its language."""

    index: int
    seed: Seed


@dataclass(frozen=True)
class OssInstructRow:
    """One sample in the schema of Magicoder-OSS-Instruct-75K."""

    lang: str
    raw_index: int
    index: int
    seed: str
    problem: str
    solution: str


class UnusableAnswer(Exception):
    """An answer that gives no sample; the text is the reason it is counted under."""


def draw_tasks(
    files: Iterable[SeedFile], quotas: Mapping[str, int], seed: int, content_column: str, language_column: str
) -> list[SeedTask]:
    """Draw the seeds to ask about, and print their numbers.

    Raises:
        ValueError: when a file cannot be read, or no document has the two columns.
    """
    seeds, counts = draw_seeds(files, quotas, seed, content_column, language_column)
    for language, quota in quotas.items():
        print(f"{language}: {len(seeds[language])} of {quota} seeds from {counts.documents[language]} documents")
    for reason, count in counts.skipped.most_common():
        print(f"{count} documents skipped: {reason}")
    return [SeedTask(index, seed) for language in quotas for index, seed in enumerate(seeds[language])]


async def write_problems(tasks: Sequence[SeedTask], client: LlmClient, out: Path, at_a_time: int) -> int:
    """Ask, clean and write; return the exit code, 1 when seeds are left unanswered or when there is not one sample."""
    answers: dict[SeedTask, str | UnusableAnswer] = {}
    cleaner = OssInstructCleaner()
    with client.stop.on_signals(), ProblemProgress(client, total=len(tasks)) as progress:

        async def ask(task: SeedTask) -> None:
            try:
                cleaner.check_seed(task.seed.text)
                answers[task] = await _ask(client, task.seed)
            except UnusableAnswer as error:
                answers[task] = error
            except RequestFailed as error:
                if not error.final:
                    # The server's failure says nothing about the seed, which stays to be asked about.
                    progress.step(f"request failed: {error.kind}")
                    return
                answers[task] = UnusableAnswer(f"request failed: {error.kind}")
            result = answers[task]
            progress.step("answered" if isinstance(result, str) else str(result))

        await for_each(tasks, ask, at_a_time=at_a_time, stop=client.stop)
    end = ending(client.stop, **_write(tasks, answers, out), unit="seeds")
    if end.line is not None:
        print(end.line)
    return end.code


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
        raise UnusableAnswer(f"answer {answer.outcome}")
    try:
        storable_text(answer.text, "the answer")
    except BadRecord as error:
        raise UnusableAnswer(str(error)) from None
    return answer.text


def _write(tasks: Sequence[SeedTask], answers: dict[SeedTask, str | UnusableAnswer], out: Path) -> dict[str, int]:
    """Clean the answers in the order of their seeds, write and count them; return the samples made and seeds left."""
    cleaner = OssInstructCleaner()
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
            except UnusableAnswer as error:
                answer = answers[task]
                text = answer if isinstance(answer, str) else None
                write_row(rejected, {**start, "seed": task.seed.text, "answer": text, "reason": str(error)})
                counts[str(error)] += 1
    report = {language: dict(counts.most_common()) for language, counts in results.items()}
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    for language, row_counts in report.items():
        print(f"{language}: " + ", ".join(f"{reason} {count}" for reason, count in row_counts.items()))
    return {"made": _total(results, "kept"), "left": _total(results, "not answered")}


def _total(results: dict[str, Counter[str]], reason: str) -> int:
    return sum(counts[reason] for counts in results.values())


def _row(task: SeedTask, answer: str | UnusableAnswer) -> OssInstructRow:
    if isinstance(answer, UnusableAnswer):
        raise answer
    problem, solution = parse_answer(answer)
    return OssInstructRow(task.seed.language, task.seed.raw_index, task.index, task.seed.text, problem, solution)


def parse_answer(text: str) -> tuple[str, str]:
    """Read problem and solution from an answer with the two headings on lines of their own, in any markup.

    Raises:
        UnusableAnswer: when a heading or a part is missing.
    """
    problem_heading = _PROBLEM.search(text)
    solution_heading = _SOLUTION.search(text, problem_heading.end()) if problem_heading else None
    if problem_heading is None or solution_heading is None:
        raise UnusableAnswer("no headings")
    problem = text[problem_heading.end() : solution_heading.start()].strip()
    solution = text[solution_heading.end() :].strip()
    if not problem or not solution:
        raise UnusableAnswer("empty problem" if not problem else "empty solution")
    return problem, solution


@dataclass
class OssInstructCleaner:
    """Judges rows one after another; of several equal ones the first stays."""

    _seeds: set[str] = field(default_factory=set)
    _problems: set[str] = field(default_factory=set)
    _solutions: set[str] = field(default_factory=set)

    def check_seed(self, seed: str) -> None:
        """Take note of a seed before the model is asked.

        Raises:
            UnusableAnswer: when it was there before.
        """
        self._take(self._seeds, seed, "duplicate seed")

    def check(self, row: OssInstructRow) -> None:
        """Take note of a row's problem and solution.

        Raises:
            UnusableAnswer: when it has to go.
        """
        if _codes(row.problem) & _codes(row.solution) or _bare(row.solution) in _bare(row.problem):
            raise UnusableAnswer("solution copies the problem")
        try:
            parse_record({"problem": row.problem, "solution": row.solution})
        except BadRecord as error:
            raise UnusableAnswer(fault_kind(str(error))) from None
        self._take(self._problems, row.problem, "duplicate problem")
        self._take(self._solutions, row.solution, "duplicate solution")

    def _take(self, known: set[str], text: str, reason: str) -> None:
        bare = _bare(text)
        if bare in known:
            raise UnusableAnswer(reason)
        known.add(bare)


def _codes(text: str) -> set[str]:
    return {_bare(fence.code) for fence in find_fences(text)} - {""}


def _bare(text: str) -> str:
    return "".join(text.split())
