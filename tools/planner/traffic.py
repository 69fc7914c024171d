"""What a step reads and writes in memory beside its matrix products, in bytes for each element, by what makes it.

Counted from the operations of each backend. ``speed`` divides these bytes by a bandwidth; ``bench calibrate`` divides
them by the time that the same operations took, so that a measured rate is that of the very operations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Bytes of a forward and of its backward for each element in bfloat16."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class LayerTraffic:
    """What the parts of a layer move."""

    block: Passes
    """Of the hidden states: a norm, and the addition of a block's output to its input."""
    rotation: Passes
    """Of queries and keys."""
    gated: Passes
    """Of the MLP's width: SwiGLU."""
    operators: int
    """Launches of a forward and backward."""


_ADDED = 6  # two read, one written; in the backward likewise
_FUSED = {
    "block": Passes(forward=4 + _ADDED, backward=6 + _ADDED),
    "rotation": Passes(forward=4, backward=4),
    "gated": Passes(forward=6, backward=10),
}
# torch: a norm is a float32 copy, its square, mean, product, rounding and weight; a rotation two products, a rotated
# half and a sum; SwiGLU silu, an offset of 0 and a product. The others are one kernel each.
LAYERS = {
    "torch": LayerTraffic(
        block=Passes(forward=36 + _ADDED, backward=76 + _ADDED),
        rotation=Passes(forward=24, backward=30),
        gated=Passes(forward=14, backward=26),
        operators=110,
    ),
    "liger": LayerTraffic(**_FUSED, operators=45),
    "transformer_engine": LayerTraffic(**_FUSED, operators=45),
}
# Scaled dot product, a call for each segment, joins their outputs and lays them out by token; kernels for packed rows
# write them so at once.
JOINED = Passes(forward=8, backward=16)
# Gradients of queries, keys and values become one tensor again.
SPLIT = Passes(forward=0, backward=4)
# FP8, for each element of a linear layer's input, output gradient or weight: read, and written twice in one byte, once
# transposed.
QUANTISED = 2 + 2

# Of a weight's gradient, of so many bytes an element: read and added to its float32 sum, or what adding in the product
# itself moves beyond a product that writes a gradient.
SUMMED = {"torch": {2: 2 + 8, 4: 4 + 8}, "fused": {2: 8 - 2, 4: 8 - 4}}
# Passes over float32 logits in the forward and backward of the head's plain backend; over the codes of Triton's.
LOGIT_BYTES = {"reference": 30 * 4, "triton": 5 * 2}
# A step zeroes a float32 gradient, reads it for the norm, reads and writes it to clip it. torch's update then makes ten
# passes of one or two float32 tensors; a fused one reads gradient, parameter and two moments and writes all but the
# gradient. A bfloat16 parameter is written at last.
_AROUND = 4 + 4 + 8
UPDATED = {
    "torch": {2: _AROUND + 80 + 6, 4: _AROUND + 80},
    "fused": {2: _AROUND + 28 + 6, 4: _AROUND + 28},
}
