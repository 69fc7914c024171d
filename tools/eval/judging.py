"""Samples come in, their verdicts go out and are kept one by one, judged by as many threads as are asked for.

Whatever judges runs programs in processes of their own, so that threads are enough. A sample fails only itself: when
judging it raises while the sandbox still works, that sample has failed, and all others keep their verdicts. Ctrl-C and
SIGTERM end what runs, and the same command resumes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import TypeVar

from reflectron.engine.terminal import console
from reflectron.engine.text import one_line
from reflectron.tools.eval.samples import Sample, unfit
from reflectron.tools.eval.verdict import Verdict, Verdicts
from reflectron.tools.eval.verdict_file import VerdictFile
from reflectron.tools.sandbox import usage
from reflectron.tools.sandbox.home import home
from reflectron.tools.sandbox.process import Limits, SandboxKind, run_sandboxed, sandbox_folder

T = TypeVar("T")
R = TypeVar("R")

# What programs bring about in what reads from them and removes what they leave.
_OF_SAMPLES = (OSError, ValueError, EOFError, MemoryError, RecursionError)


def judge_samples(
    samples: Sequence[Sample],
    keys: Sequence[str],
    judge: Callable[[Sample], Verdicts],
    kept: VerdictFile,
    *,
    workers: int,
    kind: SandboxKind,
) -> list[Verdicts]:
    """Verdicts of all samples; those that ``kept`` holds are not judged again.

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
    """Say on stderr how many of ``tried`` samples could not be judged; raises the first error where it was ours."""
    if len(errors) == tried and not all(isinstance(error, _OF_SAMPLES) for error in errors):
        # A fault of ours, which must not look like a score.
        raise errors[0]
    print(f"{len(errors)} samples could not be judged and count as failed: {one_line(errors[0])}", file=sys.stderr)


@contextlib.contextmanager
def says_how_to_resume(keys: Sequence[str], kept: VerdictFile) -> Iterator[None]:
    """After Ctrl-C or SIGTERM say on stderr what is kept."""
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
    sample: Sample, judge: Callable[[Sample], Verdicts], suites: int, kind: SandboxKind
) -> tuple[Verdicts, Exception | None]:
    """A sample's verdicts, and why it could not be judged."""
    if reason := unfit(sample.code):
        return (Verdict("fail", got=reason),) * suites, None
    try:
        return judge(sample), None
    except Exception as error:
        # What a program can bring about is not to be listed; where nothing runs any longer it was not the sample.
        if not _sandbox_works(kind):
            raise
        return (Verdict("fail", got=f"could not be judged: {one_line(error)}"),) * suites, error


def _sandbox_works(kind: SandboxKind) -> bool:
    try:
        with sandbox_folder() as folder:
            return run_sandboxed(kind, ["true"], folder=folder, limits=Limits()).returncode == 0
    except OSError:
        return False


def in_threads(call: Callable[[T], R], items: Iterable[T], workers: int) -> Generator[R, None, None]:
    """Results of ``call`` as they come; on an error or a signal all that still runs is killed.

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
    """Whether a child leads a session of its own in a folder of ours; what removes such a folder leads none."""
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
    """How many samples are judged at once: ``workers``, or a core each as far as free memory has ``memory_bytes``."""
    import psutil

    affordable = min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // memory_bytes)
    return workers or max(affordable, 1)


def tracked(results: Iterable[T], total: int, what: str) -> Iterable[T]:
    """``results``, with a progress bar on a terminal."""
    from rich.progress import track

    return track(
        results,
        description=what,
        total=total,
        console=console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
