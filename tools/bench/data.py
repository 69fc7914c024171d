"""Measures the data tools as a user starts them: decontamination and deduplication of synthetic documents with planted
copies and tasks, beside datasketch, and the making of reflection samples with a model that answers at once.

``python -m reflectron.tools.bench.data FILE`` is the peer: it prints what datasketch finds in a file of documents.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.data.workers import usable_cores
from reflectron.tools.bench.harness import BenchRows, Row, new_rows_file, run_process, take_turns
from reflectron.tools.data.corpus import words as words_of
from reflectron.tools.llm.scripted_server import Scripted, ScriptedServer
from reflectron.tools.provenance import provenance
from reflectron.tools.sandbox.wall import SandboxKind

# ---- synthetic documents ----

_VOCABULARY = 50_000
_WORDS = (30, 90)
_TASKS = 500
_BLOCK = 1000
# Of every block of documents: exact copies, copies with some words changed, and documents that hold a task.
_EXACT, _NEAR, _CONTAMINATED = 50, 50, 1
_CHANGED_SHARE = 0.03


@dataclass(frozen=True)
class PlantedCorpus:
    """What synthetic documents hold."""

    documents: int
    exact: int
    """Copies but for whitespace."""
    near: int
    """Changed copies whose Jaccard similarity with the original, of 5-word shingles, is at least 0.7."""
    contaminated: int
    """Documents that hold a task."""


def write_corpus(folder: Path, documents: int) -> PlantedCorpus:
    """Write ``documents.jsonl`` and ``benchmark.jsonl``, which has HumanEval's columns.

    Words are drawn from a vocabulary with Zipf's frequencies, so that documents share words and short phrases as real
    ones do. The same number gives the same bytes, with the same version of NumPy.

    Args:
        documents: a multiple of 1000.
    """
    if documents < _BLOCK or documents % _BLOCK:
        raise ValueError(f"--documents is {documents}, expected a multiple of {_BLOCK}")
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(0))
    vocabulary = _vocabulary(generator)
    tasks = [_document(vocabulary, generator) for _ in range(_TASKS)]
    with (folder / "benchmark.jsonl").open("w", encoding="utf-8") as stream:
        for number, task in enumerate(tasks):
            row = {"task_id": f"HumanEval/{number}", "prompt": task, "canonical_solution": "pass", "entry_point": "f"}
            stream.write(json.dumps(row) + "\n")
    blocks, near = documents // _BLOCK, 0
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(blocks):
            texts, similar = _block(vocabulary, tasks, generator)
            near += similar
            stream.writelines(json.dumps({"content": text}) + "\n" for text in texts)
    return PlantedCorpus(documents, blocks * _EXACT, near, blocks * _CONTAMINATED)


def _vocabulary(generator: np.random.Generator) -> np.ndarray:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = generator.integers(2, 10, _VOCABULARY)
    return np.array(["".join(generator.choice(letters, length)) for length in lengths], dtype=object)


def _document(vocabulary: np.ndarray, generator: np.random.Generator) -> str:
    count = int(generator.integers(*_WORDS))
    ranks = generator.zipf(1.2, count) % len(vocabulary)
    return " ".join(vocabulary[ranks])


def _block(vocabulary: np.ndarray, tasks: list[str], generator: np.random.Generator) -> tuple[list[str], int]:
    """Return documents in random order, and how many of the changed copies are near duplicates."""
    originals = [_document(vocabulary, generator) for _ in range(_BLOCK - _EXACT - _NEAR - _CONTAMINATED)]
    changed = [_changed(text, vocabulary, generator) for text in originals[_EXACT : _EXACT + _NEAR]]
    similar = sum(map(_similar, originals[_EXACT : _EXACT + _NEAR], changed))
    copies = [text.replace(" ", "\n  ", 3) for text in originals[:_EXACT]]
    drawn = generator.integers(len(tasks), size=_CONTAMINATED).tolist()
    texts = [*originals, *copies, *changed, *(f"Exercise: {tasks[number]} Thank you." for number in drawn)]
    return [texts[i] for i in generator.permutation(len(texts))], similar


def _changed(text: str, vocabulary: np.ndarray, generator: np.random.Generator) -> str:
    """Change one stretch of words, so that as few shingles as possible change."""
    words = np.array(text.split(), dtype=object)
    count = max(1, round(_CHANGED_SHARE * len(words)))
    start = int(generator.integers(len(words) - count))
    words[start : start + count] = generator.choice(vocabulary, count)
    return " ".join(words)


def _similar(left: str, right: str) -> bool:
    shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (left.split(), right.split())]
    return len(shingles[0] & shingles[1]) >= 0.7 * len(shingles[0] | shingles[1])


# ---- decontamination and deduplication ----

_CORPUS_DISTRIBUTIONS = ("reflectron", "numpy", "pyahocorasick", "datasketch")
_SHINGLE = 5


def bench_corpus(out: Path, documents: int, peer_documents: int, workers: int) -> int:
    """Measure both commands on ``documents``, and deduplication beside datasketch on ``peer_documents``.

    Args:
        out: folder of rows, and scratch space.
        documents: a multiple of 1000.
        peer_documents: likewise; 0 leaves the peer out.
        workers: processes of the commands; 0 means one a core.
    """
    rows = BenchRows("corpus", provenance(_CORPUS_DISTRIBUTIONS), new_rows_file(out))
    scratch = out / "scratch"
    try:
        for count in sorted({documents, peer_documents} - {0}):
            start = time.perf_counter()
            planted = write_corpus(scratch, count)
            print(f"{count} documents written in {time.perf_counter() - start:.0f} s", flush=True)
            size = (scratch / "documents.jsonl").stat().st_size
            about = {"planted": asdict(planted), "documents": count, "bytes": size}
            if count == documents:
                against = ["--benchmarks", str(scratch / "benchmark.jsonl")]
                _add_command(rows, scratch, "decontaminate", workers, _contaminated, about, against)
                _add_command(rows, scratch, "deduplicate", workers, _duplicates, about)
            if count == peer_documents:
                _add_command(rows, scratch, "deduplicate", 1, _duplicates, about)
                peer = ["-m", "reflectron.tools.bench.data", str(scratch / "documents.jsonl")]
                found = {"command": "deduplicate", "provider": "datasketch", "workers": 1}
                _add_run(rows, peer, scratch, found | about, lambda line: json.loads(line))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def _add_command(
    rows: BenchRows,
    scratch: Path,
    name: str,
    workers: int,
    found: Callable[[Path], Row],
    about: Row,
    options: Sequence[str] = (),
) -> None:
    """Run ``reflectron data <name>`` and add its row; ``found`` counts what it says of the documents."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = ["-m", "reflectron.tools.cli", "data", name, str(scratch / "documents.jsonl")]
    command += ["--out", str(out), *options, "--workers", str(workers)]
    place = {"command": name, "provider": "reflectron", "workers": workers or usable_cores()}
    _add_run(rows, command, scratch, place | about, lambda _: found(out))


def _add_run(rows: BenchRows, words: Sequence[str], scratch: Path, about: Row, found: Callable[[str], Row]) -> None:
    done = run_process(words, scratch / "command.log")
    if done.code:
        raise ValueError(f"{' '.join(words)} ended with exit code {done.code}: {done.last_line}")
    used = {name: round(getattr(done, name), 3) for name in ("processor_seconds", "peak_memory_gib")}
    row = rows.add("time", "s", [round(done.seconds, 3)], **about, **used, found=found(done.last_line))
    print(json.dumps(row), flush=True)


def _contaminated(out: Path) -> Row:
    with (out / "excluded" / "documents.jsonl").open("rb") as stream:
        return {"contaminated": sum(1 for _ in stream)}


def _duplicates(out: Path) -> Row:
    found = {"exact": 0, "near": 0}
    with (out / "groups.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            for member in json.loads(line)["duplicates"]:
                found[member["kind"]] += 1
    return found


def find_with_datasketch(path: Path) -> Row:
    """Query, then insert: a document that finds a similar one before it is a duplicate."""
    from datasketch import MinHash, MinHashLSH

    start = time.perf_counter()
    index = MinHashLSH(threshold=0.7, num_perm=128)
    duplicates = documents = 0
    with path.open(encoding="utf-8") as stream:
        while lines := list(islice(stream, 1024)):
            split = [words_of(json.loads(line)["content"]) for line in lines]
            shingles = [
                [" ".join(found[i : i + _SHINGLE]).encode() for i in range(max(len(found) - _SHINGLE + 1, 1))]
                for found in split
            ]
            for signature in MinHash.bulk(shingles, num_perm=128):
                if any(index.query(signature)):
                    duplicates += 1
                else:
                    index.insert(documents, signature)
                documents += 1
    return {"documents": documents, "duplicates": duplicates, "seconds": time.perf_counter() - start}


# ---- reflection samples ----

_REFLECT_DISTRIBUTIONS = ("reflectron", "openai", "jupyter_client", "ipykernel", "pyzmq")
_TESTS = "assert total([1, 2, 3]) == 6\nassert total([]) == 0"
_WRONG = f"```python\ndef total(values):\n    return sum(values) + 1\n\n{_TESTS}\n```"
_RIGHT = f"```python\ndef total(values):\n    return sum(values)\n\n{_TESTS}\n```"
_ANSWER = "```python\ndef total(values):\n    return sum(values)\n```"


def bench_reflect(
    out: Path, sizes: Sequence[int], problems: int, rounds: int, sandbox: SandboxKind, i_understand: bool
) -> int:
    """Measure how many reflection samples a second the interpreters of this machine allow.

    The model is a scripted server that answers at once, so that what is measured is all the rest: each problem takes a
    program that fails, its repair, an answer and its verification, all of them really run in the sandbox.

    Args:
        out: folder of rows.
        sizes: of the pool of interpreters.
        problems: of each run.
        rounds: runs of each size.
        sandbox, i_understand: as of ``reflectron data reflect``.
    """
    common = provenance(_REFLECT_DISTRIBUTIONS) | {"sandbox": sandbox, "problems": problems}
    rows = BenchRows("data", common, new_rows_file(out))
    options = ["--sandbox", sandbox, *(["--i-understand"] if i_understand else [])]
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    with ScriptedServer(_speak) as server:
        for order in take_turns(sizes, rounds):
            for size in order:
                seconds = _seconds_of_run(server.url, size, problems, options)
                rates[size].append(round(problems / seconds, 3))
    for size, values in rates.items():
        row = rows.add("problems_per_second", "1/s", values, interpreters=size)
        print(json.dumps(row))
    return 0


def _seconds_of_run(url: str, size: int, problems: int, options: Sequence[str]) -> float:
    """Return the seconds of a whole run, the start of the interpreters included."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input.jsonl"
        records = ({"instruction": f"Problem {i}: write total(values), their sum."} for i in range(problems))
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        command = ["-m", "reflectron.tools.cli", "data", "reflect", str(source), "--out", folder, "--endpoint", url]
        command += ["--model", "scripted", "--interpreters", str(size), "--concurrency", str(2 * size), *options]
        done = run_process(command, Path(folder) / "command.log")
        samples = Path(folder, "reflection.jsonl").read_text(encoding="utf-8") if done.code == 0 else ""
        made = samples.count("\n")
        if made != problems:
            raise ValueError(f"a run made {made} samples, expected {problems}: {done.last_line}")
    return done.seconds


def _speak(body: dict[str, Any]) -> Scripted:
    """Answer wrong once, then right."""
    if body["messages"][-1]["content"].startswith("All tests pass."):
        return Scripted(text=_ANSWER)
    return Scripted(text=_WRONG if len(body["messages"]) == 2 else _RIGHT)


if __name__ == "__main__":
    print(json.dumps(find_with_datasketch(Path(sys.argv[1]))))
