"""The bytes that one rank of each pipeline stage holds at its peak, by architecture, layout and pack sizes.

They are counted tensor by tensor as the engine makes them out of megatron-core's parts (0.16.1) and the chosen
backends: plain torch keeps more for the backward than fused kernels do. Plain parts are tested against the tensors of
real models on the CPU.

T tokens of a microbatch; a rank's matrices meet T / cp of them, and between matrices sequence parallelism leaves it one
in tp of these. q and k are the widths of all queries and of all keys of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from typing_extensions import assert_never

from reflectron.engine.config import Config, OptimizerConfig, ParallelConfig
from reflectron.engine.model.architecture import (
    Architecture,
    layer_matrices,
    layers_per_stage,
    linear_layers,
    outer_matrices,
    with_padded_vocabulary,
)
from reflectron.tools.planner.backends import PlannedBackends

GIB = 2**30

# What no tensor of the engine accounts for: CUDA's context, NCCL's buffers, cuBLAS's workspace; and the share of the
# caching allocator's memory that lies idle in between. Assumed.
RESERVED_BYTES = 3 * GIB
FRAGMENTATION = 0.05
# Share of a GPU's memory up to which a layout counts as fitting.
FULLEST = 0.95

# From the head's own limits: float32 logits of a chunk of its plain backend, fourteen such buffers in the backward;
# the Triton backend's codes of 2 bytes a logit.
MOST_CHUNK_LOGITS, _CHUNK_BUFFERS = 2**24, 14
_MOST_CODE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank at its peak."""

    parameters: float
    gradients: float
    """float32 sums over microbatches (``main_grad``)."""
    optimizer: float
    """float32 parameters and moments on the GPU."""
    activations: float
    """What the forwards in flight have kept for their backwards."""
    head: float
    """Loss rows, and scratch of the distillation head."""
    transient: float
    """The layer that is computed at the peak: gradients, gathered tokens, what is computed again."""
    reserved: float
    """Assumed, see ``RESERVED_BYTES`` and ``FRAGMENTATION``."""

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class PipelineStage:
    """The layers that the ranks of one pipeline stage hold."""

    chunks: tuple[int, ...]
    """Layers of each chunk, in the order in which a token passes them."""
    index: int
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> int:
        return sum(self.chunks)


def stages_of(arch: Architecture, parallel: ParallelConfig) -> list[PipelineStage]:
    """Return the pipeline's stages, first to last."""
    count = parallel.pipeline_model_parallel_size
    layers = layers_per_stage(arch.num_layers, parallel)
    return [PipelineStage(layers[index::count], index, index == 0, index == count - 1) for index in range(count)]


def layer_parameters(arch: Architecture, tensor_parallel: int) -> int:
    """Count the parameters of one layer on one rank."""
    return sum(matrix.parameters(tensor_parallel) for matrix in layer_matrices(arch))


def vocabulary_parameters(arch: Architecture, config: Config) -> int:
    """Count the parameters of the embedding, or of the output layer, on one rank."""
    embedding, _, _ = outer_matrices(with_padded_vocabulary(arch, config))
    return embedding.parameters(config.parallel.tensor_model_parallel_size)


def stage_parameters(arch: Architecture, config: Config, stage: PipelineStage) -> int:
    """Count the parameters of one rank of ``stage``."""
    tensor = config.parallel.tensor_model_parallel_size
    embedding, norm, output_layer = outer_matrices(with_padded_vocabulary(arch, config))
    count = stage.layers * layer_parameters(arch, tensor)
    if stage.is_first:
        count += embedding.parameters(tensor)
    if stage.is_last:
        shared = arch.tied_embeddings and stage.is_first
        count += norm.parameters(tensor) + (0 if shared else output_layer.parameters(tensor))
    return count


def optimizer_bytes_of_parameter(optimizer: OptimizerConfig, element: int) -> float:
    """Return the bytes on the GPU that the update rule keeps for a parameter of ``element`` bytes, before sharding."""
    master = 4 if element == 2 else 0
    if optimizer.name == "adafactor":
        return master  # its sums over rows and columns are too few to count
    if optimizer.name == "adamw":
        moments = _dtype_bytes(optimizer.exp_avg_dtype) + _dtype_bytes(optimizer.exp_avg_sq_dtype)
        return (master + moments) * (1 - optimizer.cpu_offload_fraction)
    assert_never(optimizer.name)


def microbatches_in_flight(parallel: ParallelConfig, stage: PipelineStage, microbatches: int) -> float:
    """Return the most forwards of the stage whose backward is still to come, a fraction where chunks take turns."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if chunks == 1:
        return min(microbatches, stages - stage.index)
    passes = 2 * (stages - stage.index - 1) + (chunks - 1) * stages + 1
    return min(microbatches, passes / chunks)


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """What of a layer the backward computes again instead of keeping."""

    core_attention: bool = False
    mlp: bool = False
    everything: bool = False
    """The other parts as well, from the layer's input."""


def recomputed(parallel: ParallelConfig) -> Recomputed:
    """Read ``parallel.recompute`` and ``recompute_modules``."""
    if parallel.recompute == "none":
        return Recomputed()
    if parallel.recompute == "full":
        return Recomputed(core_attention=True, mlp=True, everything=True)
    if parallel.recompute == "selective":
        modules = parallel.recompute_modules
        return Recomputed(core_attention="core_attn" in modules, mlp="mlp" in modules)
    assert_never(parallel.recompute)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that a layer keeps for its backward, by the part that makes them."""

    outside: float
    """Norms and the inputs of linear layers."""
    attention: float
    """Queries, keys, values and the results of attention."""
    core_attention: float
    """What computing the core attention again saves of ``attention``."""
    mlp: float
    """Inside the MLP."""
    input: float
    """The layer's input."""

    @property
    def everything(self) -> float:
        return self.outside + self.attention + self.mlp

    def kept(self, parallel: ParallelConfig) -> float:
        """Return the bytes that ``parallel.recompute`` leaves."""
        again = recomputed(parallel)
        if again.everything:
            return self.input
        bytes_kept = self.everything
        bytes_kept -= self.core_attention if again.core_attention else 0
        bytes_kept -= self.mlp if again.mlp else 0
        return bytes_kept


def layer_activations(
    arch: Architecture, config: Config, backends: PlannedBackends, sequence_length: int
) -> LayerActivations:
    """Count what one layer keeps of a microbatch of ``sequence_length`` tokens."""
    parallel = config.parallel
    tensor, element = parallel.tensor_model_parallel_size, element_bytes(config)
    tokens = sequence_length / parallel.context_parallel_size
    between = tokens / tensor if parallel.sequence_parallel else tokens
    hidden, ffn, q, k = arch.hidden_size, arch.ffn_hidden_size, arch.query_width, arch.key_width
    plain = backends.plain_layers
    if parallel.context_parallel_size == 1:
        # The projection's output lives on through the values; rotated queries and keys.
        inputs = tokens * (2 * q + 3 * k)
    else:
        # Rotated queries, and of the whole pack the keys and values that the two chunks of each segment meet.
        inputs = tokens * q + sequence_length * (1 + 0.5 / parallel.context_parallel_size) * 2 * k
    # The sums of exponentials, and with a call for each segment its output, which is then joined to the others' as the
    # next linear layer's input.
    segments = tokens * (4 * arch.num_attention_heads + (0 if backends.packed_attention else q * element)) / tensor
    attention = segments + (inputs + tokens * q) * element / tensor
    # The projection's output is what rotation and attention are made again from.
    core_attention = segments + (inputs - tokens * (q + 2 * k)) * element / tensor
    if arch.qk_norm:
        attention += tokens * (q + k) * ((4 if plain else 0) + element) / tensor
        core_attention -= tokens * (q + k) * element / tensor
    return LayerActivations(
        outside=2 * between * norm_bytes(hidden, element, backends),
        attention=attention,
        core_attention=core_attention,
        # Gate and input in one tensor, and their product; plain torch keeps the activated gate and the input plus an
        # offset of 0 as well.
        mlp=tokens * (5 if plain else 3) * ffn * element / tensor,
        input=between * hidden * element,
    )


def norm_bytes(width: int, element: int, backends: PlannedBackends) -> float:
    """Return the bytes that a norm keeps of a token, its output included, which is the input of a linear layer.

    A plain norm also keeps its input in float32 (a copy, unless it is float32 already) and the normalised token, a
    fused one its input.
    """
    return width * (4 + 2 * element if backends.plain_layers else 2 * element) + 4


def element_bytes(config: Config) -> int:
    """Return the bytes of an element of a parameter or an activation."""
    return _dtype_bytes(config.model.dtype)


def _dtype_bytes(dtype: Literal["float32", "bfloat16"]) -> int:
    if dtype == "float32":
        return 4
    if dtype == "bfloat16":
        return 2
    assert_never(dtype)


def head_kept_bytes(
    arch: Architecture, config: Config, backends: PlannedBackends, sequence_length: int, rows: float
) -> float:
    """Count the final norm and the loss rows, kept between the last stage's forward and its backward."""
    parallel, element, hidden = config.parallel, element_bytes(config), arch.hidden_size
    tokens = sequence_length / parallel.context_parallel_size
    between = tokens / parallel.tensor_model_parallel_size if parallel.sequence_parallel else tokens
    norm = norm_bytes(hidden, element, backends) - hidden * element
    return between * norm + rows / parallel.context_parallel_size * hidden * element


def head_scratch_bytes(arch: Architecture, config: Config, sequence_length: int, rows: float) -> float:
    """Count the head's passes over the logits, gathered hidden states, their gradient and that of the rows."""
    parallel, element, hidden = config.parallel, element_bytes(config), arch.hidden_size
    rows, tokens = rows / parallel.context_parallel_size, sequence_length / parallel.context_parallel_size
    logits = rows * vocabulary_parameters(arch, config) / hidden
    backend = config.loss.backend
    if backend == "triton":
        scratch = min(_MOST_CODE_BYTES, logits * element) + rows * hidden * element
    elif backend == "reference" or backend == "auto":
        scratch = _CHUNK_BUFFERS * 4 * min(MOST_CHUNK_LOGITS, logits)
    else:
        assert_never(backend)
    return scratch + (rows + 2 * tokens) * hidden * element


def rank_memory(
    arch: Architecture,
    config: Config,
    backends: PlannedBackends,
    stage: PipelineStage,
    *,
    replicas: int,
    microbatches: int,
    sequence_length: int,
    rows: float,
) -> RankMemory:
    """Count the peak of one rank of ``stage``.

    Args:
        arch: the model.
        config: layout, types and optimizer.
        backends: what computes it.
        stage: the pipeline stage.
        replicas: data-parallel ranks; with context-parallel ones they share the optimizer's state.
        microbatches: of a step, on one replica.
        sequence_length: T.
        rows: loss rows of a microbatch.
    """
    parallel, element = config.parallel, element_bytes(config)
    parameters = stage_parameters(arch, config, stage)
    shards = replicas * parallel.context_parallel_size if is_optimizer_sharded(config) else 1
    layer = layer_activations(arch, config, backends, sequence_length)
    in_flight = microbatches_in_flight(parallel, stage, microbatches)
    # Between stages also the received input of every chunk.
    received = layer.input * len(stage.chunks) if parallel.pipeline_model_parallel_size > 1 else 0.0
    rotation = rotation_bytes(arch, config, backends, sequence_length) * len(stage.chunks)
    activations = in_flight * (stage.layers * layer.kept(parallel) + received + rotation)
    head = 0.0
    if stage.is_last:
        head = head_kept_bytes(arch, config, backends, sequence_length, rows)
        head += head_scratch_bytes(arch, config, sequence_length, rows)
    tensors = {
        "parameters": float(parameters * element + fp8_weight_bytes(arch, config, stage)),
        "gradients": 4.0 * parameters,
        "optimizer": optimizer_bytes_of_parameter(config.optimizer, element) * parameters / shards,
        "activations": activations,
        "head": head,
        "transient": _transient(arch, config, backends, stage, layer, sequence_length),
    }
    reserved = RESERVED_BYTES + FRAGMENTATION * (activations + head + tensors["transient"])
    return RankMemory(**tensors, reserved=reserved)


def is_optimizer_sharded(config: Config) -> bool:
    """Return whether replicas share the optimizer's state."""
    return config.parallel.distributed_optimizer and config.optimizer.name == "adamw"


def rotation_bytes(arch: Architecture, config: Config, backends: PlannedBackends, sequence_length: int) -> float:
    """Count a chunk's cosines and sines, made once a microbatch: in the model's type, or the angles in float32."""
    tokens = sequence_length / config.parallel.context_parallel_size
    return tokens * arch.head_dim * (2 * element_bytes(config) if backends.plain_layers else 4)


def fp8_weight_bytes(arch: Architecture, config: Config, stage: PipelineStage) -> float:
    """Count the linear layers' weights in FP8, once more transposed, which last over the microbatches of a step."""
    if config.model.fp8 == "none":
        return 0.0
    return 2.0 * stage.layers * layer_parameters(arch, config.parallel.tensor_model_parallel_size)


def _transient(
    arch: Architecture,
    config: Config,
    backends: PlannedBackends,
    stage: PipelineStage,
    layer: LayerActivations,
    sequence_length: int,
) -> float:
    """Count a layer's backward: what is computed again, gradients inside the MLP, gathered tokens, and the gradient of
    the largest matrix before it is added to its sum."""
    tensor, element = config.parallel.tensor_model_parallel_size, element_bytes(config)
    tokens = sequence_length / config.parallel.context_parallel_size
    again = layer.everything - layer.kept(config.parallel)
    gathered = 2 * tokens * arch.hidden_size * element
    gradients = tokens * (4 if backends.plain_layers else 2) * arch.ffn_hidden_size * element / tensor
    matrix = max(math.prod(one.sizes(tensor)) for one in linear_layers(arch))
    if stage.is_first:
        matrix = max(matrix, vocabulary_parameters(arch, config))
    return again + gathered + gradients + matrix * element
