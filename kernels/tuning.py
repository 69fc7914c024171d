"""Block sizes of the forward kernels: kind of rows, type and compute capability in, one ``Tile`` out.

The tables hold what compiles without spilling much, not what is fastest; nothing here has been timed on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """What one program of a forward kernel computes, and how it is compiled."""

    rows: int
    columns: int  # of the vocabulary; the same for pairs and unpaired rows, whose statistics share one array
    depth: int  # of the hidden width in one step
    warps: int
    stages: int
    descriptors: bool  # tensor descriptors where alignment allows, else pointers


INTERPRETER = Tile(rows=16, columns=32, depth=16, warps=4, stages=1, descriptors=False)
# Two accumulators of 128 x 128 fill the registers of 8 warps. Bytes spilled by a thread, compiled by Triton 3.7.1 for
# bf16 with codes: 4 here, 224 at 64 x 256, 3000 with 4 warps; for sm_80 12 here, 64 at depth 64.
PAIRS = {
    (9, 0): Tile(rows=128, columns=128, depth=64, warps=8, stages=3, descriptors=True),
    (8, 0): Tile(rows=128, columns=128, depth=32, warps=8, stages=3, descriptors=False),
}
# One accumulator of the same size: 64 bytes spilled on sm_90, against 164 at 128 x 256; none on sm_80.
UNPAIRED = {
    (9, 0): Tile(rows=256, columns=128, depth=64, warps=8, stages=3, descriptors=True),
    (8, 0): Tile(rows=128, columns=128, depth=32, warps=8, stages=3, descriptors=False),
}
# Without TF32, which would round the logits, there are no tensor cores to feed.
FP32 = Tile(rows=64, columns=64, depth=32, warps=8, stages=2, descriptors=False)
DECODE_ROWS, DECODE_WARPS = 32, 8  # of the decode kernels, whose columns are those of a forward tile


def forward_tile(paired: bool, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """Return the tile for a compute capability, or for the interpreter where it is None.

    GPUs without an entry take that of sm_80: its 48 KiB of shared memory fit all of them.
    """
    if capability is None:
        return INTERPRETER
    if dtype == torch.float32:
        return FP32
    table = PAIRS if paired else UNPAIRED
    return table.get(capability, table[8, 0])
