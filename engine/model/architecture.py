"""A decoder's sizes, the one table of its matrices, and how both divide over ranks. No torch: planning needs none.

Whatever depends on a layer's matrices follows from ``layer_matrices``: names and shards in Hugging Face and
megatron-core checkpoints, floating-point operations, the planner's memory and time, what FP8 asks of sizes.
``hf_config`` reads an ``Architecture`` from a ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import assert_never

from reflectron.engine.config import Config, ParallelConfig
from reflectron.engine.model.rope_parameters import RopeParameters

# Hugging Face's modules at the two ends of a model.
HF_EMBEDDING, HF_OUTPUT_LAYER = "model.embed_tokens", "lm_head"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and SwiGLU."""

    family: str
    """The ``model_type`` of its ``config.json``, a key of ``hf_config.FAMILIES``."""
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
    """Whether the query, key and value projections have a bias."""
    qk_norm: bool
    """Whether each query and key head is normalised."""
    tied_embeddings: bool
    """Whether the output layer is the embedding."""

    @property
    def query_width(self) -> int:
        """Elements of a token's queries, all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Elements of a token's keys, and of its values."""
        return self.num_query_groups * self.head_dim


Sharding = Literal["column", "row", "vocabulary", "replicated"]
"""What of a matrix a tensor-parallel rank holds: a share of the output features, of the input features, of the
vocabulary's rows, which padding makes divisible, or all of it."""
ParameterKind = Literal["weight", "bias"]


@dataclass(frozen=True)
class HfPart:
    """Output features of a matrix that Hugging Face keeps as a module of their own."""

    module: str
    """Its name there, ``self_attn.q_proj``; of a layer's matrix without the layer in front."""
    rows: int
    """How many, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of the decoder with its bias, or the vector of a norm."""

    name: str
    """The module in megatron-core, ``self_attention.linear_qkv``; of a layer's matrix inside the layer."""
    inputs: int | None
    """Input features; None for the vector of a norm."""
    sharding: Sharding
    parts: tuple[HfPart, ...]
    """What it is made of, in order of its rows."""
    groups: int | None = None
    """The parts alternate in so many groups of rows, which ranks share out; None for one part below the other on each
    rank."""
    bias: bool = False
    """Whether a bias is added to its output."""
    block: Literal["attention", "mlp"] | None = None
    """Where in a layer a linear layer stands; None for norms and outside the layers."""
    fused_into: str | None = None
    """The linear layer behind a norm, in which transformer-engine holds it; checkpoints name it there in any case."""
    per_expert: bool = False
    """Whether each expert of a layer has one of its own; no dense model has such a matrix."""

    @property
    def outputs(self) -> int:
        """Output features."""
        return sum(part.rows for part in self.parts)

    @property
    def kinds(self) -> tuple[ParameterKind, ...]:
        """Its parameters."""
        return ("weight", "bias") if self.bias else ("weight",)

    @property
    def checkpoint_prefix(self) -> str:
        """What its parameters' names begin with in megatron-core's checkpoints, whichever module holds a norm."""
        return f"{self.name}." if self.fused_into is None else f"{self.fused_into}.layer_norm_"

    def shard_dim(self, kind: ParameterKind) -> int | None:
        """Return the dimension of a parameter that tensor-parallel ranks share out; None where each holds all of it."""
        match self.sharding:
            case "column" | "vocabulary":
                return 0
            case "row":
                return {"weight": 1, "bias": None}[kind]
            case "replicated":
                return None
        assert_never(self.sharding)

    def sizes(self, tensor_parallel: int) -> tuple[int, int]:
        """Return the input and output features of a linear layer on one rank."""
        assert self.inputs is not None, f"{self.name} is no matrix"
        dim = self.shard_dim("weight")
        return (
            self.inputs // (tensor_parallel if dim == 1 else 1),
            self.outputs // (tensor_parallel if dim == 0 else 1),
        )

    def parameters(self, tensor_parallel: int) -> int:
        """Count the elements on one rank, the bias among them."""
        sizes = {"weight": self.outputs * (self.inputs or 1), "bias": self.outputs}
        return sum(sizes[kind] // (1 if self.shard_dim(kind) is None else tensor_parallel) for kind in self.kinds)


def layer_matrices(arch: Architecture) -> tuple[Matrix, ...]:
    """Return the table: matrices and norms of one layer, in the order of the forward."""
    hidden, ffn, query, key = arch.hidden_size, arch.ffn_hidden_size, arch.query_width, arch.key_width
    qkv, fc1 = "self_attention.linear_qkv", "mlp.linear_fc1"
    head_norms = ("q", "k") if arch.qk_norm else ()
    return (
        _norm("input_layernorm", "input_layernorm", hidden, fused_into=qkv),
        Matrix(
            name=qkv,
            inputs=hidden,
            sharding="column",
            parts=(
                HfPart("self_attn.q_proj", query),
                HfPart("self_attn.k_proj", key),
                HfPart("self_attn.v_proj", key),
            ),
            groups=arch.num_query_groups,
            bias=arch.qkv_bias,
            block="attention",
        ),
        *(_norm(f"self_attention.{x}_layernorm", f"self_attn.{x}_norm", arch.head_dim) for x in head_norms),
        Matrix(
            name="self_attention.linear_proj",
            inputs=query,
            sharding="row",
            parts=(HfPart("self_attn.o_proj", hidden),),
            block="attention",
        ),
        _norm("pre_mlp_layernorm", "post_attention_layernorm", hidden, fused_into=fc1),
        Matrix(
            name=fc1,
            inputs=hidden,
            sharding="column",
            parts=(HfPart("mlp.gate_proj", ffn), HfPart("mlp.up_proj", ffn)),
            block="mlp",
        ),
        Matrix(
            name="mlp.linear_fc2", inputs=ffn, sharding="row", parts=(HfPart("mlp.down_proj", hidden),), block="mlp"
        ),
    )


def linear_layers(arch: Architecture) -> tuple[Matrix, ...]:
    """Return the matrices of a layer that tokens are multiplied with."""
    return tuple(matrix for matrix in layer_matrices(arch) if matrix.block is not None)


def outer_matrices(arch: Architecture) -> tuple[Matrix, Matrix, Matrix]:
    """Return embedding, final norm and output layer, which is the embedding again where they are tied."""
    output = HF_EMBEDDING if arch.tied_embeddings else HF_OUTPUT_LAYER
    embedding, output_layer = (
        Matrix(name=name, inputs=arch.hidden_size, sharding="vocabulary", parts=(HfPart(module, arch.vocab_size),))
        for name, module in (("embedding.word_embeddings", HF_EMBEDDING), ("output_layer", output))
    )
    return embedding, _norm("decoder.final_layernorm", "model.norm", arch.hidden_size), output_layer


def _norm(name: str, module: str, width: int, fused_into: str | None = None) -> Matrix:
    parts = (HfPart(module, width),)
    return Matrix(name=name, inputs=None, sharding="replicated", parts=parts, fused_into=fused_into)


def layers_per_stage(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the transformer layers of each pipeline stage, first to last.

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
    """Reject a tensor-parallel size that does not divide what it has to split.

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
    """Return the smallest multiple of ``divisible_by * tensor_model_parallel_size`` that holds the vocabulary."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def with_padded_vocabulary(arch: Architecture, config: Config) -> Architecture:
    """Return ``arch`` with the vocabulary's padding that ``config`` asks for."""
    tensor_parallel = config.parallel.tensor_model_parallel_size
    rows = padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by, tensor_parallel)
    return replace(arch, vocab_size=rows)
