"""The time of a step, by what takes it: a step's load and layout over the rates of a cluster.

It is made up of products by their shapes, passes over memory by what the backends' parts read and write, and the
communication of megatron-core 0.16.1's layers and schedules. On a GPU the host must keep ahead of the device, or the
device waits; on the CPU host and device are one, and their times add up.

A replica's microbatch has T tokens; a rank's matrices meet T / cp of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.config import Config
from reflectron.engine.model.architecture import Architecture, linear_layers
from reflectron.tools.planner.backends import (
    JOINED,
    LAYER_TRAFFIC,
    LOGIT_BYTES,
    QUANTISED,
    SPLIT,
    SUMMED,
    UPDATED,
    HeadBackend,
    MemoryPasses,
    Pass,
    PlannedBackends,
)
from reflectron.tools.planner.hardware import Cluster, planned_backends
from reflectron.tools.planner.memory import (
    MOST_CHUNK_LOGITS,
    PipelineStage,
    Recomputed,
    element_bytes,
    is_optimizer_sharded,
    recomputed,
    stage_parameters,
    stages_of,
    vocabulary_parameters,
)
from reflectron.tools.planner.samples import StepLoad

# Products with the output matrix: the plain backend computes the logits again in the backward.
_HEAD_FORWARDS: dict[HeadBackend, int] = {"reference": 2, "triton": 1}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, one part after the other, on the slowest stage."""

    matmul: float
    attention: float
    memory_passes: float
    head: float
    tensor_parallel: float
    context_parallel: float
    pipeline_transfer: float
    bubble: float
    data_parallel: float
    optimizer: float
    host: float
    """What the device waits for the host: on the CPU all of the host's own work."""

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class _LayerTime:
    """Seconds of one layer and one microbatch: matrices, attention, passes over memory, communication."""

    matmul: float
    attention: float
    memory_passes: float
    tensor_parallel: float
    context_parallel: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class _PlannedStep:
    """All that a step depends on."""

    arch: Architecture
    config: Config
    backends: PlannedBackends
    cluster: Cluster
    load: StepLoad
    replicas: int

    @property
    def tokens(self) -> float:
        """Tokens that a rank's matrices meet."""
        return self.load.sequence_length / self.config.parallel.context_parallel_size

    @property
    def between(self) -> float:
        """Tokens that a rank holds between matrices."""
        parallel = self.config.parallel
        return self.tokens / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)

    @property
    def element(self) -> int:
        return element_bytes(self.config)

    @property
    def again(self) -> Recomputed:
        """What the backward computes again."""
        return recomputed(self.config.parallel)


def step_time(arch: Architecture, config: Config, cluster: Cluster, load: StepLoad, replicas: int) -> StepTime:
    """Predict the seconds of one optimizer step."""
    parallel = config.parallel
    run = _PlannedStep(arch, config, planned_backends(config, cluster), cluster, load, replicas)
    stages, m = stages_of(arch, parallel), load.microbatches
    layer, head, host = _layer_time(run), _head_time(run), cluster.host(run.backends.layers)
    accumulated = [_accumulation_time(run, stage) for stage in stages]
    ends = [_ends_time(run, stage) for stage in stages]
    by_stage = [
        stage.layers * layer.total + (head if stage.is_last else 0.0) + added + end
        for stage, added, end in zip(stages, accumulated, ends, strict=True)
    ]
    by_host = [stage.layers * host["microbatch_layer"] + host["microbatch"] for stage in stages]
    waits = [h if cluster.is_cpu else max(h - d, 0.0) for h, d in zip(by_host, by_stage, strict=True)]
    whole = [device + wait for device, wait in zip(by_stage, waits, strict=True)]
    slow = int(np.argmax(whole))
    layers = m * stages[slow].layers
    return StepTime(
        matmul=layers * layer.matmul,
        attention=layers * layer.attention,
        memory_passes=layers * layer.memory_passes + m * accumulated[slow],
        head=m * head if stages[slow].is_last else 0.0,
        tensor_parallel=layers * layer.tensor_parallel + m * ends[slow],
        context_parallel=layers * layer.context_parallel,
        pipeline_transfer=_transfer_time(run),
        bubble=(sum(whole) - whole[slow]) / parallel.virtual_pipeline_model_parallel_size,
        data_parallel=_replica_time(run, stages[slow], by_stage[slow]),
        optimizer=_update_time(run, stages[slow]),
        host=m * waits[slow] + host["step"] + host["step_layer"] * stages[slow].layers,
    )


def _accumulation_time(run: _PlannedStep, stage: PipelineStage) -> float:
    """Predict how long a microbatch's weight gradients take into their sums.

    The head adds the output layer's itself, and the embedding's gradient is a whole matrix of mostly zeros.
    """
    cluster, moved = run.cluster, SUMMED[run.backends.fused_gradient][run.element]
    if cluster.measured is not None:
        # Measured products have summed their gradients already.
        moved -= SUMMED[cluster.measured.fused_gradient][run.element]
    *layers, _ = _tensors(run, stage)
    seconds = sum(count * cluster.passes("sum", size, moved) for count, size in layers)
    if stage.is_first:
        whole = vocabulary_parameters(run.arch, run.config)
        seconds += cluster.passes("sum", whole, run.element + SUMMED["torch"][run.element])
    return seconds


def _layer_time(run: _PlannedStep) -> _LayerTime:
    arch, config, cluster, backends = run.arch, run.config, run.cluster, run.backends
    parallel, q, k = config.parallel, arch.query_width, arch.key_width
    tensor, context, tokens = parallel.tensor_model_parallel_size, parallel.context_parallel_size, run.tokens
    again, fp8 = run.again, config.model.fp8 != "none"
    products = 0.0
    for matrix in linear_layers(arch):
        forwards = 2 if again.everything or (matrix.block == "mlp" and again.mlp) else 1
        products += cluster.linear(tokens, *matrix.sizes(tensor), forwards, fp8)
    # Scores and values, 2 q operations a pair each.
    attended = 4 * q * run.load.pairs / (tensor * context) * (4 if again.core_attention else 3)
    return _LayerTime(
        matmul=products,
        attention=cluster.attention(attended, run.load.segment_length, arch.head_dim, backends.attention),
        memory_passes=_passes_time(run),
        tensor_parallel=_tensor_time(run),
        context_parallel=_context_time(run, 2 * k * run.load.sequence_length * run.element / tensor),
    )


def _passes_time(run: _PlannedStep) -> float:
    """Predict how long the parts of a layer read and write, in the backward and in each forward."""
    arch, cluster, backends, tokens = run.arch, run.cluster, run.backends, run.tokens
    tensor, q, k = run.config.parallel.tensor_model_parallel_size, arch.query_width, arch.key_width
    layers, again = LAYER_TRAFFIC[backends.layers], run.again

    def seconds(part: Pass, elements: float, moved: MemoryPasses, twice: bool) -> float:
        both = moved.both + (moved.forward if twice else 0.0)
        return cluster.passes(_measured_part(run, part), elements, both * run.element / 2)

    total = 2 * seconds("norm", run.between * arch.hidden_size, layers.block, again.everything)
    total += seconds("gated", tokens * arch.ffn_hidden_size / tensor, layers.gated, again.mlp)
    total += sum(seconds("rotation", tokens * n / tensor, layers.rotation, again.core_attention) for n in (q, k))
    total += seconds("copy", tokens * (q + 2 * k) / tensor, SPLIT, again.everything)
    if arch.qk_norm:
        total += seconds("norm", tokens * (q + k) / tensor, layers.block, again.everything)
    # Where attention was measured, its segments were joined as well.
    if not backends.packed_attention and (cluster.measured is None or cluster.measured.attention != backends.attention):
        total += seconds("copy", tokens * q / tensor, JOINED, again.core_attention)
    if run.config.model.fp8 != "none":
        total += _quantisation_time(run)
    return total


def _measured_part(run: _PlannedStep, part: Pass) -> Pass:
    """Return whose rate counts for ``part``: its own, if it was measured with the backends that are planned for."""
    measured, planned = run.cluster.measured, run.backends
    if measured is None:
        return "copy"
    if part == "update":
        return part if measured.fused_update == planned.fused_update else "copy"
    return part if measured.separate_layers == planned.layers else "copy"


def _quantisation_time(run: _PlannedStep) -> float:
    """Predict how long a layer's inputs, output gradients and weights take into FP8."""
    elements = 0.0
    for matrix in linear_layers(run.arch):
        inner, outer = matrix.sizes(run.config.parallel.tensor_model_parallel_size)
        elements += run.tokens * (inner + outer) + inner * outer
    return run.cluster.passes("copy", elements, QUANTISED)


def _tensor_time(run: _PlannedStep) -> float:
    """Predict a layer's communication between tensor-parallel ranks.

    Each of its two blocks gathers its input and scatters its output, forward and backward alike, or sums it; what the
    backward gathers of inputs and scatters of their gradients overlaps with products.
    """
    parallel, cluster = run.config.parallel, run.cluster
    ranks = parallel.tensor_model_parallel_size
    size = run.tokens * run.arch.hidden_size * run.element
    exposed = cluster.exposed(size)
    if parallel.sequence_parallel:
        gather = cluster.collective("all_gather", size, ranks, 1)
        scatter = cluster.collective("reduce_scatter", size, ranks, 1)
        forward, backward = 2 * (gather + scatter), 2 * gather + 2 * (gather + scatter) * exposed
    else:
        summed = cluster.collective("all_reduce", size, ranks, 1)
        forward, backward = 2 * summed, 2 * summed * exposed
    if run.again.everything:
        return 2 * forward + backward
    again = forward / 2 if run.again.mlp else 0.0
    return forward + again + backward


def _ends_time(run: _PlannedStep, stage: PipelineStage) -> float:
    """Predict how long a microbatch's embeddings are summed over tensor ranks and the head's input is gathered."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks, size = parallel.tensor_model_parallel_size, run.tokens * run.arch.hidden_size * run.element
    if parallel.sequence_parallel:
        once = cluster.collective("all_gather", size, ranks, 1) + cluster.collective("reduce_scatter", size, ranks, 1)
    else:
        once = cluster.collective("all_reduce", size, ranks, 1)
    return (stage.is_first + stage.is_last) * once


def _context_time(run: _PlannedStep, gathered: float) -> float:
    """Predict how long a layer gathers keys and values of the pack in the forward and scatters their gradients."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks, stride = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    gather = cluster.collective("all_gather", gathered, ranks, stride)
    scatter = cluster.collective("reduce_scatter", gathered, ranks, stride)
    return gather * (2 if run.again.everything else 1) + scatter


def _head_time(run: _PlannedStep) -> float:
    """Predict a microbatch's final norm and head on the last stage.

    The head counts whole where it was measured, or else as the products of one chunk of rows after the other and passes
    over the logits.
    """
    config, cluster, hidden = run.config, run.cluster, run.arch.hidden_size
    backend = head_backend(config, cluster)
    rows = run.load.rows / config.parallel.context_parallel_size
    columns = vocabulary_parameters(run.arch, config) / hidden
    moved = LAYER_TRAFFIC[run.backends.layers].block.both * run.element / 2
    norm = cluster.passes(_measured_part(run, "norm"), run.between * hidden, moved)
    measured = cluster.head(backend, rows, hidden, columns)
    if measured is not None:
        return norm + measured
    chunk = _chunk_rows(backend, rows, columns)
    products = cluster.linear(max(chunk, 1.0), hidden, columns, _HEAD_FORWARDS[backend]) * rows / max(chunk, 1.0)
    passes = cluster.passes("copy", chunk * columns, LOGIT_BYTES[backend]) * rows / max(chunk, 1.0)
    return norm + products + passes


def _chunk_rows(backend: HeadBackend, rows: float, columns: float) -> float:
    """Return the loss rows whose logits the head computes at once."""
    if backend == "reference":
        return min(rows, max(1.0, MOST_CHUNK_LOGITS / columns))
    if backend == "triton":
        return rows
    assert_never(backend)


def head_backend(config: Config, cluster: Cluster) -> HeadBackend:
    """Return what computes the distillation head: ``auto`` takes the plain backend."""
    backend = config.loss.backend
    if backend == "triton":
        return "reference" if cluster.is_cpu else "triton"
    if backend == "reference" or backend == "auto":
        return "reference"
    assert_never(backend)


def _transfer_time(run: _PlannedStep) -> float:
    """Predict how long stages wait for each other's tokens, in and out, unless chunks overlap with it."""
    parallel, cluster = run.config.parallel, run.cluster
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    stride = parallel.tensor_model_parallel_size * parallel.context_parallel_size * run.replicas
    size = run.between * run.arch.hidden_size * run.element
    once = cluster.collective("transfer", size, stages, stride)
    exposed = 1.0 if chunks == 1 else chunks * cluster.exposed(size)
    return 2 * run.load.microbatches * exposed * once + 2 * (stages - 1) * once


def _replica_time(run: _PlannedStep, stage: PipelineStage, microbatch: float) -> float:
    """Predict how long gradients are summed, in float32, and parameters gathered.

    The last microbatch's backward and the first one's forward hide a part of it.
    """
    parallel, cluster = run.config.parallel, run.cluster
    ranks, stride = run.replicas * parallel.context_parallel_size, parallel.tensor_model_parallel_size
    parameters = stage_parameters(run.arch, run.config, stage)
    if is_optimizer_sharded(run.config):
        seconds = cluster.collective("reduce_scatter", 4.0 * parameters, ranks, stride)
        seconds += cluster.collective("all_gather", run.element * parameters, ranks, stride)
    else:
        seconds = cluster.collective("all_reduce", 4.0 * parameters, ranks, stride)
    exposed = 1.0 if parallel.overlap_grad_reduce is False else cluster.exposed(4.0 * parameters)
    return max(seconds - microbatch * (1 - exposed), seconds * exposed)


def _update_time(run: _PlannedStep, stage: PipelineStage) -> float:
    """Predict norm, clipping and update of a rank's share, bound by memory; all gradients are zeroed.

    Over gloo a reduction among one rank copies gradients there and back, and a gathering copies parameters.
    """
    ranks = run.replicas * run.config.parallel.context_parallel_size
    share = 1 / ranks if is_optimizer_sharded(run.config) else 1.0
    cluster, moved = run.cluster, UPDATED[run.backends.fused_update][run.element]
    part, seconds = _measured_part(run, "update"), 0.0
    for count, size in _tensors(run, stage):
        seconds += count * cluster.passes(part, size * share, moved)
        seconds += count * cluster.passes("copy", size * (1 - share), 4.0)
        if is_optimizer_sharded(run.config) and ranks == 1 and cluster.is_cpu:
            seconds += count * cluster.passes("copy", size, 2 * 2 * 4.0 + 2.0 * run.element)
    return seconds


def _tensors(run: _PlannedStep, stage: PipelineStage) -> list[tuple[int, float]]:
    """Return how many matrices of how many elements a rank of ``stage`` holds."""
    tensor = run.config.parallel.tensor_model_parallel_size
    layers = [(stage.layers, float(math.prod(matrix.sizes(tensor)))) for matrix in linear_layers(run.arch)]
    ends = stage.is_first + (stage.is_last and not (run.arch.tied_embeddings and stage.is_first))
    return [*layers, (ends, float(vocabulary_parameters(run.arch, run.config)))]
