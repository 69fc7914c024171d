"""``reflectron bench corpus``: decontamination and deduplication of synthetic documents, as rows of time and memory.

Each command runs as a process of its own, as a user starts it. Memory is the resident memory of it and its workers
together, which counts pages that they share more than once.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from reflectron.engine.data.sources import usable_cores
from reflectron.tools.bench.corpus_inputs import write_corpus

_SECONDS_BETWEEN_SAMPLES = 0.1
_DISTRIBUTIONS = ("reflectron", "numpy", "pyahocorasick", "datasketch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many documents, and where the rows go."""
    parser.add_argument("--documents", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--peer-documents", type=int, default=20_000, help="for datasketch; 0 leaves it out")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one per core (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows.jsonl, and scratch space")


def run(args: argparse.Namespace) -> int:
    """Measure; prints each row as it is known."""
    from reflectron.tools.bench.machine import machine

    rows = args.out / "rows.jsonl"
    if rows.exists():
        raise ValueError(f"{rows} exists; name another folder with --out, rows are never overwritten")
    common = machine(_DISTRIBUTIONS)
    scratch = args.out / "scratch"
    try:
        for documents in sorted({args.documents, args.peer_documents} - {0}):
            start = time.perf_counter()
            planted = write_corpus(scratch, documents)
            print(f"{documents} documents written in {time.perf_counter() - start:.0f} s", flush=True)
            calls: list[Callable[[], dict[str, Any]]] = []
            if documents == args.documents:
                calls += [partial(_decontaminate, scratch, args.workers), partial(_deduplicate, scratch, args.workers)]
            if documents == args.peer_documents:
                calls += [partial(_deduplicate, scratch, 1), partial(_datasketch, scratch)]
            size = (scratch / "documents.jsonl").stat().st_size
            for measure in calls:
                row = {**measure(), "planted": asdict(planted), "documents": documents, "bytes": size, **common}
                print(json.dumps(row), flush=True)
                with rows.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _decontaminate(scratch: Path, workers: int) -> dict[str, Any]:
    words = ["--benchmarks", str(scratch / "benchmark.jsonl"), "--workers", str(workers)]
    row = _command("decontaminate", words, scratch, workers)
    row["found"] = {"contaminated": _lines(scratch / "out" / "excluded" / "documents.jsonl")}
    return row


def _deduplicate(scratch: Path, workers: int) -> dict[str, Any]:
    row = _command("deduplicate", ["--workers", str(workers)], scratch, workers)
    found = {"exact": 0, "near": 0}
    with (scratch / "out" / "groups.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            for member in json.loads(line)["duplicates"]:
                found[member["kind"]] += 1
    row["found"] = found
    return row


def _datasketch(scratch: Path) -> dict[str, Any]:
    words = [sys.executable, "-m", "reflectron.tools.bench.corpus_peer", str(scratch / "documents.jsonl")]
    row, output = _measure(words)
    return {"command": "deduplicate", "provider": "datasketch", "workers": 1, **row, "found": json.loads(output)}


def _command(name: str, words: list[str], scratch: Path, workers: int) -> dict[str, Any]:
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "reflectron.tools.cli", "data", name, str(scratch / "documents.jsonl")]
    row, _ = _measure([*command, "--out", str(out), *words])
    return {"command": name, "provider": "reflectron", "workers": workers or usable_cores(), **row}


def _measure(words: list[str]) -> tuple[dict[str, float], str]:
    """Wall-clock and processor time and peak memory of a process and its children, and what it printed."""
    import psutil

    start, processor = time.perf_counter(), _processor_seconds()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not done.wait(_SECONDS_BETWEEN_SAMPLES):
            total = 0
            try:
                for member in (tree, *tree.children(recursive=True)):
                    total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, _ = process.communicate()
    finally:
        done.set()
        watcher.join()
    if process.returncode:
        raise ValueError(f"{' '.join(words)} ended with exit code {process.returncode}")
    row = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": _processor_seconds() - processor,
        "peak_memory_gib": peak / 2**30,
    }
    return {name: round(value, 3) for name, value in row.items()}, output


def _processor_seconds() -> float:
    """User and system time of all children that have ended, and of theirs; other work hardly adds to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for _ in stream)
