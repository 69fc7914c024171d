"""Hugging Face ``config.json`` -> ``Architecture``, and how it divides over ranks. No torch: planning needs none.

Llama (CodeLlama, DeepSeek-Coder), Qwen2 (Qwen2.5-Coder) and Qwen3 are one decoder with few differences;
``Architecture`` holds exactly what differs. A setting that would change the mathematics and is not implemented is
refused by its key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectron.engine.config import ParallelConfig
from reflectron.engine.json_file import read_object
from reflectron.engine.model.config_keys import check_keys
from reflectron.engine.model.rope_parameters import LARGEST_SIZE, RopeParameters
from reflectron.engine.text import printable

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


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The object in ``config.json``; ``path`` is the file or the folder that holds it.

    Raises:
        ValueError: when there is none or it is not a JSON object.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"{file} is no regular file, expected a Hugging Face config.json")
    try:
        return read_object(file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}, expected a Hugging Face config.json") from None


def parse_architecture(hf_config: dict[str, Any], source: str = "config.json") -> Architecture:
    """Translate a Hugging Face configuration; ``source`` names it in errors.

    Raises:
        ValueError: naming the key whose value is missing or not supported.
    """
    family = hf_config.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{source}: model_type is {family!r}, expected 'llama', 'qwen2' or 'qwen3'")
    check_keys(hf_config, family, source)
    keys = _Keys(hf_config, source)
    heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    groups = keys.optional_integer("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS[family]) or heads
    if heads % groups:
        raise ValueError(
            f"{source}: num_key_value_heads is {groups}, expected a divisor of num_attention_heads ({heads})"
        )
    return Architecture(
        family=family,
        num_layers=keys.integer("num_hidden_layers", _MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=keys.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_head_dim(keys, family, hidden, heads),
        vocab_size=keys.integer("vocab_size"),
        layernorm_epsilon=keys.number("rms_norm_eps", 1e-6),
        initializer_range=keys.number("initializer_range", 0.02),
        rope=RopeParameters.from_hf(hf_config, source, _DEFAULT_POSITIONS[family]),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=keys.flag("tie_word_embeddings"),
    )


@dataclass(frozen=True)
class _Keys:
    """Reads values of ``config.json`` by their kind and names the key of one that is none."""

    hf_config: dict[str, Any]
    source: str

    def integer(self, key: str, most: int = LARGEST_SIZE) -> int:
        value = self.optional_integer(key, None, most)
        if value is None:
            raise ValueError(f"{self.source}: {key} is None, expected a whole number of at least 1")
        return value

    def optional_integer(self, key: str, default: int | None, most: int = LARGEST_SIZE) -> int | None:
        value = self.hf_config.get(key, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{self.source}: {key} is {value!r}, expected a whole number of at least 1")
        if value is not None and value > most:
            raise ValueError(f"{self.source}: {key} is {printable(value, 40)}, expected at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.hf_config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{self.source}: {key} is {value!r}, expected a number of at least 0")
        return value

    def flag(self, key: str) -> bool:
        value = self.hf_config.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} is {value!r}, expected true or false")
        return value


def _head_dim(keys: _Keys, family: Family, hidden: int, heads: int) -> int:
    width = keys.optional_integer("head_dim", _DEFAULT_HEAD_DIM[family])
    if width is None:
        if hidden % heads:
            raise ValueError(
                f"{keys.source}: hidden_size is {hidden}, expected a multiple of num_attention_heads ({heads}), "
                "or a head_dim"
            )
        width = hidden // heads
    if width % 2:
        raise ValueError(
            f"{keys.source}: the width of a head is {width}, expected an even number, since pairs are rotated"
        )
    return width


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
