"""Source files come in, short excerpts of them go out: the seeds of OSS-Instruct, so many for each language.

Which documents are taken, and which lines of them, depends on their contents and a seed alone: not on the order, names
or number of files. A larger quota keeps the seeds of a smaller one and adds to them.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import read_records
from reflectron.tools.data.corpus import require_unicode

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
    """Of all its documents; None where a column tells."""


@dataclass
class SeedCounts:
    """What became of the documents."""

    documents: Counter[str] = field(default_factory=Counter)
    """By language, as far as the language has a quota."""
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason."""


def draw_seeds(
    files: Iterable[SeedFile], quotas: Mapping[str, int], seed: int, content_column: str, language_column: str
) -> tuple[dict[str, list[Seed]], SeedCounts]:
    """For each language of ``quotas`` at most that many seeds, one a document, in the order of their ranks.

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


@dataclass(frozen=True)
class _Highest:
    """Turns the order of a heap round."""

    seed: Seed

    def __lt__(self, other: _Highest) -> bool:
        return other.seed < self.seed


def _document(row: object, language: str | None, content_column: str, language_column: str) -> tuple[str, str]:
    columns = row if isinstance(row, dict) else {}
    document = columns.get(content_column)
    if not isinstance(document, str) or not document.strip():
        raise BadRecord(f"no text in column {content_column!r} (--content-column)")
    require_unicode(document, f"column {content_column!r}")
    named = language if language is not None else columns.get(language_column)
    if not isinstance(named, str):
        raise BadRecord(f"no column {language_column!r} (--language-column, or LANGUAGE=FILE)")
    return document, language_name(named)


def language_name(name: str) -> str:
    """The name under which Magicoder's dataset has a language."""
    return _ALIASES.get(name.strip().lower(), name.strip().lower())


def _excerpt(document: str, rank: bytes) -> str:
    """Start and number of lines are uniform, as in Magicoder; the end of the document cuts them short."""
    lines = document.splitlines(keepends=True)
    start = int.from_bytes(rank[:8], "little") % len(lines)
    count = 1 + int.from_bytes(rank[8:], "little") % _MOST_LINES
    return "".join(lines[start : start + count])
