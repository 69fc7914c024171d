"""A run's configuration, a model, a machine and a step's samples in; out come the seconds of that step and the bytes of
its fullest rank.

For whoever has measured a step and wants to see it beside its prediction; ``search.Planner`` predicts whole runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from reflectron.engine.config import Config, ParallelConfig
from reflectron.engine.data.views import SampleViews
from reflectron.engine.model.architecture import Architecture, check_parallel, layers_per_stage
from reflectron.tools.planner.backends import planned_backends
from reflectron.tools.planner.hardware import Cluster
from reflectron.tools.planner.memory import RankMemory, rank_memory, stages_of
from reflectron.tools.planner.samples import Batch
from reflectron.tools.planner.speed import Load, StepTime, pack_load, step_time


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One optimizer step."""

    load: Load
    """Its packs."""
    time: StepTime
    memory: RankMemory
    """Of the rank that holds the most."""

    @property
    def step_seconds(self) -> float:
        """From its first forward to its update."""
        return self.time.total

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what takes them; their sum is ``step_seconds``."""
        return dict(vars(self.time))


def batch_of_views(views: Iterable[SampleViews]) -> Batch:
    """The lengths of a global batch."""
    listed = list(views)
    return Batch(
        teacher=np.array([len(v.input_ids) for v in listed], np.int64),
        student=np.array([len(v.student_positions) for v in listed], np.int64),
        rows=np.array([v.logit_rows for v in listed], np.int64),
        reflection=np.array([not v.is_generation for v in listed], bool),
    )


def predict(config: Config, arch: Architecture, machine: Cluster, batch: Batch | Load) -> Prediction:
    """The step of ``config`` that trains on ``batch``: its samples' lengths, or packs planned before.

    Raises:
        ValueError: when the engine refuses the layout, it does not fill ``machine``, or a sample exceeds the budget.
    """
    parallel = config.parallel
    check_parallel(arch, parallel)
    layers_per_stage(arch.num_layers, parallel)
    replicas, backends = replicas_of(parallel, machine.gpus), planned_backends(config, machine)
    load = pack_load(arch, config, batch, replicas) if isinstance(batch, Batch) else batch
    memory = max(
        (
            rank_memory(
                arch,
                config,
                backends,
                stage,
                replicas=replicas,
                microbatches=load.microbatches,
                sequence_length=load.sequence_length,
                rows=load.rows,
            )
            for stage in stages_of(arch, parallel)
        ),
        key=lambda one: one.total,
    )
    return Prediction(load=load, time=step_time(arch, config, machine, load, replicas), memory=memory)


def replicas_of(parallel: ParallelConfig, gpus: int) -> int:
    """Data-parallel size of a layout that fills all GPUs.

    Raises:
        ValueError: when it cannot.
    """
    replica = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    replicas, rest = divmod(gpus, replica)
    if rest or parallel.data_parallel_size not in (None, replicas):
        raise ValueError(
            f"--gpus is {gpus}, expected {replica} (tensor x pipeline x context parallel ranks) times "
            f"{parallel.data_parallel_size or 'any number'} (parallel.data_parallel_size)"
        )
    return replicas
