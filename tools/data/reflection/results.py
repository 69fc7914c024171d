"""The two ends of a run: records of data files become problems, and outcomes of problems become files.

Any file that training reads holds problems: its instructions, each text once. Outcomes are kept in the journal
``outcomes.jsonl`` as they come in; ``reflection.jsonl`` and ``rejects.jsonl`` are made anew from it, in the order of
the problems: the same outcomes give the same bytes, whatever the order in which the problems were finished.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.conversation import checked_text as storable_text
from reflectron.engine.data.sources import Record, parse_record, read_records
from reflectron.engine.data.tokenizer import TAGS
from reflectron.tools.data.corpus import new_file
from reflectron.tools.data.reflection.dialogue import ReflectionProblem
from reflectron.tools.llm.client import LlmClient
from reflectron.tools.llm.request import content_hash
from reflectron.tools.llm.work import Journal

OUTCOMES = "outcomes.jsonl"
SAMPLES = "reflection.jsonl"
REJECTS = "rejects.jsonl"
COLUMNS = ("instruction", "problem", "query", "question", "prompt")
Stats = dict[str, Any]


@dataclass(frozen=True)
class Reject:
    """A record that gives no problem."""

    source: str
    reason: str
    """``<kind>: <detail>``."""


def read_problems(
    files: Sequence[DataFile], column: str | None, limit: int | None = None
) -> list[ReflectionProblem | Reject]:
    """Read the problems of ``files``, in order.

    Args:
        column: of the problem's text; without it the first of ``COLUMNS``, or the first user turn of ``messages``.
        limit: records to read; None for all.

    Raises:
        ValueError: when a file cannot be read.
    """
    return list(islice(_problems(files, column), limit))


def _problems(files: Sequence[DataFile], column: str | None) -> Iterator[ReflectionProblem | Reject]:
    first_source: dict[str, str] = {}
    for file in files:
        for record in read_records(file):
            source = f"{file.path}:{record.line}"
            try:
                problem = ReflectionProblem(*_text(record, column), source)
            except BadRecord as error:
                yield Reject(source, str(error))
                continue
            if (first := first_source.setdefault(problem.key, source)) != source:
                yield Reject(source, f"duplicate: the same problem as {first}")
            else:
                yield problem


def _text(record: Record, column: str | None) -> tuple[str, str]:
    """Return key and text of a problem."""
    columns = record.decoded()
    if not isinstance(columns, dict):
        raise BadRecord(f"not an object: found {type(columns).__name__}, expected named columns")
    names = (column,) if column is not None else COLUMNS
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is not None:
        text = columns[name]
    elif column is None and columns.get("messages") is not None:
        text = _first_turn(columns)
    else:
        raise BadRecord(f"no problem: found columns {', '.join(map(str, columns))}; expected {' or '.join(names)}")
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"no problem: {name or 'the first message'} holds no text")
    storable_text(text, name or "the first message")
    if tag := next((tag for tag in TAGS if tag in text), None):
        raise BadRecord(f"tag in content: the problem holds {tag}, which would forge structure")
    return content_hash(text.strip()), text.strip()


def _first_turn(columns: dict[str, object]) -> str:
    """Return the first user turn; of a reflection sample the second, which is the problem itself."""
    conversation = parse_record(columns)
    users = [message for message in conversation.messages if message.role == "user"]
    turn = users[-1] if conversation.kind == "reflection" else users[0]
    return "".join(block.content for block in turn.blocks)


@dataclass
class ProblemOutcome:
    """The sample made of a problem, or why there is none, and what it took."""

    reason: str | None = None
    """Why it was rejected, ``<kind>: <detail>``; None when it was accepted."""
    final: bool = True
    """Whether trying again later would end the same way; false after a failure of the server."""
    rounds: int = 0
    """Programs run."""
    failures: int = 0
    """Programs that failed."""
    answers: int = 0
    """One-off answers drawn."""
    answer_faults: list[str] = field(default_factory=list)
    """What was wrong with each rejected answer."""
    mutants_tried: int = 0
    killed_by: str | None = None
    sample: dict[str, Any] | None = None
    """The training sample in the published schema."""


class Results:
    """Holds the outcome of each problem under one pipeline.

    Args:
        folder: of all files of the run.
        pipeline: hash of everything besides the problem that an outcome depends on; outcomes of others are ignored.
    """

    def __init__(self, folder: Path, pipeline: str) -> None:
        self.folder, self.pipeline = folder, pipeline
        self.journal = Journal(folder / OUTCOMES)
        self._offsets: dict[str, int] = {}
        self._open: set[str] = set()
        for offset, record in self.journal.records():
            self._take_note(record, offset)

    def known(self, problem: ReflectionProblem) -> bool:
        """Return whether the problem's outcome is final."""
        return problem.key in self._offsets and problem.key not in self._open

    async def add(self, problem: ReflectionProblem, outcome: ProblemOutcome) -> None:
        """Keep an outcome."""
        record = {"problem": problem.key, "pipeline": self.pipeline, **vars(outcome)}
        self._take_note(record, await self.journal.append(record))

    def _take_note(self, record: dict[str, Any], offset: int) -> None:
        if record["pipeline"] != self.pipeline:
            return
        self._offsets[record["problem"]] = offset
        (self._open.discard if record["final"] else self._open.add)(record["problem"])

    def write(self, records: Sequence[ReflectionProblem | Reject], tally: OutcomeTally) -> None:
        """Write samples and rejects, and count both."""
        rejects: list[dict[str, str]] = []

        def samples() -> Iterator[dict[str, Any]]:
            for record in records:
                if isinstance(record, Reject):
                    tally.reject(record.reason)
                    rejects.append({"source": record.source, "reason": record.reason})
                elif record.key in self._offsets:
                    outcome = self.journal.read(self._offsets[record.key])
                    tally.add(outcome)
                    if outcome["sample"] is None:
                        rejects.append({"source": record.source, "reason": outcome["reason"]})
                    else:
                        yield outcome["sample"] | {"source": record.source, "problem": record.key}

        write_lines(self.folder / SAMPLES, samples())
        write_lines(self.folder / REJECTS, iter(rejects))

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()


def write_lines(path: Path, records: Iterator[Any]) -> None:
    """Write JSON lines, wholly or not at all."""
    with new_file(path) as stream:
        for record in records:
            stream.write(json.dumps(record).encode() + b"\n")


class OutcomeTally:
    """Counts outcomes one by one.

    Args:
        length: of a text.
        unit: of ``length``, such as ``tokens``.
    """

    def __init__(self, length: Callable[[str], int], unit: str) -> None:
        self._length, self.unit = length, unit
        self._rounds: Counter[int] = Counter()
        self._answers: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._answer_faults: Counter[str] = Counter()
        self._killed_by: Counter[str] = Counter()
        self._repaired = 0
        self._failures = 0
        self._lengths: dict[str, list[int]] = {"instruction": [], "sequence": [], "answer": []}

    def reject(self, reason: str) -> None:
        """Count a record or problem that gave no sample."""
        self._reasons[_kind(reason)] += 1

    def add(self, outcome: dict[str, Any]) -> None:
        """Count a problem."""
        self._answer_faults.update(map(_kind, outcome["answer_faults"]))
        if outcome["sample"] is None:
            self.reject(outcome["reason"])
            return
        self._rounds[outcome["rounds"]] += 1
        self._answers[outcome["answers"]] += 1
        self._failures += outcome["failures"]
        self._repaired += outcome["failures"] > 0
        self._killed_by[outcome["killed_by"].split(",")[0]] += 1
        _, sequence, instruction, answer = (
            "".join(block["content"] for block in message["content"]) for message in outcome["sample"]["messages"]
        )
        for name, text in (("instruction", instruction), ("sequence", sequence), ("answer", answer)):
            self._lengths[name].append(self._length(text))

    def stats(self, client: LlmClient) -> Stats:
        """Return all counts, for JSON."""
        accepted, budget = self._rounds.total(), client.budget
        return {
            "accepted": accepted,
            "rejected": dict(self._reasons.most_common()),
            "rounds": {str(rounds): count for rounds, count in sorted(self._rounds.items())},
            "failed_runs_repaired": self._failures,
            "samples_with_a_repair": self._repaired,
            "answers_drawn": {str(answers): count for answers, count in sorted(self._answers.items())},
            "answers_thrown_away": dict(self._answer_faults.most_common()),
            "mutants_killed_by_kind": dict(self._killed_by.most_common()),
            f"length_{self.unit}": {name: _spread(lengths) for name, lengths in self._lengths.items()},
            "attempts": {f"{stage}: {outcome}": n for (stage, outcome), n in sorted(client.outcomes.items())},
            "usage_sources": dict(client.usage_sources),
            "tokens": budget.tokens,
            "cost": budget.cost,
        }


def lines(stats: Stats, unit: str) -> Iterable[str]:
    """Return the counts as lines of text; ``unit`` is that of the lengths."""
    yield f"accepted   {stats['accepted']}, {stats['samples_with_a_repair']} of them with a repaired failure"
    yield f"rejected   {sum(stats['rejected'].values())}: {_listed(stats['rejected'])}"
    yield f"rounds     {_listed(stats['rounds'])}; failed runs repaired: {stats['failed_runs_repaired']}"
    yield f"answers    {_listed(stats['answers_drawn'])}; rejected: {_listed(stats['answers_thrown_away'])}"
    spreads = [f"{part} {s['p50']:g} ({s['min']} to {s['max']})" for part, s in stats[f"length_{unit}"].items() if s]
    yield f"{unit:<10} {', '.join(spreads) or 'none'}"
    yield f"attempts   {_listed(stats['attempts'])}"
    yield f"tokens     {stats['tokens']:,}, by {_listed(stats['usage_sources'])}; cost {stats['cost']:.4g}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _kind(reason: str) -> str:
    """Return the kind of a reason; ``request failed`` keeps the failure's own kind."""
    parts = reason.split(": ")
    return ": ".join(parts[:2] if parts[0] == "request failed" else parts[:1])


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "p50": statistics.median(values), "max": max(values), "total": sum(values)}
