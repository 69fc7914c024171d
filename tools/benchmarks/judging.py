"""Judges samples in as many threads as are asked for, and keeps each verdict on disk as soon as it is made.

Whatever judges runs programs in processes of their own, so that threads are enough. A sample fails only itself: when
judging it raises while the sandbox still works, that sample has failed, and all others keep their verdicts. Ctrl-C and
SIGTERM end what runs, and the same command resumes: a verdict is found again by a hash of all that determines it, the
sample, its problem, the limits, versions and the judging code itself. So several scorings may share a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from reflectron.engine.files import append_whole, installed_version, is_stream, one_line
from reflectron.engine.terminal import console
from reflectron.tools.benchmarks.benchmark import (
    STATUSES,
    SUITES,
    BenchmarkProblem,
    ProgramSample,
    SuiteVerdict,
    Verdicts,
)
from reflectron.tools.sandbox import usage
from reflectron.tools.sandbox.home import home, sandbox_folder
from reflectron.tools.sandbox.process import run_sandboxed
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

T = TypeVar("T")
R = TypeVar("R")

# What programs bring about in what reads from them and removes what they leave.
_OF_SAMPLES = (OSError, ValueError, EOFError, MemoryError, RecursionError)
MOST_SOURCE_BYTES = 16 << 20
"""No program is longer; hundreds of times what a model's longest answer takes."""


def judge_samples(
    samples: Sequence[ProgramSample],
    keys: Sequence[str],
    judge: Callable[[ProgramSample], Verdicts],
    kept: VerdictFile,
    *,
    workers: int,
    kind: SandboxKind,
) -> list[Verdicts]:
    """Return the verdicts of all samples; those that ``kept`` holds are not judged again.

    Args:
        keys: of each sample, in ``kept``.
        judge: called from several threads at once.
        workers: samples judged at once.

    Raises:
        OSError: when no sandbox can be made any longer, or a verdict cannot be kept.
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    missing = [number for number, key in enumerate(keys) if key not in kept.verdicts]
    if len(missing) < len(samples):
        # A re-run that judges nothing must not look like one that did.
        print(
            f"{len(samples) - len(missing)} of {len(samples)} samples were judged before and are not judged again: "
            f"{kept.path} has their verdicts",
            file=sys.stderr,
        )

    def judged(number: int) -> tuple[int, Verdicts, Exception | None]:
        return number, *_judge_one(samples[number], judge, kept.suites, kind)

    not_judged: dict[int, Verdicts] = {}
    errors: list[Exception] = []
    with contextlib.closing(in_threads(judged, missing, workers)) as results:
        for number, verdicts, error in tracked(results, len(missing), "judging"):
            if error is not None:
                not_judged[number] = verdicts
                errors.append(error)
            else:
                kept.write(keys[number], samples[number], verdicts)
    if errors:
        _report_not_judged(errors, len(missing))
    return [not_judged[n] if n in not_judged else kept.verdicts[key] for n, key in enumerate(keys)]


def _report_not_judged(errors: Sequence[Exception], tried: int) -> None:
    """Say on stderr how many of ``tried`` samples could not be judged; raise the first error where it was ours."""
    if len(errors) == tried and not all(isinstance(error, _OF_SAMPLES) for error in errors):
        # A fault of ours, which must not look like a score.
        raise errors[0]
    print(f"{len(errors)} samples could not be judged and count as failed: {one_line(errors[0])}", file=sys.stderr)


@contextlib.contextmanager
def says_how_to_resume(keys: Sequence[str], kept: VerdictFile) -> Iterator[None]:
    """Say on stderr what is kept, after Ctrl-C or SIGTERM."""
    try:
        yield
    except KeyboardInterrupt:
        done = sum(key in kept.verdicts for key in keys)
        print(
            f"stopped: {done} of {len(keys)} samples are judged, and {kept.path} keeps their verdicts; "
            "the same command resumes from there",
            file=sys.stderr,
        )
        raise


def _judge_one(
    sample: ProgramSample, judge: Callable[[ProgramSample], Verdicts], suites: int, kind: SandboxKind
) -> tuple[Verdicts, Exception | None]:
    """Return a sample's verdicts, and why it could not be judged."""
    if reason := _unfit(sample.code):
        return (SuiteVerdict("fail", got=reason),) * suites, None
    try:
        return judge(sample), None
    except Exception as error:
        # What a program can bring about is not to be listed; where nothing runs any longer it was not the sample.
        if not _sandbox_works(kind):
            raise
        return (SuiteVerdict("fail", got=f"could not be judged: {one_line(error)}"),) * suites, error


def _unfit(code: str) -> str:
    """Return why a text cannot be handed to any interpreter or compiler; empty where it can."""
    try:
        size = len(code.encode())
    except UnicodeEncodeError as error:
        return f"the program is no valid Unicode: {error.object[error.start]!r} at character {error.start}"
    return f"the program has {size} bytes, more than {MOST_SOURCE_BYTES}" if size > MOST_SOURCE_BYTES else ""


def _sandbox_works(kind: SandboxKind) -> bool:
    try:
        with sandbox_folder() as folder:
            return run_sandboxed(kind, ["true"], folder=folder, limits=SandboxLimits()).returncode == 0
    except OSError:
        return False


def in_threads(call: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Yield results of ``call`` as they come; on an error or a signal all that still runs is killed.

    Raises:
        KeyboardInterrupt: also for SIGTERM.
    """
    stopping = threading.Event()

    def unless_stopping(item: T) -> R:
        if stopping.is_set():
            raise RuntimeError("stopped")
        return call(item)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    with _terminated_as_interrupted():
        try:
            futures = [pool.submit(unless_stopping, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _kill_until_done(futures)
            raise
        pool.shutdown()


def _kill_until_done(futures: Sequence[Future[R]]) -> None:
    """Kill the sandboxes of this process until no thread has one left to wait for: they would run to their limits."""
    while any(future.running() for future in futures):
        for child in usage.children(os.getpid()):
            if _is_sandbox(child):
                for pid in [*usage.process_tree(child)[1:], child]:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _is_sandbox(child: int) -> bool:
    """Return whether a child leads a session of its own in a folder of ours; what removes such a folder leads none."""
    folder = str(home().folder)
    with contextlib.suppress(OSError):
        if os.getsid(child) == child:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            return folder.encode() in command or os.readlink(f"/proc/{child}/cwd").startswith(folder)
    return False


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Only there can signals be handled; elsewhere whoever has the main thread does it.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def affordable_workers(workers: int, memory_bytes: int) -> int:
    """Return how many samples are judged at once: ``workers``, else as many as cores and free memory allow."""
    import psutil

    affordable = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // memory_bytes)
    return workers or max(affordable, 1)


def tracked(results: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Return ``results``, with a progress bar on a terminal."""
    from rich.progress import track

    return track(
        results,
        description=what,
        total=total,
        console=console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


class VerdictFile:
    """A file of verdicts, locked against other scorers until it is closed.

    Args:
        suites: how many verdicts a sample has; rows with another number count as not written.

    Raises:
        ValueError: when another scorer has it, or it cannot be written.
    """

    def __init__(self, path: Path, suites: int) -> None:
        self.path, self.suites = path, suites
        if is_stream(path):
            raise ValueError(f"verdicts cannot be kept in {path}: it is no file; --json FILE puts them beside FILE")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(
                f"verdicts cannot be kept in {path}: {error.strerror}; --json FILE puts them beside FILE"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(
                f"{path} is being written by another scorer: wait for its end, or give --json another FILE"
            ) from None
        except OSError:
            # A file system without locks: rows are appended whole, so two scorers do no more than work twice.
            pass
        self.verdicts, unfinished = _read(path, suites)
        """By key."""
        if unfinished:
            os.write(self._descriptor, b"\n")

    def __enter__(self) -> VerdictFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, key: str, sample: ProgramSample, verdicts: Verdicts) -> None:
        """Append a row.

        Raises:
            OSError: when it cannot be written, as on a full disk; the file is as it was.
        """
        row = {"key": key, "task_id": sample.task_id, "sample": sample.number, "verdicts": as_row(verdicts)}
        append_whole(self._descriptor, json.dumps(row).encode() + b"\n")
        self.verdicts[key] = verdicts


def _read(path: Path, suites: int) -> tuple[dict[str, Verdicts], bool]:
    """Return the file's verdicts, and whether its last row was cut short; what is no row counts as not written."""
    verdicts: dict[str, Verdicts] = {}
    line = b"\n"
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                row = json.loads(line)
                found = from_row(row["verdicts"])
                if isinstance(row["key"], str) and len(found) == suites:
                    verdicts[row["key"]] = found
    return verdicts, not line.endswith(b"\n")


def verdict_keys(
    dataset: str, problems: Sequence[BenchmarkProblem], samples: Sequence[ProgramSample], *limits: object
) -> list[str]:
    """Return a hash of all that determines each sample's verdict.

    Args:
        limits: whatever else does; its ``repr`` counts.
    """
    common = [dataset, _judging_code(), platform.python_version(), installed_version("evalplus") or "", repr(limits)]
    by_task = {problem.task_id: _digest([common, problem.record]) for problem in problems}
    return [_digest([by_task[sample.task_id], sample.number, sample.code]) for sample in samples]


def _digest(value: Any) -> str:
    # JSON escapes what is no valid Unicode.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _judging_code() -> str:
    """Return a hash of the modules that judge: what an earlier version found is not taken over."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *(here.parent / "sandbox").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def as_row(verdicts: Verdicts) -> list[dict[str, str]]:
    """Return verdicts as JSON holds them."""
    return [asdict(verdict) for verdict in verdicts]


def from_row(row: Any) -> Verdicts:
    """Return the verdicts of ``as_row``.

    Raises:
        ValueError: when ``row`` is something else.
    """
    names = {field.name for field in fields(SuiteVerdict)}
    if not isinstance(row, list) or not 1 <= len(row) <= len(SUITES):
        raise ValueError("expected a list of verdicts")
    for item in row:
        if not isinstance(item, dict) or item.keys() != names or not all(isinstance(v, str) for v in item.values()):
            raise ValueError(f"expected a verdict with the texts {', '.join(sorted(names))}")
        if item["status"] not in STATUSES or item["longer"] not in ("", *STATUSES):
            raise ValueError(f"expected a status of {', '.join(STATUSES)}")
    return tuple(SuiteVerdict(**item) for item in row)
