"""Predictions of one step, of a whole run, and of every layout of a cluster that fits.

``predict_step`` is for one step that was or will be measured; a ``Planner`` predicts runs and searches for layouts.
Every candidate is a ``Config`` of its own, so it passes all of the engine's checks before anything is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from reflectron.engine.config import Config, ParallelConfig
from reflectron.engine.data.packing import microbatch_multiple, packing_sizes
from reflectron.engine.data.views import SampleViews
from reflectron.engine.model.architecture import Architecture, check_parallel, layers_per_stage
from reflectron.tools.planner.hardware import Cluster, planned_backends
from reflectron.tools.planner.memory import (
    FULLEST,
    GIB,
    RankMemory,
    element_bytes,
    layer_parameters,
    rank_memory,
    stages_of,
    vocabulary_parameters,
)
from reflectron.tools.planner.samples import (
    PHASES,
    BatchLengths,
    SampleLengths,
    StepLoad,
    over_phases,
    pack_load,
    typical_batch,
)
from reflectron.tools.planner.speed import StepTime, step_time


@dataclass(frozen=True, kw_only=True)
class StepPrediction:
    """What one optimizer step is predicted to take."""

    load: StepLoad
    """Its packs."""
    time: StepTime
    memory: RankMemory
    """Memory of the rank that holds the most."""

    @property
    def step_seconds(self) -> float:
        """Seconds from its first forward to its update."""
        return self.time.total

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what takes them; their sum is ``step_seconds``."""
        return dict(vars(self.time))


def batch_of_views(views: Iterable[SampleViews]) -> BatchLengths:
    """Return the lengths of a global batch."""
    listed = list(views)
    return BatchLengths(
        teacher=np.array([len(v.input_ids) for v in listed], np.int64),
        student=np.array([len(v.student_positions) for v in listed], np.int64),
        rows=np.array([v.logit_rows for v in listed], np.int64),
        reflection=np.array([not v.is_generation for v in listed], bool),
    )


def predict_step(
    config: Config, arch: Architecture, machine: Cluster, batch: BatchLengths | StepLoad
) -> StepPrediction:
    """Predict the step of ``config`` that trains on ``batch``: its samples' lengths, or packs planned before.

    Raises:
        ValueError: when the engine rejects the layout, it does not fill ``machine``, or a sample exceeds the budget.
    """
    parallel = config.parallel
    check_parallel(arch, parallel)
    layers_per_stage(arch.num_layers, parallel)
    replicas, backends = replicas_of(parallel, machine.gpus), planned_backends(config, machine)
    load = pack_load(arch, config, batch, replicas) if isinstance(batch, BatchLengths) else batch
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
    return StepPrediction(load=load, time=step_time(arch, config, machine, load, replicas), memory=memory)


def fitting_layers(
    whole: Architecture,
    config: Config,
    cluster: Cluster,
    batch: BatchLengths,
    device_bytes: float,
    baseline: bool,
) -> int:
    """Return the most layers of a model with which it fits a device, and with ``baseline`` transformers' beside it.

    Raises:
        ValueError: when not even one layer a stage does.
    """
    stages = config.parallel.pipeline_model_parallel_size * config.parallel.virtual_pipeline_model_parallel_size
    for layers in range(whole.num_layers // stages * stages, 0, -stages):
        arch = replace(whole, num_layers=layers)
        needed = predict_step(config, arch, cluster, batch).memory.total
        needed += _baseline_bytes(arch, config) if baseline else 0
        if needed <= FULLEST * device_bytes:
            return layers
    raise ValueError(f"--layers is auto, but {stages} layers of width {whole.hidden_size} do not fit; raise --gpus")


def _baseline_bytes(arch: Architecture, config: Config) -> int:
    """Count what transformers' model keeps between its steps: parameters and both moments, in the model's type."""
    parameters = arch.num_layers * layer_parameters(arch, 1) + 2 * vocabulary_parameters(arch, config)
    return 3 * element_bytes(config) * parameters


def replicas_of(parallel: ParallelConfig, gpus: int) -> int:
    """Return the data-parallel size of a layout that fills all GPUs.

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


_POWERS = (1, 2, 4, 8, 16, 32, 64)
_CHUNKS = (1, 2, 3, 4)
_BUDGETS = (1.0, 1.5, 2.0, 3.0)
_RECOMPUTE: tuple[dict[str, object], ...] = (
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ("mlp",)},
    {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")},
    {"recompute": "full"},
)


@dataclass(frozen=True, kw_only=True)
class LayoutPrediction:
    """What a run in one layout is predicted to take."""

    config: Config
    replicas: int
    loads: tuple[StepLoad, ...]
    """A typical step of each phase."""
    memory: RankMemory
    """Memory of the rank that holds the most, in the phase that needs the most."""
    times: tuple[StepTime, ...]
    """Time of each phase's step."""
    steps: int
    """Optimizer steps of the run."""
    cluster: Cluster

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step over the run."""
        return over_phases([time.total for time in self.times])

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the whole run, without loading, saving and validation."""
        return self.step_seconds * self.steps * self.cluster.gpus / 3600

    @property
    def mfu(self) -> float:
        """Useful operations over what the GPUs could do at the dense peak of bfloat16."""
        useful = over_phases([load.useful_flops for load in self.loads])
        return useful / (self.step_seconds * self.cluster.gpus * self.cluster.gpu.bf16_flops)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory suffices, with some to spare."""
        return self.memory.total <= FULLEST * self.cluster.gpu.memory_bytes


class Planner:
    """Predicts layouts of one model, training set and cluster; packs of equal layouts are planned once."""

    def __init__(self, arch: Architecture, config: Config, samples: SampleLengths, cluster: Cluster) -> None:
        self.arch, self.config, self.samples, self.cluster = arch, config, samples, cluster
        size = config.batch.global_batch_size
        self.batches: list[BatchLengths] = [typical_batch(samples, phase, size) for phase in range(len(PHASES))]
        self._packed: dict[tuple[int, ...], tuple[StepLoad, ...]] = {}

    def predict(self, config: Config) -> LayoutPrediction:
        """Predict ``config`` as it is.

        Raises:
            ValueError: when the engine rejects it, or it does not fill the cluster.
        """
        replicas = replicas_of(config.parallel, self.cluster.gpus)
        phases = [predict_step(config, self.arch, self.cluster, load) for load in self._loads(config, replicas)]
        return LayoutPrediction(
            config=config,
            replicas=replicas,
            loads=tuple(one.load for one in phases),
            memory=max((one.memory for one in phases), key=lambda one: one.total),
            times=tuple(one.time for one in phases),
            steps=self.samples.steps(config),
            cluster=self.cluster,
        )

    def search(self) -> list[LayoutPrediction]:
        """Return the layouts that fit, the fastest first; of those alike in all but chunks and budget, one.

        Raises:
            ValueError: when none fits; says what the smallest needs.
        """
        kinds: dict[tuple[object, ...], list[LayoutPrediction]] = {}
        least = math.inf
        for candidate in self._candidates():
            try:
                smallest = self._least_memory(candidate)
                least = min(least, smallest)
                if smallest > FULLEST * self.cluster.gpu.memory_bytes:
                    continue
                prediction = self.predict(candidate)
            except ValueError:
                continue
            if prediction.fits:
                kinds.setdefault(_kind(candidate.parallel), []).append(prediction)
        if kinds:
            return sorted((_simplest(group) for group in kinds.values()), key=lambda one: one.gpu_hours)
        if math.isinf(least):
            raise ValueError(f"no layout of {self.cluster.gpus} GPUs divides the model, expected another number")
        raise ValueError(
            f"no layout fits: the smallest needs more than {least / GIB:.0f} GiB on a GPU, {self.cluster.gpu.name} has "
            f"{self.cluster.gpu.memory_bytes / GIB:.0f}; use more GPUs, or a smaller data.max_length"
        )

    def _least_memory(self, config: Config) -> float:
        """Return less than ``config`` needs, without planning its packs, which are rarely less than half full."""
        parallel = config.parallel
        check_parallel(self.arch, parallel)
        return max(
            rank_memory(
                self.arch,
                config,
                planned_backends(config, self.cluster),
                stage,
                replicas=replicas_of(parallel, self.cluster.gpus),
                microbatches=1,
                sequence_length=config.batch.tokens_per_microbatch // 2,
                rows=0,
            ).total
            for stage in stages_of(self.arch, parallel)
        )

    def _loads(self, config: Config, replicas: int) -> tuple[StepLoad, ...]:
        key = (*packing_sizes(config), microbatch_multiple(config.parallel), replicas)
        if key not in self._packed:
            self._packed[key] = tuple(pack_load(self.arch, config, batch, replicas) for batch in self.batches)
        return self._packed[key]

    def _candidates(self) -> Iterator[Config]:
        # Named: a layout that fits with fused layers may not fit with the plain ones that ``auto`` falls back to.
        layers = planned_backends(self.config, self.cluster).layers
        config = replace(self.config, backends=replace(self.config.backends, layers=layers))
        # Both views of the longest sample have room in any case.
        least = config.data.max_length * (2 if self.samples.reflection.any() else 1)
        budgets = [-(-int(least * factor) // 1024) * 1024 for factor in _BUDGETS]
        for parallel in self._layouts():
            for tokens in budgets:
                batch = replace(config.batch, tokens_per_microbatch=tokens)
                yield replace(config, batch=batch, parallel=parallel)

    def _layouts(self) -> Iterator[ParallelConfig]:
        """List sizes that fill the cluster, tensor- and context-parallel ranks in one machine."""
        for tensor in _POWERS:
            for context in (1, 2):
                if tensor * context > self.cluster.gpus_per_node:
                    continue
                for stages in _POWERS:
                    if self.cluster.gpus % (tensor * context * stages):
                        continue
                    for chunks in _CHUNKS if stages > 1 else (1,):
                        for recompute in _RECOMPUTE:
                            yield replace(
                                self.config.parallel,
                                tensor_model_parallel_size=tensor,
                                sequence_parallel=tensor > 1,
                                context_parallel_size=context,
                                pipeline_model_parallel_size=stages,
                                virtual_pipeline_model_parallel_size=chunks,
                                layers_per_stage=(),
                                data_parallel_size=None,
                                **recompute,  # type: ignore[arg-type]
                            )


def _kind(parallel: ParallelConfig) -> tuple[object, ...]:
    """Return what a user chooses between."""
    return (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.recompute,
        parallel.recompute_modules,
    )


def _simplest(group: list[LayoutPrediction]) -> LayoutPrediction:
    """Take fewest chunks, then least memory, of those within 1 % of the fastest, which are too close to tell apart."""
    fastest = min(one.gpu_hours for one in group)
    return min(
        (one for one in group if one.gpu_hours <= 1.01 * fastest),
        key=lambda one: (one.config.parallel.virtual_pipeline_model_parallel_size, one.memory.total),
    )
