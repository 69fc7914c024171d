"""Jobs over the chunks of a data file, in worker processes.

The chunks in flight are bounded, so a file is never read ahead whole, and results come in order and do not depend on
the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

from reflectron.engine.data.sources import RecordChunk
from reflectron.engine.terminal import protect_streams

Result = TypeVar("Result")

# So few chunks are done before worker processes would have started.
_CHUNKS_WITHOUT_WORKERS = 4


def map_chunks(
    job: Callable[[RecordChunk], Result], chunks: Iterator[RecordChunk], workers: int
) -> Iterator[tuple[RecordChunk, Result]]:
    """Apply ``job``, which is pickled once for each worker, to every chunk.

    Args:
        workers: processes; 0 means one per core. With 1, or for a few chunks, this process does the work.
    """
    workers = workers or usable_cores()
    first = list(islice(chunks, _CHUNKS_WITHOUT_WORKERS + 1))
    chunks = chain(first, chunks)
    if workers == 1 or len(first) <= _CHUNKS_WITHOUT_WORKERS:
        yield from ((chunk, job(chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    try:
        pending: deque[tuple[RecordChunk, Future[Any]]] = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit(_work, chunk)))
            if len(pending) >= 4 * workers:
                yield _finished(pending)
        while pending:
            yield _finished(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(pending: deque[tuple[RecordChunk, Future[Any]]]) -> tuple[RecordChunk, Any]:
    chunk, future = pending.popleft()
    return chunk, future.result()


_worker_job: Callable[[RecordChunk], Any]


def _start_worker(job: Callable[[RecordChunk], Any]) -> None:
    global _worker_job
    _worker_job = job
    protect_streams()
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed cannot stop its workers.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: RecordChunk) -> Any:
    return _worker_job(chunk)
