"""The backends of a planned run: their names, the bytes that their parts move, and the rates measured with them.

``speed`` divides the bytes, counted from the operations of each backend, by a bandwidth. ``reflectron bench calibrate``
divides them by the time of the same operations and writes a table of rates on a grid of sizes; ``read_calibration``
reads it, and a rate between two points lies on a straight line on logarithmic scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.config import AdamwBackend, AttentionBackend, LayersBackend, WeightGradientBackend

Arithmetic = Literal["torch", "fused"]
"""Whether a sum or an update takes a pass for each of torch's operations, or one for all."""


@dataclass(frozen=True, kw_only=True)
class PlannedBackends:
    """The backends that a run is planned with, named as in its section ``backends``."""

    attention: AttentionBackend
    layers: LayersBackend
    weight_gradient: WeightGradientBackend
    adamw: AdamwBackend

    @property
    def packed_attention(self) -> bool:
        """Whether one call attends to all segments, instead of one call each."""
        match self.attention:
            case "sdpa":
                return False
            case (
                "torch_varlen" | "flash_attention_2" | "flash_attention_3" | "flash_attention_4" | "transformer_engine"
            ):
                return True
        assert_never(self.attention)

    @property
    def plain_layers(self) -> bool:
        """Whether norms, rotation and SwiGLU are torch's operations, which keep what they compute in between."""
        match self.layers:
            case "torch":
                return True
            case "liger" | "transformer_engine":
                return False
        assert_never(self.layers)

    @property
    def separate_layers(self) -> LayersBackend:
        """Whose norm, rotation and SwiGLU a calibration measures: transformer-engine's norms are part of products."""
        match self.layers:
            case "torch" | "transformer_engine":
                return "torch"
            case "liger":
                return "liger"
        assert_never(self.layers)

    @property
    def fused_gradient(self) -> Arithmetic:
        """How a linear layer's weight gradient gets into its sum: ``fused`` with the product, or by ``torch``."""
        match self.weight_gradient:
            case "torch":
                return "torch"
            case "addmm" | "apex":
                return "fused"
        assert_never(self.weight_gradient)

    @property
    def fused_update(self) -> Arithmetic:
        """How AdamW's update runs."""
        match self.adamw:
            case "torch":
                return "torch"
            case "torch_fused" | "apex" | "transformer_engine":
                return "fused"
        assert_never(self.adamw)


# What ``auto`` comes to: with what pip installs, with transformer-engine as well, with torch and megatron-core alone.
STACKS = {
    "pip": PlannedBackends(attention="torch_varlen", layers="liger", weight_gradient="addmm", adamw="torch_fused"),
    "te": PlannedBackends(
        attention="transformer_engine",
        layers="transformer_engine",
        weight_gradient="addmm",
        adamw="transformer_engine",
    ),
    "plain": PlannedBackends(attention="sdpa", layers="torch", weight_gradient="torch", adamw="torch"),
}


@dataclass(frozen=True, kw_only=True)
class MemoryPasses:
    """Bytes that a forward and its backward read and write for each element in bfloat16."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class LayerTraffic:
    """Bytes that the parts of a layer move."""

    block: MemoryPasses
    """Hidden states: a norm, and the addition of a block's output to its input."""
    rotation: MemoryPasses
    """Queries and keys."""
    gated: MemoryPasses
    """SwiGLU, for each element of the MLP's width."""
    operators: int
    """Launches of a forward and backward."""


_ADDED = 6  # two read, one written; in the backward likewise
_FUSED = {
    "block": MemoryPasses(forward=4 + _ADDED, backward=6 + _ADDED),
    "rotation": MemoryPasses(forward=4, backward=4),
    "gated": MemoryPasses(forward=6, backward=10),
}
# torch: a norm is a float32 copy, its square, mean, product, rounding and weight; a rotation two products, a rotated
# half and a sum; SwiGLU silu, an offset of 0 and a product. The others are one kernel each.
LAYER_TRAFFIC: dict[LayersBackend, LayerTraffic] = {
    "torch": LayerTraffic(
        block=MemoryPasses(forward=36 + _ADDED, backward=76 + _ADDED),
        rotation=MemoryPasses(forward=24, backward=30),
        gated=MemoryPasses(forward=14, backward=26),
        operators=110,
    ),
    "liger": LayerTraffic(**_FUSED, operators=45),
    "transformer_engine": LayerTraffic(**_FUSED, operators=45),
}
# Scaled dot product, a call for each segment, joins their outputs and lays them out by token; kernels for packed rows
# write them so at once.
JOINED = MemoryPasses(forward=8, backward=16)
# Gradients of queries, keys and values become one tensor again.
SPLIT = MemoryPasses(forward=0, backward=4)
# FP8, for each element of a linear layer's input, output gradient or weight: read, and written twice in one byte, once
# transposed.
QUANTISED = 2 + 2

# Bytes that move for an element of a weight's gradient, by the bytes of its type: read and added to its float32 sum, or
# what adding in the product itself moves beyond a product that writes a gradient.
SUMMED: dict[Arithmetic, dict[int, int]] = {"torch": {2: 2 + 8, 4: 4 + 8}, "fused": {2: 8 - 2, 4: 8 - 4}}
HeadBackend = Literal["reference", "triton"]
# Passes over float32 logits in the forward and backward of the head's plain backend; over the codes of Triton's.
LOGIT_BYTES: dict[HeadBackend, int] = {"reference": 30 * 4, "triton": 5 * 2}
# A step zeroes a float32 gradient, reads it for the norm, reads and writes it to clip it. torch's update then makes ten
# passes of one or two float32 tensors; a fused one reads gradient, parameter and two moments and writes all but the
# gradient. A bfloat16 parameter is written at last.
_AROUND = 4 + 4 + 8
UPDATED: dict[Arithmetic, dict[int, int]] = {
    "torch": {2: _AROUND + 80 + 6, 4: _AROUND + 80},
    "fused": {2: _AROUND + 28 + 6, 4: _AROUND + 28},
}


Product = Literal["forward", "input", "weight"]
"""A linear layer's product: its forward, or its backward for the input or for the weight."""
Pass = Literal["copy", "norm", "rotation", "gated", "update", "sum"]
"""What reads and writes a tensor once or more often."""
# Tables that every file has, and their axes.
RATE_TABLES = {
    **{f"product_{kind}": ("tokens", "inner", "outer") for kind in get_args(Product)},
    "attention": ("segment_length", "head_dim"),
    **{f"pass_{part}": ("elements",) for part in get_args(Pass)},
    "head_reference": ("rows", "hidden", "columns"),
}
# Points of their axes on a device: sides of products, tokens of a segment, elements of a pass, bytes of a collective.
CALIBRATION_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "tokens": (512, 2048, 8192),
        "widths": (512, 2048, 8192, 32768),
        "most_operations": 2**42,
        "cached": 2**28,
        "segments": (256, 1024, 4096),
        "elements": (2**20, 2**24, 2**28),
        "rows": (512, 8192),
        "hidden": (2048, 8192),
        "columns": (32768, 131072),
        "most_head_operations": 2**46,
        "bytes": (2**14, 2**20, 2**24, 2**28),
        "beside": (8192, 4096, 4096),
    },
    "cpu": {
        "tokens": (32, 128, 512, 2048),
        "widths": (64, 256, 1024, 4096),
        "most_operations": 2**31,
        "cached": 2**26,
        "segments": (64, 256, 1024),
        "elements": (2**14, 2**17, 2**20, 2**22, 2**23),
        "rows": (32, 256, 1024),
        "hidden": (64, 256, 1024),
        "columns": (512, 4096, 32768),
        "most_head_operations": 2**35,
        "bytes": (2**10, 2**16, 2**20, 2**24),
        "beside": (512, 512, 1024),
    },
}
# Tables of files made by more than one process, with ``exposed``, the share of a collective that a product beside it
# does not hide. Those made on CUDA have ``head_triton`` as well.
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "transfer"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)
# Seconds of the host by what they are spent for.
HOST_PARTS = ("step", "step_layer", "microbatch", "microbatch_layer")


@dataclass(frozen=True)
class RateTable:
    """Rates, operations or bytes a second, at the points of a grid of sizes."""

    axes: tuple[tuple[float, ...], ...]
    values: np.ndarray
    """One dimension for each axis."""

    def at(self, *sizes: float) -> float:
        """Return the rate at ``sizes``; beyond the grid its edge counts."""
        values = np.log(self.values)
        for points, size in zip(self.axes, sizes, strict=True):
            # One axis after the other, the first of those left.
            place = np.interp(math.log(max(size, 1)), np.log(points), np.arange(len(points)))
            low = min(int(place), len(points) - 2) if len(points) > 1 else 0
            share = float(place) - low
            values = values[low] * (1 - share) + (values[low + 1] * share if share else 0.0)
        return math.exp(float(values))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rates measured on one machine, by as many processes at once as it names."""

    source: str
    device: str
    dtype: str
    backends: PlannedBackends
    """What the tables were measured with: the choice of a run there."""
    processes: int
    memory_bytes: float
    """Memory of a device."""
    tables: dict[str, RateTable]
    host: dict[str, float]
    """Seconds that a step and a microbatch take however small they are, and what each layer adds to them."""


def read_calibration(path: Path) -> Calibration:
    """Read the calibration in a file.

    Raises:
        ValueError: naming the file and what it lacks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        tables = {name: _table(one) for name, one in content["tables"].items()}
        host = {name: float(content["host_seconds"][name]) for name in HOST_PARTS}
        missing = RATE_TABLES.keys() - tables.keys()
        if missing or any(len(tables[name].axes) != len(axes) for name, axes in RATE_TABLES.items()):
            raise ValueError(f"tables are {', '.join(sorted(tables))}")
        return Calibration(
            source=f"measured on {content['device']} in {content['dtype']}, {path}",
            device=str(content["device"]),
            dtype=str(content["dtype"]),
            backends=PlannedBackends(**content["backends"]),
            processes=int(content["processes"]),
            memory_bytes=float(content["memory_bytes"]),
            tables=tables,
            host=host,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no calibration ({type(error).__name__}: {error}), expected a file that reflectron bench "
            "calibrate --out wrote"
        ) from None


def _table(content: dict[str, Any]) -> RateTable:
    axes: Sequence[Sequence[float]] = content["axes"]
    values = np.array(content["rates"], np.float64)
    if values.shape != tuple(len(axis) for axis in axes) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"rates {values.tolist()} on axes {axes}, expected a number above 0 at each point")
    return RateTable(tuple(tuple(map(float, axis)) for axis in axes), values)
