"""Shape of a Llama-like decoder in; floating-point operations of its matrix products out, exactly.

A product of [m, k] and [k, n] is 2 m k n operations. Attention counts the pairs that the causal mask keeps; norms,
RoPE, softmax and the embedding's look-up are not counted, as is usual for MFU. A packed view attends only to itself,
so the cost of views adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reflectron.engine.config import Config
from reflectron.engine.data.packing import CostModel
from reflectron.engine.model.architecture import Architecture, padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes that set the cost, named as in megatron-core's ``TransformerConfig``."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key and value heads."""
    kv_channels: int
    """Width of one head."""
    ffn_hidden_size: int
    """Width inside the MLP."""
    vocab_size: int
    """Columns of the output layer, padding included."""
    gated_linear_unit: bool = True
    """SwiGLU, three matrices in the MLP; two when false."""


def decoder_shape(arch: Architecture, config: Config) -> DecoderShape:
    """The sizes that floating-point operations are counted by."""
    tensor_parallel = config.parallel.tensor_model_parallel_size
    return DecoderShape(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=padded_vocab_size(arch.vocab_size, config.model.make_vocab_size_divisible_by, tensor_parallel),
    )


def forward_cost(shape: DecoderShape) -> CostModel:
    """FLOPs of one forward over the whole model, all ranks of a replica together.

    A view of L tokens has L (L + 1) / 2 causal pairs, each a product for the score and one for the value: the L half
    of it is in ``per_token``. Sources: Narayanan et al. 2021 (arXiv 2104.04473), appendix; PaLM (arXiv 2204.02311),
    appendix B. Both count full attention, twice as many pairs; they are extended here to grouped queries, a gated MLP
    and an output layer on only the rows that bear a loss.
    """
    query = shape.num_attention_heads * shape.kv_channels
    key_value = 2 * shape.num_query_groups * shape.kv_channels
    projections = shape.hidden_size * (query + key_value) + query * shape.hidden_size
    attention = _attention_cost(shape)
    return CostModel(
        per_token=shape.num_layers * 2 * projections + _mlp_cost(shape) + attention,
        per_token_squared=attention,
        per_row=2 * shape.hidden_size * shape.vocab_size,
    )


def _attention_cost(shape: DecoderShape) -> float:
    """Of scores and values in all layers, for each squared token and, once more, for each token."""
    return shape.num_layers * 2 * shape.num_attention_heads * shape.kv_channels


def _mlp_cost(shape: DecoderShape) -> float:
    """Of the MLP in all layers, for each token."""
    matrices = 3 if shape.gated_linear_unit else 2
    return shape.num_layers * 2 * matrices * shape.hidden_size * shape.ffn_hidden_size


def training_cost(
    shape: DecoderShape, recompute: Literal["none", "selective", "full"], recompute_modules: Sequence[str] = ()
) -> CostModel:
    """FLOPs of one forward and backward, for ``plan_packs`` and ``training_flops``.

    The backward takes two products for each of the forward's (for the input and for the weight), so 3 times the
    forward; what is recomputed takes one more. ``full`` recomputes the layers but not the output layer.
    """
    forward = forward_cost(shape)
    per_token = per_token_squared = 0.0
    if recompute == "full":
        per_token, per_token_squared = forward.per_token, forward.per_token_squared
    elif recompute == "selective":
        per_token_squared = _attention_cost(shape) if "core_attn" in recompute_modules else 0.0
        per_token = per_token_squared + (_mlp_cost(shape) if "mlp" in recompute_modules else 0.0)
    return CostModel(
        per_token=3 * forward.per_token + per_token,
        per_token_squared=3 * forward.per_token_squared + per_token_squared,
        per_row=3 * forward.per_row,
    )


def training_flops(cost: CostModel, view_lengths: Sequence[int] | np.ndarray, rows: int) -> float:
    """FLOPs of views that are packed in any way, a sum; padding costs nothing here.

    Model FLOPs utilisation (MFU, PaLM appendix B) takes the cost without recomputation, hardware FLOPs utilisation the
    cost with it.

    Args:
        cost: from ``training_cost``, or ``forward_cost`` for an evaluation.
        view_lengths: int [views], tokens of each teacher, student and generation view.
        rows: rows of all views together that bear a loss.
    """
    length = np.asarray(view_lengths, np.float64)
    tokens, squares = float(length.sum()), float((length**2).sum())
    return cost.per_token * tokens + cost.per_token_squared * squares + cost.per_row * rows
