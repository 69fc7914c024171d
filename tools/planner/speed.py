"""Architecture, layout, typical steps and the rates of a cluster in; out comes the time of a step, by what takes it.

Products by their shapes, passes over memory by what the backends' parts read and write, the communication of
megatron-core 0.16.1's layers and schedules. On a GPU the host must keep ahead of the device, or the device waits; on
the CPU host and device are one, and their times add up.

A replica's microbatch has T tokens; a rank's matrices meet T / cp of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reflectron.engine.config import Config
from reflectron.engine.data.packing import microbatch_multiple, packing_sizes, plan_packs
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.training.flops import decoder_shape, forward_cost, training_cost, training_flops
from reflectron.tools.planner.backends import Backends, planned_backends
from reflectron.tools.planner.hardware import Cluster
from reflectron.tools.planner.memory import (
    MOST_CHUNK_LOGITS,
    Stage,
    element_bytes,
    stage_parameters,
    stages_of,
    vocabulary_parameters,
    widths,
)
from reflectron.tools.planner.samples import Batch
from reflectron.tools.planner.traffic import (
    JOINED,
    LAYERS,
    LOGIT_BYTES,
    QUANTISED,
    SPLIT,
    SUMMED,
    UPDATED,
    Passes,
)

# Products with the output matrix: the plain backend computes the logits again in the backward.
_HEAD_FORWARDS = {"reference": 2, "triton": 1}


@dataclass(frozen=True, kw_only=True)
class Load:
    """A typical step, packed as the engine packs it; means over microbatches."""

    microbatches: int
    """Of one replica."""
    sequence_length: int
    pairs: float
    """Pairs of tokens that attend to each other in a microbatch."""
    segment_length: float
    """Tokens of the segment that the mean pair lies in."""
    rows: float
    """Rows of a microbatch with a loss."""
    tokens: int
    """Of the global batch, without padding."""
    useful_flops: float
    """Of the global batch, without what is computed again."""


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
    """That the device waits for the host: on the CPU all of the host's own work."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def pack_load(arch: Architecture, config: Config, batch: Batch, replicas: int) -> Load:
    """The step that trains on ``batch``.

    Raises:
        ValueError: when a sample exceeds the budget of a microbatch.
    """
    # Padding of the vocabulary and recomputation would change the balance by little, and packs could not be shared.
    cost = training_cost(decoder_shape(arch, Config()), "none")
    budget, multiple = packing_sizes(config)
    plan = plan_packs(
        batch.teacher,
        batch.student,
        batch.rows,
        tokens_per_microbatch=budget,
        data_parallel_size=replicas,
        cost=cost,
        microbatch_multiple=microbatch_multiple(config.parallel),
        pad_to_multiple=multiple,
    )
    views = np.concatenate([batch.teacher, batch.student]).astype(np.float64)
    rows, microbatches = int(batch.rows.sum()), len(plan.microbatches[0])
    return Load(
        microbatches=microbatches,
        sequence_length=plan.sequence_length,
        pairs=float((views * (views + 1) / 2).sum()) / (microbatches * replicas),
        segment_length=float((views**2).sum() / views.sum()),
        rows=rows / (microbatches * replicas),
        tokens=int(views.sum()),
        useful_flops=training_flops(cost, views, rows),
    )


@dataclass(frozen=True)
class _Layer:
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
class _Run:
    """What everything about a step depends on."""

    arch: Architecture
    config: Config
    backends: Backends
    cluster: Cluster
    load: Load
    replicas: int

    @property
    def tokens(self) -> float:
        """That a rank's matrices meet."""
        return self.load.sequence_length / self.config.parallel.context_parallel_size

    @property
    def between(self) -> float:
        """That a rank holds between matrices."""
        parallel = self.config.parallel
        return self.tokens / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)

    @property
    def element(self) -> int:
        return element_bytes(self.config)

    @property
    def sharded(self) -> bool:
        """Replicas share the optimizer's state."""
        return self.config.parallel.distributed_optimizer and self.config.optimizer.name == "adamw"


def step_time(arch: Architecture, config: Config, cluster: Cluster, load: Load, replicas: int) -> StepTime:
    """Seconds of one optimizer step."""
    parallel = config.parallel
    run = _Run(arch, config, planned_backends(config, cluster), cluster, load, replicas)
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


def _matrices(arch: Architecture, tensor: int) -> dict[str, tuple[float, float]]:
    """Inputs and outputs of a layer's linear layers on one rank."""
    hidden, ffn, (q, k) = arch.hidden_size, arch.ffn_hidden_size, widths(arch)
    return {
        "qkv": (hidden, (q + 2 * k) / tensor),
        "proj": (q / tensor, hidden),
        "fc1": (hidden, 2 * ffn / tensor),
        "fc2": (ffn / tensor, hidden),
    }


def _accumulation_time(run: _Run, stage: Stage) -> float:
    """Of a microbatch: weight gradients into their sums; the head adds the output layer's itself, and the embedding's
    gradient is a whole matrix of mostly zeros."""
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


def _layer_time(run: _Run) -> _Layer:
    arch, config, cluster, backends = run.arch, run.config, run.cluster, run.backends
    parallel, (q, k) = config.parallel, widths(arch)
    tensor, context, tokens = parallel.tensor_model_parallel_size, parallel.context_parallel_size, run.tokens
    modules = parallel.recompute_modules if parallel.recompute == "selective" else ()
    full, fp8 = parallel.recompute == "full", config.model.fp8 != "none"
    twice = {name: 2 if full or (name.startswith("fc") and "mlp" in modules) else 1 for name in _matrices(arch, tensor)}
    products = sum(
        cluster.linear(tokens, inner, outer, twice[name], fp8)
        for name, (inner, outer) in _matrices(arch, tensor).items()
    )
    # Scores and values, 2 q operations a pair each.
    attended = 4 * q * run.load.pairs / (tensor * context) * (4 if full or "core_attn" in modules else 3)
    return _Layer(
        matmul=products,
        attention=cluster.attention(attended, run.load.segment_length, arch.head_dim, backends.attention),
        memory_passes=_passes_time(run, full, "core_attn" in modules, "mlp" in modules),
        tensor_parallel=_tensor_time(run),
        context_parallel=_context_time(run, 2 * k * run.load.sequence_length * run.element / tensor),
    )


def _passes_time(run: _Run, full: bool, attention_again: bool, mlp_again: bool) -> float:
    """Of one layer: what its parts read and write, in the backward and in each forward."""
    arch, cluster, backends, tokens = run.arch, run.cluster, run.backends, run.tokens
    tensor, (q, k) = run.config.parallel.tensor_model_parallel_size, widths(arch)
    layers = LAYERS[backends.layers]

    def seconds(part: str, elements: float, moved: Passes, again: bool) -> float:
        both = moved.both + (moved.forward if full or again else 0.0)
        return cluster.passes(_measured_part(run, part), elements, both * run.element / 2)

    total = 2 * seconds("norm", run.between * arch.hidden_size, layers.block, False)
    total += seconds("gated", tokens * arch.ffn_hidden_size / tensor, layers.gated, mlp_again)
    total += sum(seconds("rotation", tokens * n / tensor, layers.rotation, attention_again) for n in (q, k))
    total += seconds("copy", tokens * (q + 2 * k) / tensor, SPLIT, False)
    if arch.qk_norm:
        total += seconds("norm", tokens * (q + k) / tensor, layers.block, False)
    # Where attention was measured, its segments were joined as well.
    if not backends.packed_attention and (cluster.measured is None or cluster.measured.attention != backends.attention):
        total += seconds("copy", tokens * q / tensor, JOINED, attention_again)
    if run.config.model.fp8 != "none":
        total += _quantisation_time(run)
    return total


def _measured_part(run: _Run, part: str) -> str:
    """Whose rate counts for ``part``: its own, if it was measured with the back ends that are planned for."""
    measured, planned = run.cluster.measured, run.backends
    if measured is None:
        return "copy"
    if part == "update":
        return part if measured.fused_update == planned.fused_update else "copy"
    return part if measured.separate_layers == planned.layers else "copy"


def _quantisation_time(run: _Run) -> float:
    """Of one layer's inputs, output gradients and weights into FP8."""
    elements = 0.0
    for inner, outer in _matrices(run.arch, run.config.parallel.tensor_model_parallel_size).values():
        elements += run.tokens * (inner + outer) + inner * outer
    return run.cluster.passes("copy", elements, QUANTISED)


def _tensor_time(run: _Run) -> float:
    """Of one layer. Each of its two blocks gathers its input and scatters its output, forward and backward alike, or
    sums it; what the backward gathers of inputs and scatters of their gradients overlaps with products."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks = parallel.tensor_model_parallel_size
    size = run.tokens * run.arch.hidden_size * run.element
    exposed = cluster.exposed(size)
    if parallel.sequence_parallel:
        gather, scatter = (cluster.collective(kind, size, ranks, 1) for kind in ("all_gather", "reduce_scatter"))
        forward, backward = 2 * (gather + scatter), 2 * gather + 2 * (gather + scatter) * exposed
    else:
        summed = cluster.collective("all_reduce", size, ranks, 1)
        forward, backward = 2 * summed, 2 * summed * exposed
    if parallel.recompute == "full":
        return 2 * forward + backward
    again = forward / 2 if parallel.recompute == "selective" and "mlp" in parallel.recompute_modules else 0.0
    return forward + again + backward


def _ends_time(run: _Run, stage: Stage) -> float:
    """Of a microbatch: the embedding's parts summed over tensor-parallel ranks, and the head's input gathered."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks, size = parallel.tensor_model_parallel_size, run.tokens * run.arch.hidden_size * run.element
    if parallel.sequence_parallel:
        once = cluster.collective("all_gather", size, ranks, 1) + cluster.collective("reduce_scatter", size, ranks, 1)
    else:
        once = cluster.collective("all_reduce", size, ranks, 1)
    return (stage.is_first + stage.is_last) * once


def _context_time(run: _Run, gathered: float) -> float:
    """Of one layer: keys and values of the pack are gathered in the forward, their gradients scattered."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks, stride = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    gather, scatter = (cluster.collective(kind, gathered, ranks, stride) for kind in ("all_gather", "reduce_scatter"))
    return gather * (2 if parallel.recompute == "full" else 1) + scatter


def _head_time(run: _Run) -> float:
    """Of one microbatch on the last stage: the final norm and the head, whole where it was measured, or else the
    products of a chunk of rows after the other, and passes over the logits."""
    config, cluster, hidden = run.config, run.cluster, run.arch.hidden_size
    backend = head_backend(config, cluster)
    rows = run.load.rows / config.parallel.context_parallel_size
    columns = vocabulary_parameters(run.arch, config) / hidden
    moved = LAYERS[run.backends.layers].block.both * run.element / 2
    norm = cluster.passes(_measured_part(run, "norm"), run.between * hidden, moved)
    measured = cluster.head(backend, rows, hidden, columns)
    if measured is not None:
        return norm + measured
    chunk = min(rows, max(1.0, MOST_CHUNK_LOGITS / columns)) if backend == "reference" else rows
    products = cluster.linear(max(chunk, 1.0), hidden, columns, _HEAD_FORWARDS[backend]) * rows / max(chunk, 1.0)
    passes = cluster.passes("copy", chunk * columns, LOGIT_BYTES[backend]) * rows / max(chunk, 1.0)
    return norm + products + passes


def head_backend(config: Config, cluster: Cluster) -> str:
    """Of the distillation head: ``auto`` takes the plain backend."""
    return "triton" if config.loss.backend == "triton" and not cluster.is_cpu else "reference"


def _transfer_time(run: _Run) -> float:
    """What stages wait for each other's tokens: each microbatch in and out, unless chunks overlap with it."""
    parallel, cluster = run.config.parallel, run.cluster
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    stride = parallel.tensor_model_parallel_size * parallel.context_parallel_size * run.replicas
    size = run.between * run.arch.hidden_size * run.element
    once = cluster.collective("transfer", size, stages, stride)
    exposed = 1.0 if chunks == 1 else chunks * cluster.exposed(size)
    return 2 * run.load.microbatches * exposed * once + 2 * (stages - 1) * once


def _replica_time(run: _Run, stage: Stage, microbatch: float) -> float:
    """Gradients summed, in float32, and parameters gathered, as far as a microbatch's computation leaves it open: the
    last one's backward, and the first one's forward."""
    parallel, cluster = run.config.parallel, run.cluster
    ranks, stride = run.replicas * parallel.context_parallel_size, parallel.tensor_model_parallel_size
    parameters = stage_parameters(run.arch, run.config, stage)
    if run.sharded:
        seconds = cluster.collective("reduce_scatter", 4.0 * parameters, ranks, stride)
        seconds += cluster.collective("all_gather", run.element * parameters, ranks, stride)
    else:
        seconds = cluster.collective("all_reduce", 4.0 * parameters, ranks, stride)
    exposed = 1.0 if parallel.overlap_grad_reduce is False else cluster.exposed(4.0 * parameters)
    return max(seconds - microbatch * (1 - exposed), seconds * exposed)


def _update_time(run: _Run, stage: Stage) -> float:
    """Norm, clipping and update of a rank's share, bound by memory; all gradients are zeroed. Over gloo a reduction
    among one rank copies gradients there and back, and a gathering copies parameters."""
    ranks = run.replicas * run.config.parallel.context_parallel_size
    share = 1 / ranks if run.sharded else 1.0
    cluster, moved = run.cluster, UPDATED[run.backends.fused_update][run.element]
    part, seconds = _measured_part(run, "update"), 0.0
    for count, size in _tensors(run, stage):
        seconds += count * cluster.passes(part, size * share, moved)
        seconds += count * cluster.passes("copy", size * (1 - share), 4.0)
        if run.sharded and ranks == 1 and cluster.is_cpu:
            seconds += count * cluster.passes("copy", size, 2 * 2 * 4.0 + 2.0 * run.element)
    return seconds


def _tensors(run: _Run, stage: Stage) -> list[tuple[int, float]]:
    """How many matrices of how many elements a rank of ``stage`` holds."""
    tensor = run.config.parallel.tensor_model_parallel_size
    layers = [(stage.layers, inner * outer) for inner, outer in _matrices(run.arch, tensor).values()]
    ends = stage.is_first + (stage.is_last and not (run.arch.tied_embeddings and stage.is_first))
    return [*layers, (ends, float(vocabulary_parameters(run.arch, run.config)))]


def reference_flops(arch: Architecture, batch: Batch) -> float:
    """Operations of the reference's way: both views at full length, layers computed twice, logits of every token.

    Padding costs nothing here: the published batches hold one sample.
    """
    cost = forward_cost(decoder_shape(arch, Config()))
    views = np.concatenate([batch.teacher, batch.teacher[batch.reflection]]).astype(np.float64)
    layers = cost.per_token * views.sum() + cost.per_token_squared * (views**2).sum()
    return float(4 * layers + 3 * cost.per_row * views.sum())
