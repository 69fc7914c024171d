"""Floating-point operations of a decoder's matrix products, exactly, from the table of its matrices.

A product of [m, k] and [k, n] is 2 m k n operations. Attention counts the pairs that the causal mask keeps; norms,
RoPE, softmax and the embedding's look-up are not counted, as is usual for MFU. A packed view attends only to itself,
so the cost of views adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.config import Config
from reflectron.engine.data.packing import CostModel
from reflectron.engine.model.architecture import (
    Architecture,
    Matrix,
    linear_layers,
    outer_matrices,
    with_padded_vocabulary,
)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes that set the cost."""

    num_layers: int
    """Transformer layers."""
    matrices: tuple[Matrix, ...]
    """The linear layers of one of them."""
    query_width: int
    """Elements of a token's queries."""
    output_layer: Matrix
    """The output layer with the padding of the vocabulary."""

    @property
    def attention_cost(self) -> float:
        """FLOPs of scores and values in all layers, for each squared token and, once more, for each token."""
        return self.num_layers * 2 * self.query_width

    def product_cost(self, block: Literal["attention", "mlp"]) -> float:
        """Count the FLOPs of a block's linear layers in all layers, for each token."""
        return self.num_layers * sum(_product(matrix) for matrix in self.matrices if matrix.block == block)


def decoder_shape(arch: Architecture, config: Config) -> DecoderShape:
    """Return what the cost of ``arch`` depends on, its vocabulary padded as ``config`` asks."""
    _, _, output_layer = outer_matrices(with_padded_vocabulary(arch, config))
    return DecoderShape(
        num_layers=arch.num_layers,
        matrices=linear_layers(arch),
        query_width=arch.query_width,
        output_layer=output_layer,
    )


def _product(matrix: Matrix) -> float:
    """Count the FLOPs of a token's product with ``matrix``."""
    inputs, outputs = matrix.sizes(tensor_parallel=1)
    return 2 * inputs * outputs


def forward_cost(shape: DecoderShape) -> CostModel:
    """Count the FLOPs of one forward over the whole model, all ranks of a replica together.

    A view of L tokens has L (L + 1) / 2 causal pairs, each a product for the score and one for the value: the L half
    of it is in ``per_token``. Sources: Narayanan et al. 2021 (arXiv 2104.04473), appendix; PaLM (arXiv 2204.02311),
    appendix B. Both count full attention, twice as many pairs; they are extended here to grouped queries, a gated MLP
    and an output layer on the loss rows alone.
    """
    return CostModel(
        per_token=shape.product_cost("attention") + shape.product_cost("mlp") + shape.attention_cost,
        per_token_squared=shape.attention_cost,
        per_row=_product(shape.output_layer),
    )


def training_cost(
    shape: DecoderShape, recompute: Literal["none", "selective", "full"], recompute_modules: Sequence[str] = ()
) -> CostModel:
    """Count the FLOPs of one forward and backward, for ``plan_packs`` and ``training_flops``.

    The backward takes two products for each of the forward's (for the input and for the weight), so 3 times the
    forward; what is recomputed takes one more. ``full`` recomputes the layers but not the output layer.
    """
    forward = forward_cost(shape)
    if recompute == "none":
        per_token = per_token_squared = 0.0
    elif recompute == "full":
        per_token, per_token_squared = forward.per_token, forward.per_token_squared
    elif recompute == "selective":
        per_token_squared = shape.attention_cost if "core_attn" in recompute_modules else 0.0
        per_token = per_token_squared + (shape.product_cost("mlp") if "mlp" in recompute_modules else 0.0)
    else:
        assert_never(recompute)
    return CostModel(
        per_token=3 * forward.per_token + per_token,
        per_token_squared=3 * forward.per_token_squared + per_token_squared,
        per_row=3 * forward.per_row,
    )


def training_flops(cost: CostModel, view_lengths: Sequence[int] | np.ndarray, rows: int) -> float:
    """Sum the FLOPs of views that are packed in any way; padding costs nothing here.

    Model FLOPs utilisation (MFU, PaLM appendix B) takes the cost without recomputation, hardware FLOPs utilisation the
    cost with it.

    Args:
        cost: from ``training_cost``, or ``forward_cost`` for an evaluation.
        view_lengths: int [views], tokens of each teacher, student and generation view.
        rows: loss rows of all views together.
    """
    length = np.asarray(view_lengths, np.float64)
    tokens, squares = float(length.sum()), float((length**2).sum())
    return cost.per_token * tokens + cost.per_token_squared * squares + cost.per_row * rows
