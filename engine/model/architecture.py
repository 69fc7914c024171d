"""Hugging Face ``config.json`` -> ``Architecture``, and how it divides over ranks. No torch: planning needs none.

Llama (CodeLlama, DeepSeek-Coder), Qwen2 (Qwen2.5-Coder) and Qwen3 are one decoder with few differences;
``Architecture`` holds exactly what differs. A setting that would change the mathematics and is not implemented is
refused by its key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reflectron.engine.config import ParallelConfig
from reflectron.engine.model.rope_parameters import RopeParameters

Family = Literal["llama", "qwen2", "qwen3"]

# How megatron-core names the norms of a layer in checkpoints, whichever modules hold them: transformer-engine fuses
# each into the linear layer behind it.
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

# What transformers takes for a key that is not there.
_DEFAULT_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_KEY_VALUE_HEADS = {"llama": None, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"llama": None, "qwen2": None, "qwen3": 128}
# Beyond every model; a list of as many layers as a hostile file may name would fill the memory.
_MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU."""

    family: Family
    """Names the Hugging Face classes."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width H of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    head_dim: int
    """Width of a head."""
    vocab_size: int
    """Rows of the embedding, without padding."""
    layernorm_epsilon: float
    """Added to the mean square in RMSNorm."""
    initializer_range: float
    """Standard deviation of a random initialisation."""
    rope: RopeParameters
    """Rotary frequencies."""
    qkv_bias: bool
    """Bias on the query, key and value projections."""
    qk_norm: bool
    """RMSNorm on each query and key head."""
    tied_embeddings: bool
    """The output layer is the embedding."""


def layers_per_stage(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Transformer layers of each pipeline stage, first to last.

    An interleaved pipeline passes every stage once for each of its chunks; the numbers are those of the chunks, in the
    model's order. Without ``parallel.layers_per_stage`` the remainder goes to the stages in the middle, then to the
    first, which carries the embedding, and last of all to the last, which carries the head: 62 layers over 4 stages
    are 15, 16, 16, 15, and over 4 stages of 2 chunks 8, 8, 8, 8, 7, 8, 8, 7, which add up to as many on each stage.

    Raises:
        ValueError: when the numbers do not add up to the model's layers.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if parallel.layers_per_stage:
        if sum(parallel.layers_per_stage) != num_layers:
            raise ValueError(
                f"parallel.layers_per_stage is {list(parallel.layers_per_stage)}, which adds up to "
                f"{sum(parallel.layers_per_stage)}, expected the model's {num_layers} layers"
            )
        return parallel.layers_per_stage
    if stages > num_layers:
        raise ValueError(f"parallel.pipeline_model_parallel_size is {stages}, expected at most {num_layers} (layers)")
    if stages * chunks > num_layers:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size is {chunks}, expected at most {num_layers // stages}: "
            f"the model has {num_layers} layers for {stages} stages"
        )
    base, remainder = divmod(num_layers, stages * chunks)
    by_turn = [chunk * stages + stage for chunk in range(chunks) for stage in (*range(1, stages - 1), 0, stages - 1)]
    takes_one_more = by_turn[:remainder]
    return tuple(base + (part in takes_one_more) for part in range(stages * chunks))


def check_parallel(arch: Architecture, parallel: ParallelConfig) -> None:
    """Refuse a tensor-parallel size that does not divide what it has to split.

    Raises:
        ValueError: naming the dimension.
    """
    size = parallel.tensor_model_parallel_size
    for name, value in (
        ("num_attention_heads", arch.num_attention_heads),
        ("num_key_value_heads", arch.num_query_groups),
        ("intermediate_size", arch.ffn_hidden_size),
    ):
        if value % size:
            raise ValueError(
                f"parallel.tensor_model_parallel_size is {size}, expected a divisor of the model's {name} ({value})"
            )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Smallest multiple of ``divisible_by * tensor_model_parallel_size`` that holds the vocabulary."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
