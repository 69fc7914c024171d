"""Exclude records that hold a task of a benchmark, with the evidence.

A fragment of a benchmark is evidence where it stands in a text word for word (but for case and whitespace), or where a
text has at least a given share of its word n-grams. Less than ``min_words`` words of either are no evidence, so that
``return x + y`` in a training file excludes nothing. Every record ends up either in ``kept/`` or in ``excluded/``, as
it was read; ``report.jsonl`` names for each exclusion the benchmark, its task, the matched text and its position.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import ahocorasick
import numpy as np

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import RecordChunk, read_chunks, read_rows
from reflectron.engine.data.workers import map_chunks
from reflectron.engine.files import printable
from reflectron.tools.benchmarks.benchmark import Part
from reflectron.tools.benchmarks.catalogue import Fragment
from reflectron.tools.data.corpus import (
    RecordText,
    as_line,
    fault_kind,
    new_file,
    squeezed,
    texts,
    word_hash,
    word_spans,
    words,
    write_row,
)

_RECORDS_PER_CHUNK = 1024
_ALLOWED_KEYS = ("benchmark", "task_id", "text")
# Odd, so that multiplying by it loses nothing modulo 2**64.
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Evidence:
    """Defines what counts as contamination."""

    min_words: int = 10
    """Words below which a match is no evidence."""
    ngram: int = 6
    """Words of an n-gram."""
    overlap: float = 0.5
    """Least share of a fragment's n-grams that a text must have, above 0 to 1."""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram <= self.min_words:
            raise ValueError(f"--ngram is {self.ngram}, expected 2 to --min-words ({self.min_words})")
        if not 0 < self.overlap <= 1:
            raise ValueError(f"--overlap is {self.overlap}, expected a share above 0, at most 1")


@dataclass(frozen=True)
class Match:
    """A benchmark's fragment found in a record."""

    benchmark: str
    task_id: str
    part: Part
    kind: Literal["exact", "ngram"]
    overlap: float
    """Share of the fragment's n-grams; 1 for an exact match."""
    field: str
    """Column, or path to the leaf of a nested one."""
    start: int
    """Offset in that field, in characters."""
    end: int
    """One past the matched text."""
    text: str
    """The matched text; of n-grams, the longest stretch."""


@dataclass(frozen=True)
class Allowed:
    """One entry of the allow-list: a match that agrees with everything the entry gives is allowed."""

    benchmark: str | None = None
    task_id: str | None = None
    text: str | None = None

    def covers(self, match: Match) -> bool:
        """Return whether the entry allows ``match``; texts are compared but for case and whitespace."""
        return (
            self.benchmark in (None, match.benchmark)
            and self.task_id in (None, match.task_id)
            and (self.text is None or squeezed(self.text) == squeezed(match.text))
        )


@dataclass(frozen=True)
class Exclusion:
    """A record that is excluded, and why."""

    offset: int
    """Number of the record in its chunk."""
    matches: tuple[Match, ...]
    reason: str | None = None
    """Why the record could not be read; None for a contaminated one."""


def decontaminate_files(files: Mapping[str, DataFile], detector: Detector, out: Path, workers: int) -> None:
    """Split every file into its kept and its excluded records, and print the counts.

    Args:
        files: by the name under which their records are written.
        workers: processes; 0 means one per core.

    Raises:
        ValueError: when a file cannot be read, or has no readable record.
    """
    _print_benchmarks(detector.fragments, detector.evidence.min_words)
    with new_file(out / "report.jsonl") as report:
        for name, file in files.items():
            _clean(name, file, out, detector, report, workers)
    print(f"kept/, excluded/ and report.jsonl are in {out}")


@dataclass(frozen=True)
class Detector:
    """Finds contaminated records of a chunk; what it searches with is built where it is used."""

    fragments: tuple[Fragment, ...]
    evidence: Evidence
    allowed: tuple[Allowed, ...] = ()
    columns: tuple[str, ...] = ()

    def __call__(self, chunk: RecordChunk) -> list[Exclusion]:
        """Return the chunk's records that are excluded, in order."""
        exclusions: dict[int, Exclusion] = {}
        read: list[tuple[int, RecordText]] = []
        for offset, record in enumerate(chunk.records()):
            try:
                read += [(offset, text) for text in texts(record, self.columns)]
            except BadRecord as error:
                exclusions[offset] = Exclusion(offset, (), str(error))
        matches: dict[int, list[Match]] = defaultdict(list)
        for number, match in self.search([text for _, text in read]):
            matches[read[number][0]].append(match)
        exclusions |= {offset: Exclusion(offset, tuple(found)) for offset, found in matches.items()}
        return [exclusions[offset] for offset in sorted(exclusions)]

    def search(self, found: Sequence[RecordText]) -> Iterator[tuple[int, Match]]:
        """Yield every match with the number of its text; a fragment found word for word is not reported by n-grams."""
        candidates = self._ngrams.candidates([words(text.value) for text in found])
        for number, text in enumerate(found):
            exact = self._exact.find(text)
            near = [m for f, m in self._ngrams.find(text, candidates.get(number, ())) if f not in exact]
            for match in (*exact.values(), *near):
                if not any(entry.covers(match) for entry in self.allowed):
                    yield number, match

    @functools.cached_property
    def _exact(self) -> _ExactIndex:
        return _ExactIndex(self.fragments, self.evidence)

    @functools.cached_property
    def _ngrams(self) -> _NgramIndex:
        return _NgramIndex(self.fragments, self.evidence)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


def read_allowed(path: str) -> tuple[Allowed, ...]:
    """Read an allow-list.

    Raises:
        ValueError: naming the line that is no entry.
    """
    entries = []
    for record in read_rows(Path(path)):
        try:
            row = record.decoded()
        except BadRecord:
            row = None
        given = {key: str(row[key]) for key in _ALLOWED_KEYS if key in row} if isinstance(row, dict) else {}
        if not given:
            expected = "a JSON object with at least one of " + ", ".join(_ALLOWED_KEYS)
            found = printable(record.value, 60)
            raise ValueError(f"--allow {path}, line {record.line} is {found}, expected {expected}")
        entries.append(Allowed(**given))
    return tuple(entries)


class _ExactIndex:
    """Holds all fragments in one Aho-Corasick automaton, so that a text is read once however many there are."""

    def __init__(self, fragments: Sequence[Fragment], evidence: Evidence) -> None:
        self.fragments = fragments
        self.automaton = ahocorasick.Automaton()
        self.patterns: dict[str, list[int]] = defaultdict(list)
        for number, fragment in enumerate(fragments):
            if len(words(fragment.text)) >= evidence.min_words:
                self.patterns[squeezed(fragment.text)].append(number)
        for pattern in self.patterns:
            self.automaton.add_word(pattern, pattern)
        self.automaton.make_automaton()

    def find(self, text: RecordText) -> dict[int, Match]:
        """Return the first place of every fragment, by its number."""
        found: dict[int, Match] = {}
        if not self.patterns:
            return found
        for last, pattern in self.automaton.iter(squeezed(text.value)):
            for number in self.patterns[pattern]:
                if number not in found:
                    start, end = _original_span(text.value, last + 1 - len(pattern), last + 1)
                    found[number] = _match(self.fragments[number], "exact", 1.0, text, start, end)
        return found


def _original_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span of ``text`` that became ``start`` to ``end`` of its squeezed form."""
    squeezed_starts, original_starts, position, search_from = [], [], 0, 0
    for word in text.split():
        search_from = text.index(word, search_from)
        squeezed_starts.append(position)
        original_starts.append(search_from)
        position += len(word) + 1
        search_from += len(word)

    def original(offset: int) -> int:
        word = bisect_right(squeezed_starts, offset) - 1
        return original_starts[word] + offset - squeezed_starts[word]

    return original(start), original(end - 1) + 1


class _NgramIndex:
    """Holds the hashes of all fragments' n-grams, sorted, so that the windows of many texts are looked up at once."""

    def __init__(self, fragments: Sequence[Fragment], evidence: Evidence) -> None:
        self.fragments, self.evidence = fragments, evidence
        self.number_of: dict[str, int] = {}
        self.fragments_of: dict[int, list[int]] = defaultdict(list)
        self.gram_count: dict[int, int] = {}
        split = {n: words(f.text) for n, f in enumerate(fragments)}
        split = {n: found for n, found in split.items() if len(found) >= evidence.min_words}
        for found in split.values():
            for word in found:
                # Number 0 is every word that no fragment has.
                self.number_of.setdefault(word, len(self.number_of) + 1)
        self.hash_of = np.array([0, *map(word_hash, self.number_of)], dtype=np.uint64)
        for number, found in split.items():
            grams = set(self._windows(self._numbers(found))[1].tolist())
            self.gram_count[number] = len(grams)
            for gram in grams:
                self.fragments_of[gram].append(number)
        self.known = np.array(sorted(self.fragments_of), dtype=np.uint64)

    def candidates(self, split: Sequence[list[str]]) -> dict[int, list[int]]:
        """Return the fragments that each text shares n-grams with; texts without any are skipped."""
        n = self.evidence.ngram
        # A word that no fragment has parts neighbouring texts.
        parts = [part for found in split for part in (self._numbers(found), np.zeros(1, np.int32))]
        starts, hashes = self._windows(np.concatenate([np.zeros(n, np.int32), *parts]))
        hits = self._is_known(hashes)
        begins = n + np.cumsum([0, *(len(found) + 1 for found in split)])
        shared: dict[int, set[int]] = defaultdict(set)
        for text, gram in zip(np.searchsorted(begins, starts[hits], side="right") - 1, hashes[hits], strict=True):
            shared[int(text)].update(self.fragments_of[int(gram)])
        return {text: sorted(numbers) for text, numbers in shared.items()}

    def find(self, text: RecordText, candidates: Sequence[int]) -> Iterator[tuple[int, Match]]:
        """Yield those of ``candidates`` that overlap enough, with their numbers."""
        if not candidates:
            return
        spans = word_spans(text.value)
        starts, hashes = self._windows(self._numbers(words(text.value)))
        places: dict[int, list[int]] = defaultdict(list)
        shared = Counter(number for gram in set(hashes.tolist()) for number in self.fragments_of.get(gram, ()))
        for start, gram in zip(starts.tolist(), hashes.tolist(), strict=True):
            for number in self.fragments_of.get(gram, ()):
                places[number].append(start)
        for number in candidates:
            overlap = shared[number] / self.gram_count[number]
            enough_words = shared[number] + self.evidence.ngram - 1 >= self.evidence.min_words
            if overlap >= self.evidence.overlap and enough_words:
                first, last = _longest_run(places[number])
                start, end = spans[first][0], spans[last + self.evidence.ngram - 1][1]
                yield number, _match(self.fragments[number], "ngram", overlap, text, start, end)

    def _numbers(self, found: Sequence[str]) -> np.ndarray:
        get = self.number_of.get
        return np.array([get(word, 0) for word in found], dtype=np.int32)

    def _windows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return start and hash of every window of n words that fragments have: int64 and uint64 [windows]."""
        n = self.evidence.ngram
        foreign = np.concatenate([[0], np.cumsum(numbers == 0)])
        starts = np.flatnonzero(foreign[n:] == foreign[:-n])
        hashes = np.zeros(len(starts), dtype=np.uint64)
        for i in range(n):
            hashes = hashes * _BASE + self.hash_of[numbers[starts + i]]
        return starts, hashes

    def _is_known(self, hashes: np.ndarray) -> np.ndarray:
        if not len(self.known):
            return np.zeros(len(hashes), dtype=bool)
        place = np.minimum(np.searchsorted(self.known, hashes), len(self.known) - 1)
        return self.known[place] == hashes


def _longest_run(starts: Sequence[int]) -> tuple[int, int]:
    """Return first and last of the longest run of consecutive numbers, of equals the first run."""
    best = run = (starts[0], starts[0])
    for start in starts[1:]:
        run = (run[0], start) if start == run[1] + 1 else (start, start)
        if run[1] - run[0] > best[1] - best[0]:
            best = run
    return best


def _match(
    fragment: Fragment, kind: Literal["exact", "ngram"], overlap: float, text: RecordText, start: int, end: int
) -> Match:
    return Match(
        benchmark=fragment.benchmark,
        task_id=fragment.task_id,
        part=fragment.part,
        kind=kind,
        overlap=round(overlap, 4),
        field=text.field,
        start=start,
        end=end,
        text=text.value[start:end],
    )


def _clean(name: str, file: DataFile, out: Path, detector: Detector, report: IO[bytes], workers: int) -> None:
    """Split one file, and print its counts."""
    total = contaminated = 0
    by_benchmark, faults = Counter[str](), Counter[str]()
    with new_file(out / "kept" / f"{name}.jsonl") as kept, new_file(out / "excluded" / f"{name}.jsonl") as excluded:
        for chunk, exclusions in map_chunks(detector, read_chunks(file, _RECORDS_PER_CHUNK), workers):
            found = {exclusion.offset: exclusion for exclusion in exclusions}
            for offset, record in enumerate(chunk.records()):
                total += 1
                exclusion = found.get(offset)
                (excluded if exclusion else kept).write(as_line(record))
                if exclusion is None:
                    continue
                place = {"file": file.path, "line": record.line, "index": record.index}
                if exclusion.reason is not None:
                    faults[fault_kind(exclusion.reason)] += 1
                    write_row(report, {**place, "reason": exclusion.reason})
                contaminated += bool(exclusion.matches)
                by_benchmark.update({match.benchmark for match in exclusion.matches})
                for match in exclusion.matches:
                    write_row(report, {**place, **asdict(match)})
        unreadable = faults.total()
        if unreadable == total:
            fault = faults.most_common(1)[0][0]
            raise ValueError(f"{file.path}: none of its {total} records has a text to look at, most for {fault!r}")
    named = ", ".join(f"{benchmark} {count}" for benchmark, count in sorted(by_benchmark.items()))
    print(
        f"{file.path}: {total} records, {total - contaminated - unreadable} kept, {contaminated} contaminated"
        + (f" ({named})" if named else "")
        + (f", {unreadable} unreadable" if unreadable else "")
    )


def _print_benchmarks(fragments: Sequence[Fragment], min_words: int) -> None:
    for benchmark in sorted({fragment.benchmark for fragment in fragments}):
        own = [fragment for fragment in fragments if fragment.benchmark == benchmark]
        used = [fragment for fragment in own if len(words(fragment.text)) >= min_words]
        tasks, found = ({fragment.task_id for fragment in some} for some in (own, used))
        print(
            f"{benchmark}: {len(tasks)} tasks, {len(used)} texts of at least {min_words} words"
            + (f"; {len(tasks - found)} tasks have none" if tasks - found else "")
        )
