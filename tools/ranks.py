"""Run a function as every rank of a job: as a rank that a launcher started, or in processes that this one starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from reflectron.engine.config import Config, ParallelConfig
from reflectron.engine.files import printable, remove_temporaries
from reflectron.engine.job_lock import LOCK_NAME, JobLock, inherited_lock, lock_folder
from reflectron.engine.parallel.launch import resolve_environment, spawn_local

if TYPE_CHECKING:
    from reflectron.engine.parallel.process_groups import ParallelGroups
    from reflectron.engine.training.run import RunInputs

RankBody = Callable[[Config, "RunInputs", "ParallelGroups"], int]
NothingToDo = Callable[[Config, "RunInputs"], str | None]


@contextmanager
def only_job(config: Config) -> Iterator[JobLock | None]:
    """Hold the lock of ``output_dir``: in the command that starts ranks, and in rank 0; None in the other ranks.

    Raises:
        ValueError: when another job holds it.
    """
    place = resolve_environment(os.environ)
    if place is not None and place.rank > 0:
        yield None
        return
    folder = Path(config.output_dir)
    inherited = inherited_lock(folder / LOCK_NAME)
    with inherited or lock_folder(folder, "output_dir") as lock:
        if inherited is None:
            remove_temporaries(folder)
        known = {name: os.environ.get(name) for name in lock.variables()}
        os.environ.update(lock.variables())
        try:
            yield lock
        finally:
            for name, value in known.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def start_only_rank(parallel: ParallelConfig, seed: int) -> ParallelGroups:
    """Start the process groups of a job whose one rank is this process."""
    from reflectron.engine.parallel.process_groups import start_process_groups

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return start_process_groups(parallel, seed)


def run_as_ranks(config: Config, words: list[str], body: RankBody, nothing_to_do: NothingToDo | None = None) -> int:
    """Prepare the inputs once, then call ``body`` on every rank.

    Without a launcher, everything that can be wrong is found here, before any rank starts; the ranks then are this
    command again.

    Args:
        config: the run.
        words: command line after ``reflectron``, for ranks of our own.
        body: what a rank does, given the opened inputs and its process groups; returns the exit code.
        nothing_to_do: given the inputs, why no rank need start, or None.

    Returns:
        The exit code.
    """
    from reflectron.engine.training.run import prepare

    place = resolve_environment(os.environ)
    if place is None:
        inputs = prepare(config, progress=sys.stderr.isatty())
        if config.model.path:
            from reflectron.engine.weights.dist_reader import open_weights

            original = replace(inputs.model.arch, vocab_size=inputs.model.original_vocab_size)
            open_weights(config.model.path, original).open_all()
        _print_notes(inputs)
        for store in (inputs.train, inputs.validation):
            for summary in store.summaries if store is not None else ():
                print(summary, flush=True)
        _check_backends(config, inputs)
        if nothing_to_do is not None and (reason := nothing_to_do(config, inputs)):
            print(reason)
            return 0
        return _start_ranks(config, words)
    os.environ.update(place.variables())
    if place.rank == 0:
        _print_notes(prepare(config, progress=sys.stderr.isatty()))

    return _run_rank(config, body, nothing_to_do)


def _print_notes(inputs: RunInputs) -> None:
    for note in inputs.model.notes:
        print(printable(note, 1000), flush=True)


def _run_rank(config: Config, body: RankBody, nothing_to_do: NothingToDo | None) -> int:
    from reflectron.engine.parallel.judge import SLOW_PHASE_FACTOR, RankProgress, WatchdogLimits
    from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
    from reflectron.engine.parallel.watchdog import Watchdog
    from reflectron.engine.training.run import open_run_inputs

    hang_minutes = config.train.collective_timeout_minutes
    watchdog = Watchdog(
        RankProgress(),
        WatchdogLimits(hang_s=60 * hang_minutes, silence_s=config.train.heartbeat_timeout_seconds),
    )
    try:
        # The other ranks wait here for the main one, which may still be tokenising. The backends' own time limit says
        # less than the watchdog, so it comes later.
        groups = start_process_groups(config.parallel, config.seed, max(30, 2 * SLOW_PHASE_FACTOR * hang_minutes))
        groups = replace(groups, progress=watchdog.progress)
        inputs = open_run_inputs(config)
        reason = _look_on_main(config, inputs, nothing_to_do) if nothing_to_do is not None else None
        if reason:
            if groups.is_main:
                print(reason)
            code = 0
        else:
            code = body(config, inputs, groups)
        # Once no rank is watched any more, nobody can miss one that does not arrive.
        groups.progress.enter("leaving the job")
        groups.barrier()
    except Exception as error:
        watchdog.last_words(error)
    watchdog.stop()
    stop_process_groups()
    return code


def _look_on_main(config: Config, inputs: RunInputs, nothing_to_do: NothingToDo) -> str | None:
    """Return on every rank what ``nothing_to_do`` says on the main one: files are read once, and no rank disagrees."""
    import torch.distributed as dist

    from reflectron.engine.parallel.process_groups import from_main

    reason, mistake = None, ""
    if dist.get_rank() == 0:
        try:
            reason = nothing_to_do(config, inputs)
        except ValueError as error:
            mistake = str(error)
    reason, mistake = from_main((reason, mistake))
    if mistake:
        raise ValueError(mistake)
    return reason


def _check_backends(config: Config, inputs: RunInputs) -> None:
    """Reject what the CPU cannot do; on CUDA each rank tries kernels on its own device."""
    from reflectron.engine.parallel.process_groups import device_type

    if device_type(config.parallel) == "cpu":
        import torch

        from reflectron.engine.model.backends.choose import choose_backends

        choose_backends(config, inputs.model.arch, torch.device("cpu"))


def local_processes(parallel: ParallelConfig) -> int:
    """Return how many ranks to start on this machine: one per visible GPU, or on the CPU just enough for the model."""
    import torch

    from reflectron.engine.parallel.process_groups import check_world_size, device_type, processes_of_a_replica

    replica = processes_of_a_replica(parallel)
    if parallel.data_parallel_size is not None:
        return replica * parallel.data_parallel_size
    device = device_type(parallel)
    match device:
        case "cpu":
            return replica
        case "cuda":
            gpus = torch.cuda.device_count()
            check_world_size(parallel, gpus)
            return gpus
    assert_never(device)


def _start_ranks(config: Config, words: list[str]) -> int:
    processes = local_processes(config.parallel)
    return spawn_local(
        [sys.executable, "-m", "reflectron.tools.cli", *words],
        processes,
        threads_per_process=max((os.cpu_count() or 1) // processes, 1),
        log_dir=Path(config.output_dir) / "logs",
        silence_s=config.train.heartbeat_timeout_seconds,
    )
