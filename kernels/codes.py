"""The code of a logit, with which a forward tile hands its logits to the backward in 2 or 4 bytes each.

A logit is coded relative to the largest of its row in its tile, a = z_t - m_t and b = z_s - m_s. A pair (a, b) becomes
(max(a, b), a - b): the larger one, whose probability matters, and the difference, which carries the divergence at small
KL, each keep their own precision. Both are exact where a and b are 0, so a confident row keeps 1 - p.

A narrow code is 16 bits: ``top`` in fixed point over [-range, 0], range = 32 max(T, 1), where e^a would have lost its
precision in fp16; the difference in fp16. A wide code is the two fp32 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

CODE_RANGE = 32.0  # e^-32 is 1e-14: below it a logit has no influence beside the largest one of its tile


@triton.jit
def encode_top(top: tl.tensor, code_range: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Return the code of ``top`` <= 0, which must not be NaN."""
    if WIDE:
        return top
    else:
        steps = tl.maximum(top, -code_range) * (65535 / code_range) - 0.5  # the conversion cuts towards zero
        return (steps.to(tl.int32) + 32767).to(tl.int16)


@triton.jit
def decode_top(code: tl.tensor, code_range: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    if WIDE:
        return code
    else:
        return (code.to(tl.float32) - 32767) * (code_range / 65535)


@triton.jit
def encode_pair(a: tl.tensor, b: tl.tensor, code_range: tl.tensor, WIDE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return codes of (max(a, b), a - b). A NaN counts as the least number: the other side keeps its value."""
    # Comparisons: a maximum with NaN is the other number on a GPU, but NaN in the interpreter of Triton 3.7.
    if WIDE:
        a = tl.where(a == a, a, float("-inf"))
        b = tl.where(b == b, b, float("-inf"))
        return tl.maximum(a, b), a - b
    else:  # within fp16
        a = tl.where(a > -6e4, a, -6e4)
        b = tl.where(b > -6e4, b, -6e4)
        difference = (a - b).to(tl.float16).to(tl.int16, bitcast=True)
        return encode_top(tl.maximum(a, b), code_range, WIDE), difference


@triton.jit
def decode_pair(
    top: tl.tensor, difference: tl.tensor, code_range: tl.tensor, WIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a, b and a - b of a pair of codes."""
    if not WIDE:
        difference = difference.to(tl.float16, bitcast=True).to(tl.float32)
    top = decode_top(top, code_range, WIDE)
    return top + tl.minimum(difference, 0), top - tl.maximum(difference, 0), difference
