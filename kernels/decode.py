"""Backward kernels: the codes of a tile become gradients in the logits, in place; and the sums that the JSD needs.

dz takes the bytes of the codes: bf16 in those of a narrow code, fp32 in those of a wide one. The formulas are those of
``reference.ce_gradient``, ``reference.divergence_slope`` and ``reference.log_mixture_ratio``. Rows whose weights are 0
get exactly 0.

Legend
  n pairs, R = 2n + m rows of a chunk in the order teacher, student, unpaired; V columns of this shard
  codes [R, stride], tile_max [tiles, R] fp32; label [R] int32
  facts [4, R] fp32: max, 1 / sum e^(z - max), 1 / sum e^((z - max) / T), cross-entropy weight
  pair_facts [3, n] fp32: log of the ratio teacher / student of sum e^((z - max) / T), E_s[score], T x divergence weight
"""

from __future__ import annotations

import triton
import triton.language as tl
from typing_extensions import assert_never

from reflectron.kernels.codes import decode_pair, decode_top
from reflectron.kernels.types import Divergence

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


def divergence_constant(divergence: Divergence) -> tl.constexpr:
    """Return what ``pair_gradients`` takes for the divergence."""
    if divergence == "forward_kl":
        return FORWARD_KL
    if divergence == "reverse_kl":
        return REVERSE_KL
    if divergence == "jsd":
        return JSD
    assert_never(divergence)


@triton.jit
def expm1_negative(y: tl.tensor) -> tl.tensor:
    """Return e^y - 1 for y <= 0 to fp32 precision, by Taylor's series where the difference would cancel."""
    series = 1 + y * (1 / 6) * (1 + y * (1 / 7))
    series = 1 + y * (1 / 3) * (1 + y * (1 / 4) * (1 + y * (1 / 5) * series))
    return tl.where(y > -0.5, y * (1 + y * 0.5 * series), tl.exp(y) - 1)


@triton.jit
def log1p_negative(s: tl.tensor) -> tl.tensor:
    """Return log(1 + s) for -1 < s <= 0 to fp32 precision, by the series of 2 atanh(s / (2 + s)) near 0."""
    r = s / (2 + s)
    r2 = r * r
    series = 2 * r * (1 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7))))
    return tl.where(s > -0.25, series, tl.log(1 + s))


@triton.jit
def log_mixture_ratio(u: tl.tensor, beta: tl.tensor) -> tl.tensor:
    shrink = expm1_negative(-tl.abs(u))
    return tl.where(u > 0, u + log1p_negative((1 - beta) * shrink), log1p_negative(beta * shrink))


@triton.jit
def to_gradient(value: tl.tensor, WIDE: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the number in the type of the codes' bytes: fp32, or the bits of bf16."""
    if WIDE:
        return value
    elif INTERPRETED:  # Triton 3.7's interpreter cuts off instead of rounding to nearest even
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, bits, 0x7FC0).to(tl.int16)
    else:
        return value.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def weighted(weight: tl.tensor, value: tl.tensor) -> tl.tensor:
    """Return weight [BM] times value [BM, BN], exactly 0 where the weight is 0 even if the value is not finite."""
    return tl.where(weight[:, None] == 0, 0.0, weight[:, None] * value)


@triton.jit
def shift_to_row(
    centred: tl.tensor, tile_max: tl.tensor, facts: tl.tensor, row: tl.tensor, valid: tl.tensor
) -> tl.tensor:
    """Return z - (row's maximum) from z - (tile's maximum)."""
    shift = tl.load(tile_max + row, mask=valid, other=0.0) - tl.load(facts + row, mask=valid, other=0.0)
    return centred + shift[:, None]


@triton.jit
def ce_gradient(
    centred: tl.tensor,
    columns: tl.tensor,
    label: tl.tensor,
    facts: tl.tensor,
    rows: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
) -> tl.tensor:
    """Return weight (p - 1_label); ``centred`` is z - (row's maximum)."""
    inverse_sum = tl.load(facts + rows + row, mask=valid, other=0.0)
    weight = tl.load(facts + 3 * rows + row, mask=valid, other=0.0)
    hit = columns[None, :] == tl.load(label + row, mask=valid, other=-1)[:, None]
    return weighted(weight, tl.exp(centred) * inverse_sum[:, None] - tl.where(hit, 1.0, 0.0))


@triton.jit
def load_pairs(
    at_t: tl.tensor,
    at_s: tl.tensor,
    valid: tl.tensor,
    tile_max: tl.tensor,
    facts: tl.tensor,
    pair_facts: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,
    row: tl.tensor,
    valid_row: tl.tensor,
    inverse_temperature: tl.tensor,
    code_range: tl.tensor,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return z - (row's maximum) of teacher and student, and p_t, p_s and u = log p_t - log p_s at temperature T."""
    top, difference = tl.load(at_t, mask=valid, other=0), tl.load(at_s, mask=valid, other=0)
    a, b, difference = decode_pair(top, difference, code_range, WIDE)
    a = shift_to_row(a, tile_max, facts, row, valid_row)
    b = shift_to_row(b, tile_max, facts, n + row, valid_row)
    inverse_t = tl.load(facts + 2 * rows + row, mask=valid_row, other=0.0)
    inverse_s = tl.load(facts + 2 * rows + n + row, mask=valid_row, other=0.0)
    log_ratio = tl.load(pair_facts + row, mask=valid_row, other=0.0)
    # The shift of the difference is that of the two maxima, formed before the large numbers meet.
    difference = shift_to_row(difference, tile_max, facts, row, valid_row)
    difference -= shift_to_row(tl.zeros_like(difference), tile_max, facts, n + row, valid_row)
    u = difference * inverse_temperature - log_ratio[:, None]
    p_t = tl.exp(a * inverse_temperature) * inverse_t[:, None]
    return a, b, p_t, tl.exp(b * inverse_temperature) * inverse_s[:, None], u


@triton.jit(do_not_specialize=["n", "rows"])
def pair_gradients(
    codes: tl.tensor,  # [R, code_stride]; overwritten by dz
    tile_max: tl.tensor,
    label: tl.tensor,
    facts: tl.tensor,
    pair_facts: tl.tensor,
    n: tl.tensor,
    rows: tl.tensor,  # R
    code_stride: tl.tensor,  # at least V, and the padding between is read and written too
    inverse_temperature: tl.tensor,
    beta: tl.tensor,  # of the JSD
    code_range: tl.tensor,
    DIVERGENCE: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of a forward tile
) -> None:
    """Compute dz of BM teacher and BM student rows in one tile of the vocabulary."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid_row = row < n
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    tile_max += tl.program_id(1).to(tl.int64) * rows
    valid = valid_row[:, None] & (columns[None, :] < code_stride)
    at_t = codes + row.to(tl.int64)[:, None] * code_stride + columns[None, :]
    at_s = at_t + n.to(tl.int64) * code_stride
    a, b, p_t, p_s, u = load_pairs(
        at_t, at_s, valid, tile_max, facts, pair_facts, n, rows, row, valid_row, inverse_temperature, code_range, WIDE
    )
    if DIVERGENCE == FORWARD_KL:  # p_s - p_t without cancellation where the two are close
        slope = tl.where(u > 0, p_t, -p_s) * expm1_negative(-tl.abs(u))
    else:
        student_mean = tl.load(pair_facts + n + row, mask=valid_row, other=0.0)[:, None]
        if DIVERGENCE == REVERSE_KL:
            slope = p_s * (-u - student_mean)
        else:
            tl.static_assert(DIVERGENCE == JSD)
            slope = (1 - beta) * p_s * (-log_mixture_ratio(u, beta) - student_mean)
    kl_weight = tl.load(pair_facts + 2 * n + row, mask=valid_row, other=0.0)
    dz_t = ce_gradient(a, columns, label, facts, rows, row, valid_row)
    dz_s = ce_gradient(b, columns, label, facts, rows, n + row, valid_row) + weighted(kl_weight, slope)
    tl.store(at_t, to_gradient(dz_t, WIDE, INTERPRETED), mask=valid)
    tl.store(at_s, to_gradient(dz_s, WIDE, INTERPRETED), mask=valid)


@triton.jit(do_not_specialize=["skipped", "rows"])
def unpaired_gradients(
    codes: tl.tensor,
    tile_max: tl.tensor,
    label: tl.tensor,
    facts: tl.tensor,
    skipped: tl.tensor,  # 2n
    rows: tl.tensor,
    code_stride: tl.tensor,
    code_range: tl.tensor,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Compute dz of BM unpaired rows in one tile of the vocabulary."""
    row = skipped + tl.program_id(0) * BM + tl.arange(0, BM)
    valid_row = row < rows
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    tile_max += tl.program_id(1).to(tl.int64) * rows
    valid = valid_row[:, None] & (columns[None, :] < code_stride)
    at = codes + row.to(tl.int64)[:, None] * code_stride + columns[None, :]
    centred = decode_top(tl.load(at, mask=valid, other=0), code_range, WIDE)
    centred = shift_to_row(centred, tile_max, facts, row, valid_row)
    dz = ce_gradient(centred, columns, label, facts, rows, row, valid_row)
    tl.store(at, to_gradient(dz, WIDE, INTERPRETED), mask=valid)


@triton.jit(do_not_specialize=["n", "rows"])
def jsd_sums(
    codes: tl.tensor,
    tile_max: tl.tensor,
    facts: tl.tensor,
    pair_facts: tl.tensor,
    sums: tl.tensor,  # [tiles, 2, n] fp32: sum p_t (u - g), -sum p_s g
    n: tl.tensor,
    rows: tl.tensor,
    vocab: tl.tensor,
    code_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    beta: tl.tensor,
    code_range: tl.tensor,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Return the two halves of the Jensen-Shannon divergence, summed over one tile; g = log(m / p_s)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    valid_row = row < n
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    tile_max += tl.program_id(1).to(tl.int64) * rows
    valid = valid_row[:, None] & (columns[None, :] < code_stride)
    at_t = codes + row.to(tl.int64)[:, None] * code_stride + columns[None, :]
    at_s = at_t + n.to(tl.int64) * code_stride
    _, _, p_t, p_s, u = load_pairs(
        at_t, at_s, valid, tile_max, facts, pair_facts, n, rows, row, valid_row, inverse_temperature, code_range, WIDE
    )
    g = log_mixture_ratio(u, beta)
    valid &= columns[None, :] < vocab
    out = sums + tl.program_id(1).to(tl.int64) * 2 * n + row
    tl.store(out, tl.sum(tl.where(valid, p_t * (u - g), 0.0), 1), mask=valid_row)
    tl.store(out + n, -tl.sum(tl.where(valid, p_s * g, 0.0), 1), mask=valid_row)
