"""Compare training data with HumanEval and with categories, and draw what it is like on one HTML page.

Nearness is the cosine of TF-IDF vectors over words, fitted on both. Categories are those of Magicoder (arXiv
2312.02120, figure 5), which assigns them with an embedding model; here a document goes to the category whose keywords
it is nearest to, which is a rough guide and costs nothing.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import Record, read_records
from reflectron.tools.benchmarks.catalogue import Fragment, load_benchmark
from reflectron.tools.data.corpus import fault_kind, new_file, texts, words
from reflectron.tools.data.oss_instruct import language_name
from reflectron.tools.llm.fences import find_fences

_SHOWN_NEIGHBOURS = 20
_EXCERPT = 240
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 0 0 1em; }
th, td { padding: 0.25em 0.75em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { margin: 0; white-space: pre-wrap; font-size: 12px; }
img { max-width: 100%; }
"""
_MOST_WORDS = 200_000
# Documents whose similarities with all tasks are held at a time.
_BLOCK = 4096
CATEGORIES = {
    "Algorithms and data structures": "algorithm sort search graph tree heap queue stack linked list array string "
    "dynamic programming recursion binary traverse node path shortest subsequence permutation complexity",
    "Mathematics and computation": "prime factorial matrix vector equation integral derivative polynomial numeric "
    "probability geometry angle radius fraction modulo gcd sum product sequence fibonacci statistics",
    "Databases and SQL": "database sql query table select insert join schema column row index transaction mysql "
    "postgres sqlite orm migration primary key foreign",
    "System design and architecture": "system architecture service microservice module interface component pattern "
    "factory singleton dependency injection plugin event message broker configuration deployment cluster",
    "Security and cryptography": "security encrypt decrypt cipher hash password token authentication authorization "
    "permission signature certificate key vulnerability sanitize oauth jwt",
    "Performance": "performance optimize cache memory thread parallel concurrent lock async throughput latency "
    "profile benchmark efficient pool scheduler",
    "Web": "web http request response server client api rest route endpoint url html css javascript browser django "
    "flask express react json cookie session",
    "Domains": "game physics simulation finance bank account robot sensor biology gene medical weather map image audio "
    "video chess player inventory vehicle",
    "User interfaces and applications": "user interface button window form widget view layout screen click menu dialog "
    "component render mobile android ios swiftui activity app",
    "Data science and machine learning": "data dataset dataframe pandas numpy model train predict classifier "
    "regression neural network tensor layer feature label cluster plot sklearn torch tensorflow",
}
_LANGUAGE_COLUMNS = ("lang", "language", "programming_language")


@dataclass(frozen=True)
class Document:
    """One record."""

    file: str
    line: int
    language: str
    """Named by a column, else by the commonest tag of the code fences, else ``unknown``."""
    instruction: str
    """The user's text; empty where the record is no conversation."""
    answer: str
    """The assistant's text, or all there is."""

    @property
    def text(self) -> str:
        """Both parts."""
        return f"{self.instruction}\n{self.answer}"


@dataclass(frozen=True)
class Neighbour:
    """A HumanEval task and the document nearest to it."""

    task_id: str
    cosine: float
    document: int


@dataclass(frozen=True, eq=False)
class Analysis:
    """Describes a set of D documents."""

    nearest: tuple[Neighbour, ...]
    """One for every task, the nearest first."""
    cosines: np.ndarray
    """float64 [D]: similarity of each document with the task nearest to it."""
    categories: Counter[str]
    """Documents by category."""
    languages: Counter[str]
    """Documents by language."""


def human_eval_tasks(source: str) -> list[Fragment]:
    """Read HumanEval.

    Raises:
        ValueError: when it cannot be read, or is another benchmark.
    """
    tasks = load_benchmark(source)
    if any(task.benchmark != "HumanEval" for task in tasks):
        raise ValueError(f"--humaneval {source} is {tasks[0].benchmark}, expected HumanEval")
    return tasks


def write_page(
    files: Sequence[DataFile], limit: int | None, tasks: Sequence[Fragment], tokenizer_path: str | None, out: Path
) -> None:
    """Write a page about the files that is complete in itself.

    Args:
        limit: first records of each file that are read; None for all.
        tokenizer_path: of the tokenizer that lengths are measured with; in words without one.

    Raises:
        ValueError: when a file cannot be read, or has no readable record.
    """
    documents, unreadable = _read(files, limit)
    unit, length = _length_function(tokenizer_path)
    lengths = {
        "instruction": [length(document.instruction) for document in documents if document.instruction],
        "answer": [length(document.answer) for document in documents],
    }
    page = _page(documents, unreadable, analyse(documents, tasks), lengths, unit)
    with new_file(out) as stream:
        stream.write(page.encode("utf-8", "replace"))
    print(f"{len(documents)} documents, {unreadable.total()} unreadable -> {out}")


def analyse(documents: Sequence[Document], tasks: Sequence[Fragment]) -> Analysis:
    """Compare every document with every task and category.

    Args:
        tasks: fragments of HumanEval; those of one task are taken together.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts_of: dict[str, str] = {}
    for fragment in tasks:
        texts_of[fragment.task_id] = f"{texts_of.get(fragment.task_id, '')}\n{fragment.text}"
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, max_features=_MOST_WORDS, dtype=np.float32)
    vectorizer.fit([*(document.text for document in documents), *texts_of.values()])
    task_vectors = vectorizer.transform(texts_of.values())
    category_vectors = vectorizer.transform(CATEGORIES.values())
    names = [*CATEGORIES, "none"]
    best = np.full(len(texts_of), -1.0)
    best_document = np.zeros(len(texts_of), dtype=np.int64)
    cosines, categories = [], Counter[str]()
    for first in range(0, len(documents), _BLOCK):
        vectors = vectorizer.transform(document.text for document in documents[first : first + _BLOCK])
        with_tasks = (vectors @ task_vectors.T).toarray()
        cosines.append(with_tasks.max(axis=1))
        row = with_tasks.argmax(axis=0)
        most = with_tasks[row, np.arange(len(best))]
        best_document = np.where(most > best, first + row, best_document)
        best = np.maximum(best, most)
        with_categories = (vectors @ category_vectors.T).toarray()
        chosen = np.where(with_categories.max(axis=1) > 0, with_categories.argmax(axis=1), len(CATEGORIES))
        categories.update(names[number] for number in chosen.tolist())
    pairs = zip(texts_of, best.tolist(), best_document.tolist(), strict=True)
    nearest = sorted((Neighbour(*pair) for pair in pairs), key=lambda neighbour: -neighbour.cosine)
    languages = Counter(document.language for document in documents)
    return Analysis(tuple(nearest), np.concatenate(cosines).astype(np.float64), categories, languages)


def read_document(record: Record, file: str) -> Document:
    """Read the document of a record of any schema.

    Raises:
        BadRecord: when it holds no text.
    """
    row = record.decoded()
    try:
        messages = record.conversation().messages
        parts = [
            "\n".join(block.content for message in messages if message.role == role for block in message.blocks)
            for role in ("user", "assistant")
        ]
    except BadRecord:
        parts = ["", "\n".join(text.value for text in texts(record, ()))]
    named = [row[name] for name in _LANGUAGE_COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)]
    tags = Counter(fence.language for fence in find_fences("\n".join(parts)) if fence.language)
    language = named[0] if named else tags.most_common(1)[0][0] if tags else "unknown"
    return Document(file, record.line, language_name(language), *parts)


def _read(files: Sequence[DataFile], limit: int | None) -> tuple[list[Document], Counter[str]]:
    documents: list[Document] = []
    unreadable: Counter[str] = Counter()
    for file in files:
        for record in islice(read_records(file), limit):
            try:
                documents.append(read_document(record, file.path))
            except BadRecord as error:
                unreadable[fault_kind(str(error))] += 1
        if not documents or documents[-1].file != file.path:
            raise ValueError(f"{file.path}: no record with a text, expected at least one")
    return documents, unreadable


def _length_function(tokenizer_path: str | None) -> tuple[str, Callable[[str], int]]:
    if tokenizer_path is None:
        return "words", lambda text: len(words(text))
    from reflectron.engine.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path, "reflection")
    return "tokens", lambda text: len(tokenizer.encode(text))


def _page(
    documents: Sequence[Document],
    unreadable: Counter[str],
    found: Analysis,
    lengths: dict[str, list[int]],
    unit: str,
) -> str:
    total = len(documents)
    files = Counter(document.file for document in documents)
    skipped = _table(["not read", "records"], unreadable.most_common()) if unreadable else ""
    sections = [
        ("Files", _table(["file", "documents"], files.items()) + skipped),
        ("Languages", _shares("language", found.languages, total) + _bars(found.languages)),
        (
            "Categories",
            "<p>By shared keywords (TF-IDF): a rough guide.</p>"
            + _shares("category", found.categories, total)
            + _bars(found.categories),
        ),
        (f"Lengths in {unit}", _length_table(lengths) + _histogram(lengths, unit)),
        ("Nearness to HumanEval", _nearness(documents, found)),
    ]
    body = "".join(f"<h2>{html.escape(title)}</h2>\n{content}\n" for title, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Data analysis</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{total} documents</h1>\n{body}</body></html>\n"
    )


def _shares(name: str, counts: Counter[str], total: int) -> str:
    return _table([name, "documents", "share"], [(key, n, f"{n / total:.1%}") for key, n in counts.most_common(30)])


def _length_table(lengths: dict[str, list[int]]) -> str:
    rows = []
    for name, values in lengths.items():
        if values:
            quantiles = np.quantile(values, (0.5, 0.95, 1.0))
            rows.append((name, len(values), *(f"{number:.0f}" for number in (np.mean(values), *quantiles))))
    return _table(["part", "documents", "mean", "median", "95 %", "longest"], rows)


def _nearness(documents: Sequence[Document], found: Analysis) -> str:
    quantiles = [f"{q:.2f}" for q in np.quantile(found.cosines, (0.5, 0.95, 0.99, 1.0))]
    rows = []
    for neighbour in found.nearest[:_SHOWN_NEIGHBOURS]:
        document = documents[neighbour.document]
        excerpt = (document.instruction or document.answer)[:_EXCERPT]
        place = f"{document.file}, line {document.line}"
        rows.append((neighbour.task_id, f"{neighbour.cosine:.2f}", place, _Excerpt(excerpt)))
    return (
        "<p>Cosine of TF-IDF vectors of a document and the task nearest to it. Copies are the business of "
        "<code>reflectron data decontaminate</code>.</p>"
        + _table(["median", "95 %", "99 %", "nearest"], [quantiles])
        + _histogram({"documents": found.cosines.tolist()}, "cosine with the nearest task")
        + f"<h3>The {len(rows)} tasks with the nearest documents</h3>"
        + _table(["task", "cosine", "document", "it begins"], rows)
    )


class _Excerpt(str):
    """Text that keeps its lines in a table."""


def _table(header: Sequence[str], rows: Any) -> str:
    def cell(value: object) -> str:
        text = html.escape(str(value))
        if isinstance(value, _Excerpt):
            return f"<td><pre>{text}</pre></td>"
        numeric = isinstance(value, int) or str(value).rstrip("%").replace(".", "", 1).isdecimal()
        return f'<td class="number">{text}</td>' if numeric else f"<td>{text}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def _bars(counts: Counter[str]) -> str:
    names, numbers = zip(*reversed(counts.most_common(15)), strict=True)

    def draw(axis: Any) -> None:
        axis.barh(names, numbers)
        axis.set_xlabel("documents")

    return _picture(draw, height=0.6 + 0.28 * len(names))


def _histogram(values: dict[str, list[Any]], label: str) -> str:
    # The few longest would squeeze all others together.
    top = max(np.quantile(numbers, 0.99) for numbers in values.values() if numbers)

    def draw(axis: Any) -> None:
        for name, numbers in values.items():
            axis.hist(np.minimum(numbers, top), bins=np.linspace(0, top, 61), alpha=0.6, label=name)
        axis.set_xlabel(f"{label} (the highest 1 % in the last bar)")
        axis.set_ylabel("documents")
        axis.legend()

    return _picture(draw, height=3.0)


def _picture(draw: Callable[[Any], None], height: float) -> str:
    """Draw an axis by ``draw`` and return it as a PNG inside the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, height), layout="constrained")
    draw(axis)
    axis.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">\n'
