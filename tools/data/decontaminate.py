"""``reflectron data decontaminate``: files of records in; the clean records, the excluded ones and the evidence out.

Every record of a file ends up either in ``kept/`` or in ``excluded/``, as it was read; ``report.jsonl`` names for each
exclusion the benchmark, its task, the matched text and its position.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import map_chunks, read_chunks, read_rows
from reflectron.engine.text import printable
from reflectron.tools.data.benchmarks import Fragment, load_benchmark
from reflectron.tools.data.corpus import as_line, data_files, from_extra, new_file, words, write_row

if TYPE_CHECKING:
    from reflectron.tools.data.contamination import Allowed, Detector

_RECORDS_PER_CHUNK = 1024
_ALLOWED_KEYS = ("benchmark", "task_id", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files of JSON or Parquet, or hub datasets as name:configuration@split",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="look at these only (default: all)")
    parser.add_argument("--split", default="train", help="split of hub datasets that are read (default: train)")
    parser.add_argument("--min-words", type=int, default=10, help="shorter matches are no evidence (default: 10)")
    parser.add_argument("--ngram", type=int, default=6, help="words of an n-gram (default: 6)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of n-grams that is evidence (default: 0.5)")
    parser.add_argument("--allow", metavar="FILE", help="JSON lines with benchmark, task_id or text of allowed matches")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one per core (default)")


def run(args: argparse.Namespace) -> int:
    """Decontaminate; returns the exit code, 0 also when records were excluded."""
    with from_extra("data"):
        from reflectron.tools.data.contamination import Detector, Evidence

    evidence = Evidence(args.min_words, args.ngram, args.overlap)
    files = data_files(args.data, args.split)
    fragments = tuple(fragment for source in args.benchmarks for fragment in load_benchmark(source))
    allowed = _read_allowed(args.allow) if args.allow else ()
    _print_benchmarks(fragments, evidence.min_words)
    detector = Detector(fragments, evidence, allowed, tuple(args.columns))
    with new_file(args.out / "report.jsonl") as report:
        for name, file in files.items():
            _clean(name, file, args.out, detector, report, args.workers)
    print(f"kept/, excluded/ and report.jsonl are in {args.out}")
    return 0


def _clean(name: str, file: DataFile, out: Path, detector: Detector, report: IO[bytes], workers: int) -> None:
    """Split one file into its kept and its excluded records, and print the counts."""
    total = unreadable = contaminated = 0
    by_benchmark, reasons = Counter[str](), Counter[str]()
    with new_file(out / "kept" / f"{name}.jsonl") as kept, new_file(out / "excluded" / f"{name}.jsonl") as excluded:
        for chunk, findings in map_chunks(detector, read_chunks(file, _RECORDS_PER_CHUNK), workers):
            found = {finding.offset: finding for finding in findings}
            for offset, record in enumerate(chunk.records()):
                total += 1
                finding = found.get(offset)
                (excluded if finding else kept).write(as_line(record))
                if finding is None:
                    continue
                place = {"file": file.path, "line": record.line, "index": record.index}
                if finding.reason:
                    unreadable += 1
                    reasons[finding.reason.split(":")[0]] += 1
                    write_row(report, {**place, "reason": finding.reason})
                contaminated += bool(finding.matches)
                by_benchmark.update({match.benchmark for match in finding.matches})
                for match in finding.matches:
                    write_row(report, {**place, **asdict(match)})
        if unreadable == total:
            reason = reasons.most_common(1)[0][0]
            raise ValueError(f"{file.path}: none of its {total} records has a text to look at, most for {reason!r}")
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


def _read_allowed(path: str) -> tuple[Allowed, ...]:
    from reflectron.tools.data.contamination import Allowed

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
