"""Rotary frequencies of a model, for tokens whose positions have gaps.

Packed rows and student views keep the positions of the original sequences, so the rotation angle of each token is its
own position times the inverse frequencies; nothing is derived from its place in the pack. Angles are float32, as in
transformers, whatever the model's type.

T tokens of a pack, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import assert_never

from reflectron.engine.model.rope_parameters import RopeParameters


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> torch.Tensor:
    """Return inverse frequencies ``[D / 2]``, float32 on the CPU, equal to transformers' ``ROPE_INIT_FUNCTIONS``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    powers = rope.theta**exponent
    inv_freq = 1.0 / powers
    if rope.rope_type == "default":
        return inv_freq
    if rope.rope_type == "linear":
        return inv_freq / rope.scaling["factor"]
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope.scaling)
    if rope.rope_type == "yarn":
        return _yarn(powers, rope, head_dim)
    assert_never(rope.rope_type)


def attention_factor(rope: RopeParameters) -> float:
    """Return the factor on the cosines and sines (yarn's temperature, arXiv 2309.00071 section 3.4), else 1."""
    match rope.rope_type:
        case "default" | "linear" | "llama3":
            return 1.0
        case "yarn":
            return _yarn_attention_factor(rope.scaling)
    assert_never(rope.rope_type)


def softmax_scale(rope: RopeParameters, head_dim: int) -> float:
    """Return the scale of the scores. Yarn scales cosines and sines; scaling the scores by its square is the same."""
    return attention_factor(rope) ** 2 / head_dim**0.5


def rotary_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines ``[T, 1, D]`` of tokens at ``position_ids`` ``[T]``, rounded to ``dtype`` at the end."""
    angles = rotary_angles(position_ids, inv_freq)[:, 0]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` ``[T, heads, D]`` token by token, the halves of a head being its pairs, as in transformers."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_angles(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Return angles ``[T, 1, 1, D]`` float32 at ``position_ids`` ``[T]``, as transformer-engine takes them."""
    angles = torch.outer(position_ids.float(), inv_freq)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def cosines_and_sines(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Return cosines and sines ``[2, T, D / 2]`` float32 of the same angles, as Liger's kernel takes them."""
    angles = torch.outer(position_ids.float(), inv_freq)
    return torch.stack((angles.cos(), angles.sin()))


def _llama3(inv_freq: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Stretch long wavelengths by ``factor``, keep short ones and blend those between (Llama 3.1)."""
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < context / high) * ~(wavelength > context / low)
    return torch.where(is_between, blended, scaled)


def _yarn(powers: torch.Tensor, rope: RopeParameters, head_dim: int) -> torch.Tensor:
    """Interpolate by parts (NTK), arXiv 2309.00071 section 3.2; ``powers`` are the inverse of the unscaled result."""
    scaling = rope.scaling
    context = scaling["original_max_position_embeddings"]
    beta_fast, beta_slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, mscale_all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
