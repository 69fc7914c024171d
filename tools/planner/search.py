"""A run's configuration and a cluster in; out come the layouts that fit, the fastest first.

Every candidate is a ``Config`` of its own, so it passes all of the engine's refusals before anything is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from reflectron.engine.config import Config, ParallelConfig
from reflectron.engine.data.packing import microbatch_multiple, packing_sizes
from reflectron.engine.model.architecture import Architecture, check_parallel
from reflectron.tools.planner.backends import planned_backends
from reflectron.tools.planner.hardware import Cluster
from reflectron.tools.planner.memory import FULLEST, GIB, RankMemory, rank_memory, stages_of
from reflectron.tools.planner.predict import predict, replicas_of
from reflectron.tools.planner.samples import PHASES, Batch, Samples, over_phases, typical_batch
from reflectron.tools.planner.speed import Load, StepTime, pack_load

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
class Prediction:
    """One layout and what is expected of it."""

    config: Config
    replicas: int
    loads: tuple[Load, ...]
    """A typical step of each phase."""
    memory: RankMemory
    """Of the rank that holds the most, in the phase that needs the most."""
    times: tuple[StepTime, ...]
    """Of each phase's step."""
    steps: int
    """Optimizer steps of the run."""
    cluster: Cluster

    @property
    def step_seconds(self) -> float:
        """Mean over the run."""
        return over_phases([time.total for time in self.times])

    @property
    def gpu_hours(self) -> float:
        """Of the whole run, without loading, saving and validation."""
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

    def __init__(self, arch: Architecture, config: Config, samples: Samples, cluster: Cluster) -> None:
        self.arch, self.config, self.samples, self.cluster = arch, config, samples, cluster
        size = config.batch.global_batch_size
        self.batches: list[Batch] = [typical_batch(samples, phase, size) for phase in range(len(PHASES))]
        self._packed: dict[tuple[int, ...], tuple[Load, ...]] = {}

    def predict(self, config: Config) -> Prediction:
        """What ``config`` as it is needs and takes.

        Raises:
            ValueError: when the engine refuses it, or it does not fill the cluster.
        """
        replicas = replicas_of(config.parallel, self.cluster.gpus)
        phases = [predict(config, self.arch, self.cluster, load) for load in self._loads(config, replicas)]
        return Prediction(
            config=config,
            replicas=replicas,
            loads=tuple(one.load for one in phases),
            memory=max((one.memory for one in phases), key=lambda one: one.total),
            times=tuple(one.time for one in phases),
            steps=self.samples.steps(config),
            cluster=self.cluster,
        )

    def search(self) -> list[Prediction]:
        """Layouts that fit, the fastest first; of those alike in all but chunks and budget, one.

        Raises:
            ValueError: when none fits; says what the smallest needs.
        """
        kinds: dict[tuple[object, ...], list[Prediction]] = {}
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
        """Less than what ``config`` needs, without planning its packs: these are rarely less than half full."""
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

    def _loads(self, config: Config, replicas: int) -> tuple[Load, ...]:
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
        """Sizes that fill the cluster, tensor- and context-parallel ranks in one machine."""
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
    """What a user chooses between."""
    return (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.recompute,
        parallel.recompute_modules,
    )


def _simplest(group: list[Prediction]) -> Prediction:
    """Of those within 1 % of the fastest, too close to tell apart: fewest chunks, then least memory."""
    fastest = min(one.gpu_hours for one in group)
    return min(
        (one for one in group if one.gpu_hours <= 1.01 * fastest),
        key=lambda one: (one.config.parallel.virtual_pipeline_model_parallel_size, one.memory.total),
    )
