"""``reflectron data deduplicate``: files of records in; the distinct records, the duplicates and their groups out.

Of a group the first record is kept, in the order of the files on the command line. Every record ends up either in
``kept/`` or in ``removed/``, as it was read; ``groups.jsonl`` names them with their exact Jaccard similarity.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectron.engine.config import DataFile
from reflectron.engine.data.sources import read_records
from reflectron.tools.data.corpus import as_line, data_files, new_file, write_row

if TYPE_CHECKING:
    from reflectron.tools.data.duplicates import Duplicates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="compare these only (default: all)")
    parser.add_argument("--split", default="train", help="split of hub datasets that are read (default: train)")
    parser.add_argument(
        "--threshold", type=float, default=0.7, help="least Jaccard similarity (default: 0.7; above 1: exact only)"
    )
    parser.add_argument("--words", type=int, default=5, help="words of a shingle (default: 5)")
    parser.add_argument("--permutations", type=int, default=128, help="of MinHash (default: 128)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one per core (default)")


def run(args: argparse.Namespace) -> int:
    """Deduplicate; returns the exit code."""
    from reflectron.tools.data.duplicates import Similarity, find_duplicates

    files = data_files(args.data, args.split)
    similarity = Similarity(args.threshold, args.words, args.permutations)
    found = find_duplicates(list(files.values()), args.columns, similarity, args.out, args.workers)
    _write_groups(found, list(files.values()), args.out)
    _split_files(found, files, args.out)
    groups = sum(1 for _ in found.groups())
    print(f"{groups} groups of duplicates; kept/, removed/, groups.jsonl and rejects.jsonl are in {args.out}")
    return 0


def _split_files(found: Duplicates, files: dict[str, DataFile], out: Path) -> None:
    """Read every file again and put its records where they belong, and print the counts."""
    is_kept = found.is_kept()
    for number, (name, file) in enumerate(files.items()):
        own = found.file == number
        keep = set(found.index[own & is_kept].tolist())
        with new_file(out / "kept" / f"{name}.jsonl") as kept, new_file(out / "removed" / f"{name}.jsonl") as removed:
            for record in read_records(file):
                (kept if record.index in keep else removed).write(as_line(record))
        exact = int((own & ~is_kept & found.exact).sum())
        near = int((own & ~is_kept & ~found.exact).sum())
        unreadable = sum(place[0] == number for place in found.unreadable)
        print(
            f"{file.path}: {len(keep) + exact + near + unreadable} records, {len(keep)} kept, {exact} exact and {near} "
            "near duplicates" + (f", {unreadable} unreadable" if unreadable else "")
        )


def _write_groups(found: Duplicates, files: Sequence[DataFile], out: Path) -> None:
    def place(record: int) -> dict[str, Any]:
        index, line = int(found.index[record]), int(found.line[record])
        return {"file": files[found.file[record]].path, "line": line, "index": index}

    with new_file(out / "groups.jsonl") as stream:
        for kept, duplicates in found.groups():
            members = [
                {
                    **place(record),
                    "kind": "exact" if found.exact[record] else "near",
                    "jaccard": round(float(found.similarity[record]), 4),
                }
                for record in duplicates
            ]
            write_row(stream, {"kept": place(kept), "duplicates": members})
    with new_file(out / "rejects.jsonl") as stream:
        for number, index, line, reason in found.unreadable:
            write_row(stream, {"file": files[number].path, "line": line, "index": index, "reason": reason})
