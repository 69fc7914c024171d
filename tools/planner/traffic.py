"""What a step reads and writes in memory beside its matrix products, in bytes for each element, by what makes it.

Counted from the operations of each backend. ``speed`` divides these bytes by a bandwidth, ``reflectron bench calibrate``
divides them by the time that the same operations took: a measured rate so is that of the very operations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes of a forward for each element in bfloat16; a backward moves twice as much."""

    block: float
    """Of the hidden states: a norm, and the addition of a block's output to its input."""
    rotated: float
    """Of queries and keys: their rotation."""
    joined: float
    """Of attention's output: its segments are joined and laid out by token."""
    gated: float
    """Of the MLP's width: SwiGLU."""


# A norm with a float32 copy, its square, mean, product, rounding and weight: 36, an addition 6. Cosine and sine
# products, rotated halves, their sum, two concatenations. silu, an offset of 0, the product.
PLAIN = LayerTraffic(block=36 + 6, rotated=28, joined=8, gated=14)

# A weight's gradient, of so many bytes an element, is read and added to its float32 sum.
SUMMED = {2: 2 + 8, 4: 4 + 8}
# Passes over float32 logits in the forward and backward of the head's plain backend; over the codes of Triton's.
LOGIT_BYTES = {"reference": 30 * 4, "triton": 5 * 2}
# The update zeroes a float32 gradient, reads it for the norm, reads and writes it to clip it, then reads it, reads and
# writes the float32 parameter and two moments, and writes a bfloat16 parameter.
UPDATED = {2: 4 + 4 + 8 + 4 + 3 * 8 + 2, 4: 4 + 4 + 8 + 4 + 3 * 8}
