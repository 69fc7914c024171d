"""Forward kernels: one program computes one tile of logits, its softmax statistics and, for training, its codes.

``stats`` have the layout that ``merge_statistics`` takes, a tile of the vocabulary being to a shard what a shard is to
the vocabulary. No program reads what another one wrote, so the result does not depend on their order. Logits stay in
fp32 registers.

Legend
  n pairs, R = 2n + m rows of a chunk in the order teacher, student, unpaired; d hidden width; V columns of this shard
  hidden [R, d], weight [V, d], both contiguous; a tile is [BM, BN] logits, summed over d in steps of BK
  stats [tiles, 5, R] fp32: max, sum e^(z - max), sum e^((z - max) / T), label logit, sum e^((z - max) / T) x
  codes [R, stride]: rows of top, rows of difference, rows of unpaired top (``codes.py``)
  SEPARATE: the teacher's rows [n, d_t] and its matrix [V, d_t] are arguments of their own; hidden holds the other rows
"""

from __future__ import annotations

import triton
import triton.language as tl

from reflectron.kernels.codes import encode_pair, encode_top

# Row blocks that share the tiles of the output matrix in the L2 cache: 8 of them by 16 tiles of the vocabulary are one
# wave on 132 processors.
GROUP = tl.constexpr(8)


@triton.jit
def tile_position(rows: tl.tensor, vocab: tl.tensor, BM: tl.constexpr, BN: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return this program's row block and tile of the vocabulary; programs go down a group of row blocks first."""
    tiles = tl.cdiv(vocab, BN)
    group = tl.program_id(0) // (GROUP * tiles)
    height = tl.minimum(tl.cdiv(rows, BM) - group * GROUP, GROUP)
    index = tl.program_id(0) % (GROUP * tiles)
    return group * GROUP + index % height, index // height


@triton.jit
def offsets(first: tl.tensor, last: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return offsets of BLOCK rows from ``first``; those beyond ``last`` repeat it, so that loads need no mask."""
    return tl.minimum(first + tl.arange(0, BLOCK), last).to(tl.int64)[:, None] * stride


@triton.jit
def load_factor(
    matrix: tl.tensor,
    row: tl.tensor,
    row_offsets: tl.tensor,
    k: tl.tensor,
    d: tl.tensor,
    BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
) -> tl.tensor:
    """Load columns [k, k + BK) of a block of rows, zero beyond d."""
    if DESCRIPTORS:
        return matrix.load([row, k])
    else:
        column = k + tl.arange(0, BK)[None, :]
        return tl.load(matrix + row_offsets + column, mask=column < d, other=0.0)


@triton.jit
def multiply(h: tl.tensor, w: tl.tensor, logits: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    if UPCAST:  # Triton 3.7's interpreter multiplies the raw bits of bf16
        h, w = h.to(tl.float32), w.to(tl.float32)
    return tl.dot(h, w.T, logits, input_precision="ieee")


@triton.jit
def tile_logits(
    hidden: tl.tensor,
    weight: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    first_column: tl.tensor,
    vocab: tl.tensor,
    d: tl.tensor,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Return the logits of the tile that begins at row ``first`` of ``rows`` and ``first_column`` of ``vocab``."""
    hidden_rows = offsets(first, rows - 1, d, BM)
    weight_rows = offsets(first_column, vocab - 1, d, BN)
    z = tl.zeros((BM, BN), tl.float32)
    for k in range(0, d, BK):
        w = load_factor(weight, first_column, weight_rows, k, d, BK, DESCRIPTORS)
        z = multiply(load_factor(hidden, first, hidden_rows, k, d, BK, DESCRIPTORS), w, z, UPCAST)
    return z


@triton.jit
def store_statistics(
    stats: tl.tensor,
    rows: tl.tensor,
    valid_row: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    peak: tl.tensor,
    centred: tl.tensor,
    x: tl.tensor,
    label_logit: tl.tensor,
    inverse_temperature: tl.tensor,
    TEMPERED: tl.constexpr,
) -> None:
    """Write the five statistics of a tile's rows; ``centred`` [BM, BN] is -inf beyond the vocabulary."""
    exp = tl.exp(centred)
    out = stats + tile.to(tl.int64) * 5 * rows + row
    tl.store(out, peak, mask=valid_row)
    tl.store(out + rows, tl.sum(exp, 1), mask=valid_row)
    if TEMPERED:
        exp = tl.exp(centred * inverse_temperature)
    tl.store(out + 2 * rows, tl.sum(exp, 1), mask=valid_row)
    tl.store(out + 3 * rows, label_logit, mask=valid_row)
    tl.store(out + 4 * rows, tl.sum(exp * x, 1), mask=valid_row)


@triton.jit
def pick_label(logits: tl.tensor, columns: tl.tensor, label: tl.tensor, valid_row: tl.tensor) -> tl.tensor:
    """Return [BM] the logit of each row's label, -inf where it is outside this tile."""
    column = tl.load(label, mask=valid_row, other=-1)
    return tl.max(tl.where(columns[None, :] == column[:, None], logits, float("-inf")), 1)


@triton.jit(do_not_specialize=["n", "rows"])
def pair_tile(
    hidden: tl.tensor,  # [R, d] or its descriptor with blocks [BM, BK]
    weight: tl.tensor,  # [V, d] or its descriptor with blocks [BN, BK]
    label: tl.tensor,  # [R] int32 column of each row's label, -1 where this shard has none
    stats: tl.tensor,  # [tiles, 5, R]
    codes: tl.tensor,  # [R, code_stride]
    n: tl.tensor,
    rows: tl.tensor,  # R
    vocab: tl.tensor,  # V
    d: tl.tensor,
    code_stride: tl.tensor,
    inverse_temperature: tl.tensor,
    code_range: tl.tensor,
    TEMPERED: tl.constexpr,  # T is not 1
    KEEP: tl.constexpr,  # write codes
    WIDE: tl.constexpr,  # codes are fp32
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SEPARATE: tl.constexpr = False,
    teacher_hidden: tl.tensor | None = None,  # as hidden and weight, with blocks of the same size
    teacher_weight: tl.tensor | None = None,
    teacher_d: tl.tensor | None = None,
) -> None:
    """Compute teacher and student logits of the same BM pairs; a shared matrix's tile is loaded once for both."""
    block, tile = tile_position(n, vocab, BM, BN)
    first, first_column = block * BM, tile * BN
    if SEPARATE:
        z_t = tile_logits(
            teacher_hidden, teacher_weight, first, n, first_column, vocab, teacher_d, DESCRIPTORS, UPCAST, BM, BN, BK
        )
        z_s = tile_logits(hidden, weight, first, n, first_column, vocab, d, DESCRIPTORS, UPCAST, BM, BN, BK)
    else:
        teacher_rows = offsets(first, n - 1, d, BM)
        student_rows = teacher_rows + n.to(tl.int64) * d
        weight_rows = offsets(first_column, vocab - 1, d, BN)
        z_t = tl.zeros((BM, BN), tl.float32)
        z_s = tl.zeros((BM, BN), tl.float32)
        for k in range(0, d, BK):
            w = load_factor(weight, first_column, weight_rows, k, d, BK, DESCRIPTORS)
            z_t = multiply(load_factor(hidden, first, teacher_rows, k, d, BK, DESCRIPTORS), w, z_t, UPCAST)
            z_s = multiply(load_factor(hidden, n + first, student_rows, k, d, BK, DESCRIPTORS), w, z_s, UPCAST)

    row = first + tl.arange(0, BM)
    valid_row = row < n
    columns = first_column + tl.arange(0, BN)
    x = (z_t - z_s) * inverse_temperature
    z_t = tl.where(columns[None, :] < vocab, z_t, float("-inf"))
    z_s = tl.where(columns[None, :] < vocab, z_s, float("-inf"))
    m_t, m_s = tl.max(z_t, 1), tl.max(z_s, 1)
    y_t = pick_label(z_t, columns, label + row, valid_row)
    y_s = pick_label(z_s, columns, label + n + row, valid_row)
    a, b = z_t - m_t[:, None], z_s - m_s[:, None]
    store_statistics(stats, rows, valid_row, row, tile, m_t, a, x, y_t, inverse_temperature, TEMPERED)
    store_statistics(stats, rows, valid_row, n + row, tile, m_s, b, x, y_s, inverse_temperature, TEMPERED)
    if KEEP:
        top, difference = encode_pair(a, b, code_range, WIDE)
        # Up to the stride, not V: the padding is there, and an aligned limit lets a thread store many codes at once.
        valid = valid_row[:, None] & (columns[None, :] < code_stride)
        out = codes + row.to(tl.int64)[:, None] * code_stride + columns[None, :]
        tl.store(out, top, mask=valid)
        tl.store(out + n.to(tl.int64) * code_stride, difference, mask=valid)


@triton.jit(do_not_specialize=["skipped", "rows"])
def unpaired_tile(
    hidden: tl.tensor,  # as above
    weight: tl.tensor,
    label: tl.tensor,
    stats: tl.tensor,
    codes: tl.tensor,
    skipped: tl.tensor,  # 2n, the rows before the unpaired ones
    rows: tl.tensor,
    vocab: tl.tensor,
    d: tl.tensor,
    code_stride: tl.tensor,
    code_range: tl.tensor,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SEPARATE: tl.constexpr = False,
) -> None:
    """Compute logits of BM unpaired rows; their divergence statistics are written as T = 1 and x = 0 make them."""
    block, tile = tile_position(rows - skipped, vocab, BM, BN)
    first, first_column = skipped + block * BM, tile * BN
    teachers = skipped // 2 if SEPARATE else 0  # rows that hidden does not hold
    z = tile_logits(
        hidden, weight, first - teachers, rows - teachers, first_column, vocab, d, DESCRIPTORS, UPCAST, BM, BN, BK
    )

    row = first + tl.arange(0, BM)
    valid_row = row < rows
    columns = first_column + tl.arange(0, BN)
    z = tl.where(columns[None, :] < vocab, z, float("-inf"))
    peak = tl.max(z, 1)
    centred = z - peak[:, None]
    label_logit = pick_label(z, columns, label + row, valid_row)
    store_statistics(stats, rows, valid_row, row, tile, peak, centred, 0.0, label_logit, 1.0, False)
    if KEEP:
        valid = valid_row[:, None] & (columns[None, :] < code_stride)
        top = tl.where(centred == centred, centred, 0.0)
        out = codes + row.to(tl.int64)[:, None] * code_stride + columns[None, :]
        tl.store(out, encode_top(top, code_range, WIDE), mask=valid)
