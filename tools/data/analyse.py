"""``reflectron data analyse``: training data in; one HTML page with tables and plots out, complete in itself."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import read_records
from reflectron.tools.data.benchmarks import load_benchmark
from reflectron.tools.data.corpus import from_extra, new_file, words
from reflectron.tools.data.documents import Document, read_document

if TYPE_CHECKING:
    from reflectron.tools.data.analysis import Analysis

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--humaneval", required=True, metavar="SOURCE", help="HumanEval as a file or hub dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page")
    parser.add_argument("--tokenizer", metavar="DIR", help="lengths in its tokens; in words without one")
    parser.add_argument("--split", default="train", help="split of hub datasets that are read (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N records of each file only")


def run(args: argparse.Namespace) -> int:
    """Analyse; returns the exit code."""
    with from_extra("data"):
        from reflectron.tools.data.analysis import analyse

    tasks = load_benchmark(args.humaneval)
    if any(task.benchmark != "HumanEval" for task in tasks):
        raise ValueError(f"--humaneval {args.humaneval} is {tasks[0].benchmark}, expected HumanEval")
    documents, unreadable = _read(args)
    unit, length = _length_function(args.tokenizer)
    lengths = {
        "instruction": [length(document.instruction) for document in documents if document.instruction],
        "answer": [length(document.answer) for document in documents],
    }
    page = _page(documents, unreadable, analyse(documents, tasks), lengths, unit)
    with new_file(args.out) as stream:
        stream.write(page.encode("utf-8", "replace"))
    print(f"{len(documents)} documents, {sum(unreadable.values())} unreadable -> {args.out}")
    return 0


def _read(args: argparse.Namespace) -> tuple[list[Document], Counter[str]]:
    documents: list[Document] = []
    unreadable: Counter[str] = Counter()
    for path in args.data:
        for record in islice(read_records(DataFile(path=path, split=args.split)), args.limit):
            try:
                documents.append(read_document(record, path))
            except BadRecord as error:
                unreadable[str(error).split(":")[0]] += 1
        if not documents or documents[-1].file != path:
            raise ValueError(f"{path}: no record with a text, expected at least one")
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
    """An axis that ``draw`` fills, as a PNG inside the page."""
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
