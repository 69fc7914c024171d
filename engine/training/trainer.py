"""A whole run on one rank: build, train step by step, save, validate, export.

``Trainer.steps`` is a generator of one ``StepMetrics`` a step, so that whoever runs it decides what is shown and
written. A run that was stopped goes on from its latest checkpoint as if it never had been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from reflectron.engine.checkpoint.checkpointer import Checkpointer, ResumePoint, find_resume_point, parallel_layout
from reflectron.engine.checkpoint.manifest import SkippedSteps
from reflectron.engine.checkpoint.retention import checkpoints_folder
from reflectron.engine.checkpoint.storage import load
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import SampleId, StoreSource
from reflectron.engine.data.global_batch import GlobalBatch, GlobalBatches
from reflectron.engine.job_lock import JobLock, LockLost
from reflectron.engine.model.backends.choose import Backends, choose_on_every_rank
from reflectron.engine.model.parallelize import gather_parameters, parallelize
from reflectron.engine.optim.optimizer import build_optimizer, learning_rate, shards_optimizer
from reflectron.engine.parallel.process_groups import ParallelGroups, error_on_main, from_main
from reflectron.engine.training.build import load_model
from reflectron.engine.training.diagnostics import Finding, find_nonfinite
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.training.metrics import StepMetrics, peak_memory_gib
from reflectron.engine.training.run import (
    RunInputs,
    mark_finished,
    run_identity,
    run_length,
    sample_order,
    start_over,
    stop_on_signals,
)
from reflectron.engine.training.step import LossTerms, StepResult, train_step, validate
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
    """What computes the run."""
    resumed: ResumePoint | None
    """Where the run goes on; None at its beginning."""
    stopped: bool
    """Whether a signal ended ``steps`` before the run's end."""
    skipped: SkippedSteps
    """Steps so far whose update was skipped."""
    findings: list[Finding]
    """Where the last step's loss or gradient were not finite; empty when it was not skipped."""

    def __init__(self, config: Config, inputs: RunInputs, groups: ParallelGroups, lock: JobLock | None = None) -> None:
        if inputs.train is None:
            raise ValueError("data.train is empty, expected at least one file")
        self.config, self.inputs, self.groups, self.lock = config, inputs, groups, lock
        groups.progress.enter("building the model", slow=True)
        self.arch = inputs.model.arch
        self.identity = json.loads(from_main(json.dumps(run_identity(config, inputs)) if groups.is_main else ""))
        self.backends = choose_on_every_rank(config, self.arch, groups.device)
        self.resumed = self._find_resume_point()
        order = sample_order(inputs.train, config.data.train, config.seed)
        self.total_steps, epochs = run_length(config, order)
        self._check_space()
        self.stopped = False
        self.skipped = self.resumed.manifest.skipped if self.resumed is not None else SkippedSteps()
        self.findings = []
        dtype = getattr(torch, config.model.dtype)
        self.chunks = load_model(config, inputs.model, groups, dtype, self.backends, self.resumed is None)
        shard = shards_optimizer(config.optimizer, config.parallel.distributed_optimizer)
        self.wrapped = parallelize(self.chunks, config.parallel, shard)
        self.optimizer = build_optimizer(
            config.optimizer, self.wrapped, self.chunks, self.arch, groups, shard, self.backends.adamw
        )
        self.state = TrainingState(self.chunks, self.optimizer, self.arch, groups)
        if self.resumed is not None:
            manifest = self.resumed.manifest
            same_layout = manifest.layout == parallel_layout(groups, len(self.chunks))
            updates = manifest.step - manifest.skipped.total
            load(self.state, self.resumed.folder, updates=updates, same_layout=same_layout)
        shape, parallel = decoder_shape(self.arch, config), config.parallel
        self.cost = training_cost(shape, parallel.recompute, parallel.recompute_modules)
        self.batches = GlobalBatches(
            StoreSource(inputs.train, order, config, total_steps=self.total_steps, epochs=epochs),
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
        follow each other; ``may_go_on`` is false after one more, and the run ends there unsaved. SIGTERM or SIGUSR1 to
        any rank ends it after a step and a save; ``stopped`` tells.

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
                if not self.may_go_on:
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
            result = train_step(self.wrapped, self.optimizer, self.groups, batch, rate)
            self.findings = []
            if result.skipped:
                self.groups.progress.enter("looking for what is not finite", slow=True)
                self.findings = find_nonfinite(self.chunks, self.wrapped, self.groups, batch)
            self.skipped = _counted(self.skipped, result.skipped)
            seconds = time.perf_counter() - started
            row = step_metrics(step, batch, result, rate, seconds, waited, peak_memory_gib(self.groups))
            self.groups.progress.enter("recording the step")
            yield row

    @property
    def may_go_on(self) -> bool:
        """Whether no more steps in a row were skipped than may be."""
        return self.skipped.in_a_row <= self.config.train.max_skipped_steps

    def sample_ids(self, step: int) -> list[SampleId]:
        """The samples that the step of 1-based number ``step`` trained on."""
        return self.batches.source.sample_ids(step - 1)

    def _lost_lock(self) -> str:
        """On the main rank, who has taken the folder over; empty when nobody has."""
        try:
            if self.lock is not None:
                self.lock.check()
        except LockLost as error:
            return str(error)
        return ""

    def _check_space(self) -> None:
        """See that what must be written to the end of the run fits: one checkpoint and the export."""
        dtype = getattr(torch, self.config.model.dtype)
        needed = {"the export": export_bytes(self.arch, dtype)}
        if self.first_step < self.total_steps:
            needed = {"a checkpoint": checkpoint_bytes(self.config, self.arch), **needed}
        if error := error_on_main(lambda: lack_of_space(Path(self.config.output_dir), needed)):
            raise ValueError(error)

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Each flag, whether it is set on any rank."""
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

    def validate(self) -> LossTerms:
        """Loss terms on the validation files; every rank calls it.

        Raises:
            ValueError: when there are no validation files.
        """
        if self.inputs.validation is None:
            raise ValueError("data.validation is empty, expected at least one file")
        self.groups.progress.enter("validating", slow=True)
        return validate(self.wrapped, self.inputs.validation, self.config, self.cost, self.groups)

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint, complete or not at all; every rank calls it.

        Raises:
            OSError: on every rank alike, when it cannot be written.
        """
        self.groups.progress.enter("exporting", slow=True)
        gather_parameters(self.wrapped)
        export_checkpoint(self.chunks, self.inputs.model, self.groups, folder)

    def mark_finished(self) -> None:
        """Note that nothing is left to do, so that the same command does not train again."""
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
    """The row of a step, from 0-based ``step``, its data and its result."""
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
