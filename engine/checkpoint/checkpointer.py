"""Saves the state of a training run, and finds the checkpoint to resume from; every rank calls every method.

A checkpoint is written aside, listed in its manifest, renamed into place and only then the latest. What goes wrong on
any rank is known to all of them and ends that save, never the training.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult

from reflectron.engine.checkpoint.folder import (
    DamagedCheckpoint,
    FileDigest,
    Manifest,
    SkippedSteps,
    check_file,
    check_same_run,
    checkpoints_folder,
    commit,
    digest_file,
    partial_folder,
    read_manifest,
    remove_partial,
    remove_surplus,
    step_folder,
    steps_to_try,
    write_manifest,
)
from reflectron.engine.checkpoint.storage import PlannedSave, plan_save
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import Config
from reflectron.engine.files import free_bytes, gib, sync
from reflectron.engine.job_lock import JobLock
from reflectron.engine.parallel.process_groups import WRITE_ERRORS, ParallelGroups, error_on_main, file_error, from_main
from reflectron.engine.weights.hf_folder import with_framing

_PACKAGES = ("reflectron", "torch", "megatron-core", "transformers", "numpy")


@dataclass
class _Save:
    """A checkpoint on its way to disk, as one rank sees it."""

    step: int
    skipped: SkippedSteps
    planned: PlannedSave
    started: float
    results: list[WriteResult] = field(default_factory=list)
    digests: dict[str, FileDigest] = field(default_factory=dict)
    """Digests of the files that this rank has written."""
    error: str = ""
    """Why it could not."""
    thread: threading.Thread | None = None
    """Writes in the background."""

    def write(self) -> None:
        try:
            self.results = self.planned.write()
            names = {result.storage_data.relative_path for result in self.results}
            self.digests = {name: digest_file(self.planned.folder / name) for name in names}
        except WRITE_ERRORS as failure:
            self.error = file_error(failure)


class Checkpointer:
    """Writes and keeps checkpoints as ``config.checkpoint`` says.

    Args:
        config: the run.
        state: what is saved.
        identity: what determines the run.
        backends: what computes it, noted in every checkpoint.
        report: told a line about every save, on every rank alike.
        lock: on the main rank, of ``output_dir``; None where nobody else can write there.
    """

    def __init__(
        self,
        config: Config,
        state: TrainingState,
        identity: dict[str, Any],
        backends: dict[str, str],
        report: Callable[[str], None],
        lock: JobLock | None = None,
    ) -> None:
        self.config, self.state, self.identity, self.backends, self.report = config, state, identity, backends, report
        self.lock = lock
        self.root = checkpoints_folder(config.output_dir)
        self._saving: _Save | None = None

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint belongs after ``step`` updates."""
        every = self.config.checkpoint.save_every
        return bool(every) and step % every == 0

    def save(self, step: int, skipped: SkippedSteps) -> None:
        """Save the state after ``step`` steps; with ``checkpoint.asynchronous`` only begin to."""
        self.wait()
        asynchronous = self.config.checkpoint.asynchronous
        # The name is random.
        folder = Path(from_main(str(partial_folder(self.root, step))))
        planned = plan_save(self.state, folder, copy=asynchronous)
        if error := self._make_room(planned):
            self._report_failure(step, error)
            return
        self._saving = _Save(step, skipped, planned, time.perf_counter())
        if asynchronous:
            # A daemon: a training that fails does not wait for it.
            self._saving.thread = threading.Thread(target=self._saving.write, daemon=True, name="checkpoint")
            self._saving.thread.start()
        else:
            self._saving.write()
            self._finish()

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes in the background."""
        return self._saving is not None and self._saving.thread is not None and self._saving.thread.is_alive()

    def finish_written(self, any_writing: bool) -> None:
        """Make a checkpoint complete once no rank writes any more.

        Args:
            any_writing: whether ``is_writing`` holds on any rank.
        """
        if self._saving is not None and not any_writing:
            self._finish()

    def wait(self) -> None:
        """Wait for a checkpoint that is being written, and make it complete."""
        if self._saving is not None:
            assert self._saving.thread is not None, "a synchronous save is finished where it began"
            self._saving.thread.join()
            self._finish()

    def _make_room(self, planned: PlannedSave) -> str:
        """Make the folder if there is space for all; the error of the main rank otherwise, on every rank."""
        size = torch.tensor(planned.bytes, dtype=torch.int64, device=self.state.groups.device)
        dist.all_reduce(size)
        needed = with_framing(int(size.item()))

        def make() -> str:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_partial(self.root)
            free = free_bytes(self.root)
            if needed > free:
                return f"it needs {gib(needed)}, and {gib(free)} are free on the disk of {self.root}"
            planned.folder.mkdir()
            return ""

        return error_on_main(make)

    def _finish(self) -> None:
        """Commit what all ranks have written, or remove it."""
        assert self._saving is not None
        save, self._saving = self._saving, None
        outcomes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((save.results, save.digests, save.error), outcomes)

        def end() -> str:
            assert outcomes is not None
            failed = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(outcomes) if error]
            if failed:
                return failed[0]
            self._commit(save, [results for results, _, _ in outcomes], [digests for _, digests, _ in outcomes])
            return ""

        if error := error_on_main(end):
            if dist.get_rank() == 0:
                remove_partial(self.root)
            self._report_failure(save.step, error)
        else:
            seconds = time.perf_counter() - save.started
            self.report(f"checkpoint  {step_folder(self.root, save.step)} ({seconds:.1f} s)")

    def _commit(self, save: _Save, results: list[list[WriteResult]], digests: list[dict[str, FileDigest]]) -> None:
        """Write index and manifest, rename, set ``latest``, remove what need not be kept; on the main rank."""
        folder = save.planned.folder
        save.planned.write_index(results)
        files = {name: digest for mapping in digests for name, digest in mapping.items()}
        for path in folder.iterdir():
            if path.name not in files:
                sync(path)
                files[path.name] = digest_file(path)
        write_manifest(
            folder,
            Manifest(
                step=save.step,
                run=self.identity,
                layout=parallel_layout(self.state.groups, len(self.state.chunks)),
                config=dataclasses.asdict(self.config),
                versions=_versions(),
                files=dict(sorted(files.items())),
                skipped=save.skipped,
                backends=self.backends,
            ),
        )
        if self.lock is not None:
            # Saving takes minutes, in which this job may have been suspended.
            self.lock.check()
        commit(self.root, save.step, folder)
        keep = self.config.checkpoint
        remove_surplus(self.root, save.step, keep.keep_last, keep.keep_every)

    def _report_failure(self, step: int, error: str) -> None:
        self.report(f"the checkpoint of step {step} could not be written, training continues: {error}")


@dataclass(frozen=True)
class ResumePoint:
    """Where a run resumes."""

    folder: Path
    """An intact checkpoint."""
    manifest: Manifest
    """Its manifest."""
    damaged: tuple[str, ...]
    """What is wrong with ``latest`` and with the newer ones, a line each."""


def find_resume_point(root: Path, identity: dict[str, Any]) -> ResumePoint | None:
    """Return the newest intact checkpoint up to ``latest``; each rank reads its share of the files.

    Args:
        root: the run's checkpoints.
        identity: of the run that resumes.

    Returns:
        None when there is no checkpoint.

    Raises:
        ValueError: when all are damaged, naming the files, or when they are another run's.
    """
    # One rank looks: a shared file system may show each machine another state of a folder.
    candidates = from_main(steps_to_try(root) if dist.get_rank() == 0 else None)
    assert candidates is not None
    notes = [candidates.note] if candidates.note else []
    damaged: list[str] = []
    for step in candidates.steps:
        folder = step_folder(root, step)
        found = _read_intact(folder)
        if isinstance(found, Manifest):
            check_same_run(found.run, identity, folder)
            used = [f"{line}; the checkpoint before it is used" for line in damaged]
            return ResumePoint(folder, found, (*notes, *used))
        damaged.append(found)
    if damaged:
        raise ValueError(
            f"{root} holds no intact checkpoint ({'; '.join(damaged)}): restore a file that is named, or start over "
            "with checkpoint.resume=never"
        )
    return None


def _read_intact(folder: Path) -> Manifest | str:
    """Return the manifest when all files are as it says, else what is wrong; the same on all ranks."""
    manifest, error = None, ""
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
            check_file(folder / name, manifest.files[name])
    except (DamagedCheckpoint, OSError) as failure:
        error = str(failure)
    errors = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first is not None:
        return first
    assert manifest is not None, "a rank without an error has read the manifest"
    return manifest


def parallel_layout(groups: ParallelGroups, chunks: int) -> dict[str, int]:
    """Return the sizes that place a rank's tensors; ``chunks`` is how many the interleaved pipeline gives each
    stage."""
    return {
        "tensor_model_parallel_size": groups.tp.size(),
        "pipeline_model_parallel_size": groups.pp.size(),
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": groups.cp.size(),
        "data_parallel_size": groups.dp.size(),
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
