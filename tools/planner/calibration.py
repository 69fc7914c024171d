"""A file of ``reflectron bench calibrate`` in, rates at any size out: tables of what was measured, interpolated.

A table has a rate (operations or bytes a second) at each point of a grid of sizes. Between points both are taken to be
straight lines on logarithmic scales; beyond the grid its edge counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.tools.planner.backends import Backends

# Tables that every file has, and their axes.
TABLES = {
    **{f"product_{kind}": ("tokens", "inner", "outer") for kind in ("forward", "input", "weight")},
    "attention": ("segment_length", "head_dim"),
    **{f"pass_{part}": ("elements",) for part in ("copy", "norm", "rotation", "gated", "update", "sum")},
    "head_reference": ("rows", "hidden", "columns"),
}
# Tables of files made by more than one process, with ``exposed``, the share of a collective that a product beside it
# does not hide. Those made on CUDA have ``head_triton`` as well.
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "transfer")
# Seconds of the host by what they are spent for.
HOST = ("step", "step_layer", "microbatch", "microbatch_layer")


@dataclass(frozen=True)
class Table:
    """Rates at the points of a grid."""

    axes: tuple[tuple[float, ...], ...]
    values: np.ndarray
    """Of as many dimensions as there are axes."""

    def at(self, *sizes: float) -> float:
        """The rate at ``sizes``."""
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
    """What was measured on one machine, by as many processes at once as it names."""

    source: str
    device: str
    dtype: str
    backends: Backends
    """That the tables were measured with: what a run there would take."""
    processes: int
    memory_bytes: float
    """Of a device."""
    tables: dict[str, Table]
    host: dict[str, float]
    """Seconds a step and a microbatch take however small they are, and what each layer adds to them."""


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        ValueError: naming the file and what it lacks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        tables = {name: _table(one) for name, one in content["tables"].items()}
        host = {name: float(content["host_seconds"][name]) for name in HOST}
        missing = TABLES.keys() - tables.keys()
        if missing or any(len(tables[name].axes) != len(axes) for name, axes in TABLES.items()):
            raise ValueError(f"tables are {', '.join(sorted(tables))}")
        return Calibration(
            source=f"measured on {content['device']} in {content['dtype']}, {path}",
            device=str(content["device"]),
            dtype=str(content["dtype"]),
            backends=Backends(**content["backends"]),
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


def _table(content: dict[str, Any]) -> Table:
    axes: Sequence[Sequence[float]] = content["axes"]
    values = np.array(content["rates"], np.float64)
    if values.shape != tuple(len(axis) for axis in axes) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"rates {values.tolist()} on axes {axes}, expected a number above 0 at each point")
    return Table(tuple(tuple(map(float, axis)) for axis in axes), values)
