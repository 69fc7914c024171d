"""The passes of the distillation head on Triton's forward and decode kernels.

The forward computes every logit once, in tiles that never leave the registers, and keeps statistics and, for training,
a code of 2 bytes a logit (``codes.py``). The backward turns the codes into dz in place, with the upstream scale inside
the row weights, and leaves the two products with dz to cuBLAS.

Codes live from the forward to the backward, up to ``MAX_CODE_BYTES``. Gradients formed in the forward would instead
need an fp32 gradient of the matrix beside ``main_grad``, which must wait for the backward: 4 V d bytes against 4 N V,
1.06 GB each at N = d = 8192 and V = 32256. Codes also let one collective serve all rows, and one product with dz all of
a chunk. Rows beyond the limit, and a second backward, recompute their codes to the same bits, which adds a third to the
work on those rows. Besides codes, a chunk needs a copy of its hidden rows (0.27 GB there) and in the forward the
statistics of its tiles (0.08 GB).

Legend
  N pairs, M unpaired rows of the call; n, m those of a chunk, R = 2n + m its rows in the order teacher, student,
  unpaired; d hidden width, the teacher's may differ; V columns of this shard without padding; tiles of the vocabulary;
  dz gradient of the logits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from reflectron.kernels import decode, forward
from reflectron.kernels.codes import CODE_RANGE
from reflectron.kernels.products import add_product, as_factor, store_product
from reflectron.kernels.softmax_statistics import BackwardRows, Statistics, empty_statistics, merge_statistics
from reflectron.kernels.tuning import DECODE_ROWS, DECODE_WARPS, Tile, forward_tile
from reflectron.kernels.types import GradientBuffers, HeadOperands, HeadOptions, RowData

# 1 GiB: 8192 pairs on 32768 columns. A JSD over more rows than fit holds twice this in its forward.
MAX_CODE_BYTES = 2**30
# Rows of codes begin at multiples of 64 elements, whatever V: cuBLAS reads dz in aligned vectors.
CODE_ALIGNMENT = 64


@dataclass(frozen=True)
class RowChunk:
    """The rows whose logits are computed together."""

    pairs: tuple[int, int]  # start and end among the N pairs
    unpaired: tuple[int, int]

    @property
    def n(self) -> int:
        return self.pairs[1] - self.pairs[0]

    @property
    def rows(self) -> int:
        return 2 * self.n + self.unpaired[1] - self.unpaired[0]

    @property
    def groups(self) -> tuple[slice, slice, slice]:
        """Return its part of the teacher, student and unpaired rows of the call."""
        return slice(*self.pairs), slice(*self.pairs), slice(*self.unpaired)

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Return the same rows among its own."""
        return slice(0, self.n), slice(self.n, 2 * self.n), slice(2 * self.n, self.rows)


class HiddenBlock(NamedTuple):
    """Rows of a chunk that meet one output matrix."""

    groups: slice  # of teacher, student, unpaired
    rows: slice  # among the chunk's
    hidden: Tensor  # [rows, d] copy, inactive rows zero: 0 times infinity must not reach the gradient of the matrix


class ChunkCodes(NamedTuple):
    """What a chunk's forward leaves to its backward."""

    planes: Tensor  # [R, stride] int16 or float32
    tile_max: Tensor  # [tiles, R] float32


class RowFacts(NamedTuple):
    """What the decode kernels know of a chunk's rows; see their legend."""

    label: Tensor  # [R] int32
    rows: Tensor  # [4, R] float32
    pairs: Tensor  # [3, n] float32


class TritonPasses:
    """``HeadPasses`` for float32, bfloat16 and float16; keeps the codes of the first chunk for the backward."""

    def __init__(
        self, inputs: HeadOperands, rows: RowData, options: HeadOptions, kept: dict[RowChunk, ChunkCodes]
    ) -> None:
        self.hidden, self.rows, self.options, self.kept = inputs.hidden, rows, options, kept
        own = teachers = inputs.weight[: options.columns].contiguous()
        if inputs.teacher_weight is not None:
            teachers = inputs.teacher_weight[: options.columns].contiguous()
        self.separate, self.matrices = teachers is not own, (teachers, own, own)
        # A label of another shard hits no column, not even a masked one behind the last.
        owned = (rows.column >= 0) & (rows.column < options.columns)
        self.label = torch.where(owned, rows.column, -1).int()
        self.code_type = torch.int16 if own.dtype == torch.bfloat16 else torch.float32
        self.interpreted = knobs.runtime.interpret
        capability = None if self.interpreted else torch.cuda.get_device_capability(own.device)
        self.pair_tile, self.unpaired_tile = (forward_tile(kind, own.dtype, capability) for kind in (True, False))
        self.tiles = cdiv(options.columns, self.pair_tile.columns)
        self.code_stride = cdiv(options.columns, CODE_ALIGNMENT) * CODE_ALIGNMENT

    def statistics(self, training: bool) -> Tensor:
        local = empty_statistics(self.rows.ce_weight)
        for chunk in self._chunks():
            stats, codes = self._forward(chunk, self._blocks(chunk), training and not self.kept)
            if codes is not None:
                self.kept[chunk] = codes
            merged = torch.stack(merge_statistics(stats, self.options.temperature))
            for target, group, part in zip(self._split(local), chunk.groups, chunk.parts, strict=True):
                target[:, group] = merged[:, part]
        return local

    def jsd_sums(self, stats: Statistics) -> Tensor:
        local = stats.max.new_zeros(2, len(self.rows.kl_weight))
        # The kernel reads no weights, and the student's mean score is what it is about to find.
        at = BackwardRows(stats, self.rows.kl_weight, self.rows.ce_weight, self.rows.kl_weight)
        for chunk in self._chunks():
            if chunk.n:
                codes = self.kept.get(chunk) or self._recompute(chunk, self._blocks(chunk))
                local[:, slice(*chunk.pairs)] = self._jsd_tiles(chunk, codes, self._facts(chunk, at)).sum(0)
        return local

    def add_gradients(self, at: BackwardRows, gradients: GradientBuffers) -> None:
        own = teachers = as_factor(self.matrices[1])
        if self.separate:
            teachers = as_factor(self.matrices[0])
        for chunk in self._chunks():
            blocks = self._blocks(chunk)
            # Decoding destroys the codes, and so they leave the store: another backward computes them anew.
            codes = self.kept.pop(chunk, None) or self._recompute(chunk, blocks)
            dz = self._decode(chunk, codes, self._facts(chunk, at)).to(own.dtype)
            first = 0 if self.options.teacher_learns else chunk.n
            for grad, factor, group, part in zip(
                gradients.hidden, (teachers, own, own), chunk.groups, chunk.parts, strict=True
            ):
                if grad is not None and part.start >= first:
                    store_product(dz[part], factor, grad[group])
            for block in blocks:
                total, start = gradients.matrix[block.groups.start], max(block.rows.start, first)
                if total is not None and start < block.rows.stop:
                    h = block.hidden[start - block.rows.start :].to(dz.dtype)
                    add_product(total, dz[start : block.rows.stop].T, h)

    # ---- rows ----

    def _chunks(self) -> Iterator[RowChunk]:
        """Yield rows within the limit of the codes; none for a shard that is all padding."""
        if not self.options.columns:
            return
        limit = max(2, MAX_CODE_BYTES // (self.code_stride * self.code_type.itemsize))
        pair, row, pairs, rows = 0, 0, len(self.hidden[0]), len(self.hidden[2])
        while pair < pairs or row < rows:
            next_pair = min(pairs, pair + limit // 2)
            next_row = min(rows, row + limit - 2 * (next_pair - pair))
            yield RowChunk((pair, next_pair), (row, next_row))
            pair, row = next_pair, next_row

    def _split(self, field: Tensor) -> tuple[Tensor, ...]:
        """Split a field [..., 2N + M] into those of teacher, student and unpaired rows."""
        return field.split([len(hidden) for hidden in self.hidden], -1)

    def _take(self, field: Tensor, chunk: RowChunk) -> Tensor:
        """Return a chunk's part [..., R] of a field [..., 2N + M]."""
        return torch.cat([part[..., rows] for part, rows in zip(self._split(field), chunk.groups, strict=True)], -1)

    def _blocks(self, chunk: RowChunk) -> list[HiddenBlock]:
        """Return the rows of a chunk as one block, or the teacher's and the others where it has its own matrix."""
        inactive = ~self._take(self.rows.active, chunk)[:, None]
        hidden = [group[part] for group, part in zip(self.hidden, chunk.groups, strict=True)]
        blocks = []
        for groups in (slice(0, 1), slice(1, 3)) if self.separate else (slice(0, 3),):
            rows = slice(chunk.parts[groups.start].start, chunk.parts[groups.stop - 1].stop)
            blocks.append(HiddenBlock(groups, rows, torch.cat(hidden[groups]).masked_fill_(inactive[rows], 0)))
        return blocks

    def _facts(self, chunk: RowChunk, at: BackwardRows) -> RowFacts:
        stats = at.stats
        rows = torch.stack([stats.max, stats.sum_exp.reciprocal(), stats.sum_exp_t.reciprocal(), at.ce_weight])
        teacher, student, _ = self._split(stats.sum_exp_t)
        pairs = torch.stack([(teacher / student).log(), at.student_mean, at.kl_weight * self.options.temperature])
        pairs = pairs[:, slice(*chunk.pairs)].contiguous()
        return RowFacts(self._take(self.label, chunk), self._take(rows, chunk), pairs)

    # ---- kernels ----

    @property
    def _code_range(self) -> float:
        return CODE_RANGE * max(self.options.temperature, 1.0)

    def _recompute(self, chunk: RowChunk, blocks: list[HiddenBlock]) -> ChunkCodes:
        codes = self._forward(chunk, blocks, True)[1]
        assert codes is not None
        return codes

    def _forward(self, chunk: RowChunk, blocks: list[HiddenBlock], keep: bool) -> tuple[Tensor, ChunkCodes | None]:
        """Return [tiles, 5, R] statistics of each tile, and the codes where ``keep``."""
        stats = self.rows.ce_weight.new_empty(self.tiles, 5, chunk.rows, dtype=torch.float32)
        planes = stats.new_empty(chunk.rows if keep else 0, self.code_stride, dtype=self.code_type)
        shared = {
            "label": self._take(self.label, chunk),
            "stats": stats,
            "codes": planes,
            "rows": chunk.rows,
            "vocab": self.options.columns,
            "code_stride": self.code_stride,
            "code_range": self._code_range,
            "KEEP": keep,
            "WIDE": self.code_type == torch.float32,
            "SEPARATE": self.separate,
            "UPCAST": self.interpreted,
        }
        temperature, unpaired = self.options.temperature, chunk.rows - 2 * chunk.n
        if chunk.n:
            forward.pair_tile[cdiv(chunk.n, self.pair_tile.rows) * self.tiles,](
                **shared,
                **self._tile_arguments(blocks, self.pair_tile, paired=True),
                n=chunk.n,
                inverse_temperature=1 / temperature,
                TEMPERED=temperature != 1,
            )
        if unpaired:
            forward.unpaired_tile[cdiv(unpaired, self.unpaired_tile.rows) * self.tiles,](
                **shared, **self._tile_arguments(blocks, self.unpaired_tile, paired=False), skipped=2 * chunk.n
            )
        return stats, ChunkCodes(planes, stats[:, 0].clone()) if keep else None

    def _tile_arguments(self, blocks: list[HiddenBlock], tile: Tile, paired: bool) -> dict[str, Any]:
        """Return the factors of the logits as a forward kernel takes them, and the sizes of a tile."""
        factors = [(block.hidden, self.matrices[block.groups.start]) for block in blocks]
        descriptors = tile.descriptors and all(_fits_descriptor(factor) for pair in factors for factor in pair)
        arguments = _factor_arguments(*factors[-1], tile, descriptors)
        if paired and self.separate:
            teachers = _factor_arguments(*factors[0], tile, descriptors)
            arguments |= {f"teacher_{name}": factor for name, factor in teachers.items()}
        return arguments | {
            "DESCRIPTORS": descriptors,
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def _decode_arguments(self, chunk: RowChunk, codes: ChunkCodes, facts: RowFacts, paired: bool) -> dict[str, Any]:
        arguments = {
            "codes": codes.planes,
            "tile_max": codes.tile_max,
            "facts": facts.rows,
            "rows": chunk.rows,
            "code_stride": self.code_stride,
            "code_range": self._code_range,
            "WIDE": self.code_type == torch.float32,
            "BM": DECODE_ROWS,
            "BN": self.pair_tile.columns,
            "num_warps": DECODE_WARPS,
        }
        if paired:
            arguments |= {
                "pair_facts": facts.pairs,
                "n": chunk.n,
                "inverse_temperature": 1 / self.options.temperature,
                "beta": self.options.jsd_beta,
            }
        return arguments

    def _decode(self, chunk: RowChunk, codes: ChunkCodes, facts: RowFacts) -> Tensor:
        """Return [R, V] gradients in the logits, bf16 or fp32, in the memory of the codes."""
        if chunk.n:
            decode.pair_gradients[cdiv(chunk.n, DECODE_ROWS), self.tiles](
                **self._decode_arguments(chunk, codes, facts, True),
                label=facts.label,
                DIVERGENCE=decode.divergence_constant(self.options.divergence),
                INTERPRETED=self.interpreted,
            )
        if unpaired := chunk.rows - 2 * chunk.n:
            decode.unpaired_gradients[cdiv(unpaired, DECODE_ROWS), self.tiles](
                **self._decode_arguments(chunk, codes, facts, False),
                label=facts.label,
                skipped=2 * chunk.n,
                INTERPRETED=self.interpreted,
            )
        gradient_type = torch.bfloat16 if self.code_type == torch.int16 else torch.float32
        return codes.planes.view(gradient_type)[:, : self.options.columns]

    def _jsd_tiles(self, chunk: RowChunk, codes: ChunkCodes, facts: RowFacts) -> Tensor:
        """Return [tiles, 2, n] the sums of each tile."""
        sums = codes.tile_max.new_empty(self.tiles, 2, chunk.n)
        decode.jsd_sums[cdiv(chunk.n, DECODE_ROWS), self.tiles](
            **self._decode_arguments(chunk, codes, facts, True), sums=sums, vocab=self.options.columns
        )
        return sums


def _fits_descriptor(factor: Tensor) -> bool:
    """Return whether the hardware can copy tiles of the factor: from 16-byte aligned rows only."""
    return factor.data_ptr() % 16 == 0 and factor.stride(0) * factor.itemsize % 16 == 0


def _factor_arguments(hidden: Tensor, matrix: Tensor, tile: Tile, descriptors: bool) -> dict[str, Any]:
    if not descriptors:
        return {"hidden": hidden, "weight": matrix, "d": hidden.shape[1]}
    return {
        "hidden": TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
        "weight": TensorDescriptor.from_tensor(matrix, [tile.columns, tile.depth]),
        "d": hidden.shape[1],
    }
