"""A whole run on one rank: build, train step by step, save, validate, export.

``Trainer.steps`` is a generator of one ``StepMetrics`` a step, so that whoever runs it decides what is shown and
written. A run that was stopped resumes from its latest checkpoint as if it had never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from reflectron.engine.checkpoint.checkpointer import Checkpointer, ResumePoint, find_resume_point, parallel_layout
from reflectron.engine.checkpoint.folder import SkippedSteps, checkpoints_folder
from reflectron.engine.checkpoint.storage import load
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import SampleId
from reflectron.engine.data.global_batch import GlobalBatch, GlobalBatches
from reflectron.engine.job_lock import JobLock, LockLost
from reflectron.engine.model.backends.choose import Backends, choose_on_every_rank
from reflectron.engine.model.parallelize import gather_parameters
from reflectron.engine.optim.optimizer import learning_rate
from reflectron.engine.parallel.process_groups import ParallelGroups, error_on_main, from_main
from reflectron.engine.training.build import build_model, weight_source
from reflectron.engine.training.diagnostics import NonfiniteFinding, find_nonfinite
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.training.metrics import StepMetrics, peak_memory_gib
from reflectron.engine.training.run import (
    RunInputs,
    held_out_samples,
    mark_finished,
    run_identity,
    start_over,
    stop_on_signals,
    training_source,
)
from reflectron.engine.training.step import StepResult, train_step, validate
from reflectron.engine.training.terms import MeanTerms
from reflectron.engine.weights.hf_folder import checkpoint_bytes, export_bytes, lack_of_space
from reflectron.engine.weights.writers import export_checkpoint


class Trainer:
    """One training run, as seen by one rank.

    Args:
        config: the run.
        inputs: model and data, as ``open_run_inputs`` returns them.
        groups: this rank's process groups.
        lock: on the main rank, of ``output_dir``; None where nobody else can write there.

    Raises:
        ValueError: when there are no training files, ``output_dir`` holds another run or only damaged checkpoints, has
            no space for what the run must write, or a backend cannot do what it is asked for.
    """

    backends: Backends
    """The implementations that compute the run."""
    resumed: ResumePoint | None
    """The checkpoint that the run resumes from; None at its beginning."""
    stopped: bool
    """Whether a signal ended ``steps`` before the run's end."""
    skipped: SkippedSteps
    """Steps so far whose update was skipped."""
    findings: list[NonfiniteFinding]
    """The numbers of the last step that were not finite; empty when it was not skipped."""

    def __init__(self, config: Config, inputs: RunInputs, groups: ParallelGroups, lock: JobLock | None = None) -> None:
        source = training_source(config, inputs)
        self.config, self.inputs, self.groups, self.lock = config, inputs, groups, lock
        groups.progress.enter("building the model", slow=True)
        self.arch, self.total_steps = inputs.model.arch, source.total_steps
        self.identity = json.loads(from_main(json.dumps(run_identity(config, inputs)) if groups.is_main else ""))
        self.backends = choose_on_every_rank(config, self.arch, groups.device)
        self.resumed = self._find_resume_point()
        self._check_space()
        self.stopped = False
        self.skipped = self.resumed.manifest.skipped if self.resumed is not None else SkippedSteps()
        self.findings = []
        weights = weight_source(config, inputs.model) if self.resumed is None else None
        self.model = build_model(config, self.arch, groups, weights, self.backends)
        self.state = TrainingState(self.model.chunks, self.model.optimizer, self.arch, groups)
        if self.resumed is not None:
            self._load(self.resumed)
        shape, parallel = decoder_shape(self.arch, config), config.parallel
        self.cost = training_cost(shape, parallel.recompute, parallel.recompute_modules)
        self.batches = GlobalBatches(
            source,
            config,
            self.cost,
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=groups.dp.size(),
            context_parallel_rank=groups.cp.rank(),
            context_parallel_size=groups.cp.size(),
        )

    @property
    def first_step(self) -> int:
        """Steps done before this process began."""
        return self.resumed.manifest.step if self.resumed is not None else 0

    def steps(self, report: Callable[[str], None]) -> Iterator[StepMetrics]:
        """Train; yields after every step, on every rank alike, and saves when the row has been taken.

        The last step is saved in any case, so that a failure of the export loses none. A step whose loss or gradient
        are not finite changes nothing but the position in data and schedules. ``train.max_skipped_steps`` of them may
        follow each other; ``may_continue`` is false after one more, and the run ends there unsaved. SIGTERM or SIGUSR1
        to any rank ends it after a step and a save; ``stopped`` tells.

        Args:
            report: told a line about every save.

        Raises:
            ValueError: when another job has taken over the folder.
        """
        checkpointer = Checkpointer(self.config, self.state, self.identity, self.backends.names, report, self.lock)
        with stop_on_signals() as request:
            for step in self._train():
                yield step
                self.groups.progress.enter("end of the step")
                if not self.may_continue:
                    break
                lost = self._lost_lock()
                # All ranks stop and finish checkpoints together, or none does.
                self.stopped, any_writing, any_lost = self._any_rank(
                    request.received, checkpointer.is_writing, bool(lost)
                )
                if any_lost:
                    raise LockLost(lost or "the main rank says who holds the lock of output_dir now")
                checkpointer.finish_written(any_writing)
                if self.stopped or checkpointer.is_due(step.step) or step.step == self.total_steps:
                    self.groups.progress.enter("saving a checkpoint", slow=True)
                    checkpointer.save(step.step, self.skipped)
                if self.stopped:
                    break
            self.groups.progress.enter("finishing checkpoints", slow=True)
            checkpointer.wait()

    def _train(self) -> Iterator[StepMetrics]:
        batches = self.batches.from_step(self.first_step, self.groups.device)
        for step in range(self.first_step, self.total_steps):
            started = time.perf_counter()
            # A first step compiles kernels and connects ranks.
            first = step == self.first_step
            self.groups.progress.enter("waiting for data", step + 1, slow=first)
            batch = next(batches)
            waited = time.perf_counter() - started
            self.groups.progress.enter("training", slow=first)
            rate = learning_rate(step, self.total_steps, self.config.optimizer.learning_rate, self.config.lr_schedule)
            result = train_step(self.model.wrapped, self.model.optimizer, self.groups, batch, rate)
            self.findings = []
            if result.skipped:
                self.groups.progress.enter("looking for what is not finite", slow=True)
                self.findings = find_nonfinite(self.model.chunks, self.model.wrapped, self.groups, batch)
            self.skipped = _counted(self.skipped, result.skipped)
            seconds = time.perf_counter() - started
            row = step_metrics(step, batch, result, rate, seconds, waited, peak_memory_gib(self.groups))
            self.groups.progress.enter("recording the step")
            yield row

    @property
    def may_continue(self) -> bool:
        """Whether no more steps in a row were skipped than ``train.max_skipped_steps`` allows."""
        return self.skipped.in_a_row <= self.config.train.max_skipped_steps

    def sample_ids(self, step: int) -> list[SampleId]:
        """Return the samples that the step of 1-based number ``step`` trained on."""
        return self.batches.source.sample_ids(step - 1)

    def _lost_lock(self) -> str:
        """Return, on the main rank, who has taken the folder over; empty when nobody has."""
        try:
            if self.lock is not None:
                self.lock.check()
        except LockLost as error:
            return str(error)
        return ""

    def _check_space(self) -> None:
        """Check that the disk holds what must be written to the end of the run: one checkpoint and the export."""
        dtype = getattr(torch, self.config.model.dtype)
        needed = {"the export": export_bytes(self.arch, dtype)}
        if self.first_step < self.total_steps:
            needed = {"a checkpoint": checkpoint_bytes(self.config, self.arch), **needed}
        if error := error_on_main(lambda: lack_of_space(Path(self.config.output_dir), needed)):
            raise ValueError(error)

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        total = torch.tensor(flags, dtype=torch.int32, device="cpu")
        dist.all_reduce(total, group=self.groups.hosts)
        return [bool(count) for count in total.tolist()]

    def _find_resume_point(self) -> ResumePoint | None:
        found = None
        if self.config.checkpoint.resume == "auto":
            found = find_resume_point(checkpoints_folder(self.config.output_dir), self.identity)
        if found is None and self.groups.is_main:
            start_over(self.config)
        return found

    def _load(self, point: ResumePoint) -> None:
        manifest = point.manifest
        same_layout = manifest.layout == parallel_layout(self.groups, len(self.model.chunks))
        updates = manifest.step - manifest.skipped.total
        load(self.state, point.folder, updates=updates, same_layout=same_layout)

    def validate(self) -> MeanTerms:
        """Return the loss terms on the validation files; every rank calls it.

        Raises:
            ValueError: when there are no validation files.
        """
        self.groups.progress.enter("validating", slow=True)
        samples = held_out_samples(self.config, self.inputs)
        return validate(self.model.wrapped, samples, self.config, self.cost, self.groups)

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint, complete or not at all; every rank calls it.

        Raises:
            OSError: on every rank alike, when it cannot be written.
        """
        self.groups.progress.enter("exporting", slow=True)
        gather_parameters(self.model.wrapped)
        export_checkpoint(self.model.chunks, self.inputs.model, self.groups, folder)

    def mark_finished(self) -> None:
        """Record that nothing is left to do, so that the same command does not train again."""
        if self.groups.is_main:
            mark_finished(self.config, self.identity, self.total_steps)


def _counted(before: SkippedSteps, skipped: bool) -> SkippedSteps:
    return SkippedSteps(before.total + skipped, before.in_a_row + 1 if skipped else 0)


def step_metrics(
    step: int,
    batch: GlobalBatch,
    result: StepResult,
    rate: float,
    seconds: float,
    waited_seconds: float,
    memory_gib: float,
) -> StepMetrics:
    """Return the row of a step, from 0-based ``step``, its data and its result."""
    return StepMetrics(
        step=step + 1,
        **vars(result.terms),
        mask_rate=batch.mask_rate,
        learning_rate=rate,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        tokens_teacher=batch.tokens.teacher,
        tokens_student=batch.tokens.student,
        tokens_generation=batch.tokens.generation,
        tokens_saved=batch.tokens.saved,
        pack_fill=batch.fill,
        step_time_ms=seconds * 1e3,
        data_wait_ms=waited_seconds * 1e3,
        tokens_per_second=batch.tokens.total / seconds,
        peak_memory_gib=memory_gib,
    )
