"""What all benchmarks share: rows and their spread, tables, verdicts on goals, rounds, and the processes that measure.

A row is one metric of one thing on one case: ``p20``, ``p50`` and ``p80`` over ``rounds`` values in ``unit``, or
``reason`` why there are none, beside the facts of the case, the hardware, versions and commit. It is on disk as soon as
it is known, and no file of rows is ever overwritten.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from reflectron.engine.files import append_whole, one_line
from reflectron.engine.parallel.launch import die_with, spawn_local

if TYPE_CHECKING:
    import torch

    from reflectron.engine.model.architecture import Architecture
    from reflectron.engine.parallel.process_groups import ParallelGroups

T = TypeVar("T")
Row = dict[str, Any]

ASSETS = Path(__file__).parent / "assets"
JUDGED_ON = ("H100", "H200")
"""The devices that the goals of speed and memory were set for."""
# Between asking a process to end and killing it, and between two looks at its memory.
_GRACE_S, _LOOK_S = 5.0, 0.1


# ---- rows ----


def new_rows_file(folder: Path) -> Path:
    """Make ``folder`` and return the path of its rows.

    Raises:
        ValueError: when it has rows already.
    """
    path = folder / "rows.jsonl"
    if path.exists():
        raise ValueError(f"{path} exists; name another folder with --out, rows are never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    return path


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; none where it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class BenchRows:
    """The rows of a benchmark, in memory and, with a path, at the end of that file.

    Args:
        bench: names the benchmark in every row.
        common: what all rows share, hardware and versions among it.
        path: may have rows of other processes of the same benchmark.
    """

    def __init__(self, bench: str, common: Row, path: Path | None) -> None:
        self.bench, self.common, self.path = bench, common, path
        self.rows: list[Row] = []

    def add(
        self, metric: str, unit: str = "", values: Sequence[float] = (), *, reason: str | None = None, **facts: Any
    ) -> Row:
        """Keep one metric, of which ``values`` has one a round; the row says in ``reason`` why there are none."""
        if not all(map(math.isfinite, values)):
            values, reason = (), "not finite"
        row = {"bench": self.bench, **facts, "metric": metric, "unit": unit, **spread(values), "reason": reason}
        self.rows.append(row | self.common)
        if self.path is not None:
            with self.path.open("ab") as file:
                append_whole(file.fileno(), (json.dumps(self.rows[-1]) + "\n").encode())
        return self.rows[-1]


def spread(values: Sequence[float]) -> Row:
    """Return the 20, 50 and 80 per cent quantiles of ``values`` and their number; null where there are none."""
    import numpy as np

    found = [float(q) for q in np.quantile(values, (0.2, 0.5, 0.8))] if len(values) else [None] * 3
    return dict(zip(("p20", "p50", "p80"), found, strict=True)) | {"rounds": len(values)}


# ---- tables and goals ----


@dataclass(frozen=True)
class Goal:
    """A goal and what was found; ``met`` is None where nothing was."""

    text: str
    figure: str
    met: bool | None


def judge(text: str, found: Iterable[tuple[float, str]], limit: float, *, most: bool, form: str = "{:.3g}") -> Goal:
    """Judge a goal by the worst of the figures that were found, each with its place.

    Args:
        text: the goal, for a reader.
        found: figures and where each was measured.
        limit: of the figure.
        most: whether the figure may be at most ``limit``, else at least.
        form: how the figure is written.
    """
    figures = list(found)
    if not figures:
        return Goal(text, "", None)
    value, place = (max if most else min)(figures)
    return Goal(text, f"{form.format(value)} ({place})", value <= limit if most else value >= limit)


def is_judged(row: Row) -> bool:
    """Whether the goals of speed and memory were set for the device of ``row``."""
    return any(name in row["device"] for name in JUDGED_ON)


def goal_table(goals: Iterable[Goal]) -> str:
    """Return which goals are met, and by which figure."""
    words = {True: "met", False: "not met", None: "not measured"}
    return table(["goal", "", "worst figure"], [[goal.text, words[goal.met], goal.figure] for goal in goals])


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def title(name: str, row: Row) -> str:
    """Return the head of a page: what was measured, on which device, with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    cuda = f", CUDA {row['cuda']}" if row["cuda"] else ""
    return f"# {name}\n\n{row['device']}{cuda}; {versions}; commit {row['commit']}\n"


def quantities(row: Row | None, with_spread: bool = False) -> str:
    """Return a row's median, and its spread in brackets; nothing where it has none."""
    if row is None or row["p50"] is None:
        return ""
    text = f"{row['p50']:.4g}"
    return f"{text} ({row['p20']:.4g}-{row['p80']:.4g})" if with_spread else text


def by_key(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by some of their values, in the order of measurement."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# ---- rounds ----


def take_turns(names: Sequence[Any], rounds: int) -> Iterator[list[Any]]:
    """Yield the names once a round, each time another one first: drift of clock and load then meets all alike."""
    for index in range(rounds):
        turn = index % len(names)
        yield [*names[turn:], *names[:turn]]


@contextmanager
def collections_between_rounds() -> Iterator[None]:
    """Keep Python's garbage collector out of what is measured; whoever measures collects between rounds.

    That is fast, because what was there before is frozen.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


class RankClock:
    """Times what all ranks of a job begin together while their devices are idle."""

    def __init__(self, groups: ParallelGroups) -> None:
        self.groups = groups

    def local(self, action: Callable[[], T]) -> tuple[float, T]:
        """Return this rank's seconds of ``action``, and what it returned; every rank calls it."""
        self._finish()
        self.groups.barrier()
        began = time.perf_counter()
        result = action()
        self._finish()
        return time.perf_counter() - began, result

    def slowest(self, action: Callable[[], T]) -> tuple[float, T]:
        """Return the seconds of ``action`` on the slowest rank, and what it returned on this one."""
        seconds, result = self.local(action)
        return self.most(seconds), result

    def most(self, value: float) -> float:
        """Return the largest value of any rank."""
        import torch
        import torch.distributed as dist

        most = torch.tensor(value, dtype=torch.float64, device="cpu")
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.groups.hosts)
        return most.item()

    def is_late(self, deadline: float) -> bool:
        """Whether the main rank's ``time.time()`` is behind ``deadline``; alike on all ranks."""
        return bool(self.most(self.groups.is_main and time.time() > deadline))

    def _finish(self) -> None:
        if self.groups.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give memory back, so that what one measurement leaves does not stand in another's way."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak_memory(action: Callable[[], T]) -> tuple[int, T]:
    """Return the peak of the bytes that torch allocates on CUDA while ``action`` runs, and what it returned."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), result


def profiled(action: Callable[[], T], device: torch.device) -> tuple[torch.profiler.profile, T]:
    """Return torch's profile of ``action`` with all that it starts on ``device``, and what it returned."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        result = action()
        if cuda:
            torch.cuda.synchronize()
    return recorded, result


def reason_of(error: Exception) -> str:
    """Return why something could not be measured, in one line."""
    return one_line(error)[:200]


# ---- processes ----


@dataclass(frozen=True)
class FinishedProcess:
    """A process that has ended, and what it took."""

    code: int | None
    """Exit code; None where it was ended at its limit."""
    seconds: float
    processor_seconds: float
    """User and system time of it and its children."""
    peak_memory_gib: float
    """Resident memory of it and its children together; pages that they share count more than once."""
    last_line: str


def run_process(
    words: Sequence[str], log: Path, *, limit_s: float = math.inf, env: Mapping[str, str] | None = None
) -> FinishedProcess:
    """Run ``python WORDS`` with its output in ``log``; at the limit it is ended with all that it started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    parent, began, processor, peak = os.getpid(), time.perf_counter(), _processor_seconds(), 0
    with log.open("wb") as stream:
        process = psutil.Popen(
            [sys.executable, "-W", "ignore", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        code: int | None = None
        try:
            while (left := began + limit_s - time.perf_counter()) > 0:
                try:
                    code = process.wait(min(_LOOK_S, left))
                    break
                except psutil.TimeoutExpired:
                    peak = max(peak, _resident_bytes(process))
        finally:
            if process.is_running():
                _end(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return FinishedProcess(
        code=code,
        seconds=time.perf_counter() - began,
        processor_seconds=_processor_seconds() - processor,
        peak_memory_gib=peak / 2**30,
        last_line=lines[-1] if lines else "no output",
    )


def _end(process: psutil.Popen) -> None:
    process.send_signal(signal.SIGTERM)  # whoever started ranks ends them
    try:
        process.wait(_GRACE_S)
    except psutil.TimeoutExpired:
        process.kill()  # ranks die with their parent
        process.wait()


def _resident_bytes(process: psutil.Popen) -> int:
    try:
        return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _processor_seconds() -> float:
    """Return the time of all children that have ended, and of theirs; other work hardly adds to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_ranks(module: str, plan: Row, processes: int, folder: Path, threads: int = 1) -> int:
    """Run ``tools.bench.<module>`` as the ranks of a job, which read ``plan``; return the exit code of the job."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    words = [sys.executable, "-W", "ignore", "-m", f"reflectron.tools.bench.{module}", str(path)]
    return spawn_local(words, processes, threads_per_process=threads, log_dir=folder)


def read_plan() -> Row:
    """Return the plan of the job of which this process is a rank."""
    content: Row = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return content


# ---- a run to measure ----


def small_llama(hidden: int, ffn: int, heads: int, groups: int, layers: int, vocab: int) -> Architecture:
    """Return a Llama whose sizes are all that matters."""
    from reflectron.engine.model.hf_config import parse_architecture

    return parse_architecture(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
        }
    )


def write_tiny_run(folder: Path) -> Path:
    """Copy a run that needs nothing but this package into ``folder``: a tiny Llama, a tokenizer of bytes, samples.

    Returns:
        The path of its configuration.
    """
    source = ASSETS / "tiny_run"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "samples.jsonl"):
        shutil.copyfile(source / name, folder / name)
    path = folder / "run.yaml"
    text = (source / "run.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("{folder}", str(folder)), encoding="utf-8")
    return path
