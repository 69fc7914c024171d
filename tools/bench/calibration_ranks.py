"""What one of the processes of ``reflectron bench calibrate`` measures: rates of the parts that a training step is of.

All processes measure the same at the same time, because in a run they share memory, caches and links as well. Each is
made by the back ends that a run here would take: products as a linear layer and its backward lay them out, gradients
added to their sums; passes over memory by the engine's own modules; the head and the update whole; the host by steps of
a model so small that nothing else takes time.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reflectron.engine.config import Config
from reflectron.kernels.distill_head import Backend
from reflectron.kernels.products import add_product, as_factor
from reflectron.tools.planner.backends import Backends
from reflectron.tools.planner.calibration import COLLECTIVES
from reflectron.tools.planner.traffic import LAYERS, SUMMED, UPDATED

# Sides of products, tokens of a segment, elements of a pass, bytes of a collective.
SIZES: dict[str, dict[str, Any]] = {
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
_HEAD_DIMS = (64, 128)
# Rounds of a measurement go on for so long, but there are as many as these.
_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 0.03, 2, 30
# What ranks wait for each other differs from one time to the next.
_OFTEN = 8
# Of a difference between two times: what is less is nothing.
_LEAST_SECONDS = 1e-6


class Clock:
    """Times actions that all ranks begin together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, action: Callable[[], object], least: float = _SECONDS) -> float:
        """Seconds of ``action`` after one that is not counted, the longest of any rank.

        The least on the CPU, where whatever else the machine does can only add to it; the median on CUDA, whose clocks
        sink with use.
        """
        self._finish(action)
        rounds = torch.tensor(least / max(self._finish(action), 1e-9))
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
        times = [self._finish(action) for _ in range(min(max(int(rounds), _LEAST_ROUNDS), _MOST_ROUNDS))]
        longest = torch.tensor(statistics.median(times) if self.device.type == "cuda" else min(times))
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return float(longest)

    def rate(self, amount: float, action: Callable[[], object]) -> float:
        """``amount`` over the seconds of ``action``."""
        return amount / self.seconds(action)

    def _finish(self, action: Callable[[], object]) -> float:
        self._wait()
        dist.barrier()
        began = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(device: torch.device) -> dict[str, Any]:
    """All tables of ``planner.calibration``, and the host's seconds."""
    from reflectron.engine.model.backends.choose import choose_backends
    from reflectron.tools.bench.calibration_model import host_seconds

    chosen: dict[str, Any] = choose_backends(Config(), None, device).names
    backends = Backends(**chosen)
    clock, sizes = Clock(device), SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        tables = {
            **_products(clock, sizes, dtype, backends.fused_gradient == "fused"),
            "attention": _attention(clock, backends.attention, sizes["segments"], dtype),
            **_passes(clock, backends, sizes["elements"], dtype),
            **_heads(clock, sizes, dtype),
        }
        if dist.get_world_size() > 1:
            tables |= _collectives(clock, sizes, dtype)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "backends": vars(backends),
        "tables": tables,
        "host_seconds": host_seconds(clock),
    }


def _table(axes: Sequence[Sequence[float]], rate: Callable[..., float]) -> dict[str, Any]:
    values = np.array([rate(*sizes) for sizes in itertools.product(*axes)])
    return {"axes": [list(axis) for axis in axes], "rates": values.reshape([len(axis) for axis in axes]).tolist()}


def _tables(
    axes: Sequence[Sequence[int]], most: int, factor: int, rates: Callable[..., dict[str, float]]
) -> dict[str, Any]:
    """Tables by name over three sides of a product. One of more than ``most`` operations, ``factor`` times its sides,
    is taken to be as fast as one whose longest side is shorter."""
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for point in itertools.product(*axes):
        if factor * math.prod(point) <= most:
            found[point] = rates(*point)
            continue
        longest = point.index(max(point))
        shorter = axes[longest][axes[longest].index(point[longest]) - 1]
        found[point] = found[(*point[:longest], shorter, *point[longest + 1 :])]
    names = found[tuple(axis[0] for axis in axes)]
    return {name: _table(axes, lambda *point, name=name: found[point][name]) for name in names}


def _products(clock: Clock, sizes: dict[str, Any], dtype: torch.dtype, adds: bool) -> dict[str, Any]:
    """y = x W^T, and in the backward dx = dy W and dW = dy^T x, summed in float32; operations a second."""
    names = ("product_forward", "product_input", "product_weight")

    def rates(tokens: int, inner: int, outer: int) -> dict[str, float]:
        actions = _linear_layer(clock.device, dtype, sizes["cached"], (tokens, inner, outer), adds)
        return {name: clock.rate(2 * tokens * inner * outer, act) for name, act in zip(names, actions, strict=True)}

    return _tables((sizes["tokens"], sizes["widths"], sizes["widths"]), sizes["most_operations"], 2, rates)


def _linear_layer(
    device: torch.device, dtype: torch.dtype, cached: int, size: tuple[int, int, int], adds: bool
) -> tuple[Callable[[], None], ...]:
    """Its forward, and the two products of its backward.

    Each call takes other weights, gradients and kept inputs: in a step they have left the caches since they were last
    used. ``adds`` says whether the product itself adds to the gradients' float32 sums.
    """
    tokens, inner, outer = size
    copies = max(1, min(64, cached // (inner * (outer + tokens) * dtype.itemsize)))
    x, weight, dy = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((tokens, inner), (outer, inner), (tokens, outer))
    )
    turns = itertools.cycle(
        [(x.clone(), weight.clone(), torch.zeros_like(weight, dtype=torch.float32)) for _ in range(copies)]
    )

    def forward() -> None:
        x, weight, _ = next(turns)
        x.matmul(weight.t())

    def gradient_of_input() -> None:
        _, weight, _ = next(turns)
        dy.matmul(weight)

    def gradient_of_weight() -> None:
        x, _, total = next(turns)
        if adds:
            add_product(total, as_factor(dy).t(), as_factor(x))
        else:
            total.add_(dy.t().matmul(x))

    return forward, gradient_of_input, gradient_of_weight


def _attention(clock: Clock, backend: str, segments: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Of a pack of equal segments, forward and backward, by what a run would take; counts causal pairs alone."""
    from reflectron.tools.bench.calibration_model import core_attention

    def rate(length: int, width: int) -> float:
        heads, count = 8, max(1, segments[-1] // length)
        attend = core_attention(backend, clock.device, dtype, length, count, heads, width)
        return clock.rate(3 * 4 * heads * width * count * length * (length + 1) / 2, attend)

    return _table((segments, _HEAD_DIMS), rate)


def _passes(clock: Clock, backends: Backends, elements: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Bytes a second of passes over memory, by what makes them; bytes as ``planner.traffic`` counts them."""
    from reflectron.tools.bench.calibration_model import parts_of_layers, summed_or_copied, update

    element, layers = dtype.itemsize, LAYERS[backends.separate_layers]
    moved = {
        "norm": layers.block.both * element / 2,
        "rotation": layers.rotation.both * element / 2,
        "gated": layers.gated.both * element / 2,
        "copy": 2 * element,
        "sum": SUMMED["torch"][element],
        "update": UPDATED[backends.fused_update][element],
    }
    makers: dict[str, Callable[[int], Callable[[], object]]] = {
        **parts_of_layers(backends.separate_layers, clock.device, dtype),
        **summed_or_copied(clock.device, dtype),
        "update": lambda count: update(backends.adamw, clock.device, dtype, count),
    }
    return {
        f"pass_{part}": _table(
            [elements], lambda count, part=part: clock.rate(count * moved[part], makers[part](count))
        )
        for part in makers
    }


def _heads(clock: Clock, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Of the distillation head, forward and backward: operations a second of the three products of each logit."""
    from reflectron.tools.bench.calibration_model import head

    # Which of them a run takes is not known here.
    backends: tuple[Backend, ...] = ("reference", "triton") if clock.device.type == "cuda" else ("reference",)

    def rates(rows: int, hidden: int, columns: int) -> dict[str, float]:
        return {
            f"head_{backend}": clock.rate(
                6 * rows * hidden * columns, head(backend, clock.device, dtype, rows, hidden, columns)
            )
            for backend in backends
        }

    return _tables((sizes["rows"], sizes["hidden"], sizes["columns"]), sizes["most_head_operations"], 6, rates)


def _collectives(clock: Clock, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Bytes a second of what a rank has in the end: of the sum, of what was gathered, or before what is scattered; and
    the share of the time that is left where a product runs meanwhile.

    Each comes behind a product, as in a step, because ranks then are never ready at the same moment.
    """
    rows, inner, outer = sizes["beside"]
    x, weight = (torch.randn(shape, device=clock.device, dtype=dtype) for shape in ((rows, inner), (inner, outer)))

    def often(action: Callable[[], object]) -> float:
        return clock.seconds(lambda: [action() for _ in range(_OFTEN)]) / _OFTEN

    alone = often(lambda: x @ weight)

    def behind(kind: str, size: int) -> float:
        start = _collective(kind, size, clock.device)

        def action() -> None:
            x @ weight
            _finish(start())

        return max(often(action) - alone, _LEAST_SECONDS)

    def beside(kind: str, size: int) -> float:
        start = _collective(kind, size, clock.device)

        def action() -> None:
            under_way = start()
            x @ weight
            _finish(under_way)

        return max(often(action) - alone, _LEAST_SECONDS)

    seconds = {(kind, size): behind(kind, size) for kind in COLLECTIVES for size in sizes["bytes"]}

    def left(size: int) -> float:
        kinds = ("all_gather", "reduce_scatter")
        return min(1.0, sum(beside(kind, size) for kind in kinds) / sum(seconds[kind, size] for kind in kinds))

    tables = {
        kind: _table([sizes["bytes"]], lambda size, kind=kind: size / seconds[kind, size]) for kind in COLLECTIVES
    }
    return {**tables, "exposed": _table([sizes["bytes"]], left)}


def _collective(kind: str, size: int, device: torch.device) -> Callable[[], dist.Work | None]:
    """What starts one of ``size`` bytes in all."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    count = size // 4 // ranks * ranks
    whole, part = (torch.zeros(n, device=device) for n in (count, count // ranks))
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, async_op=True)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, async_op=True)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, async_op=True)
    if rank > 1:
        return lambda: None
    return lambda: dist.isend(whole, 1) if rank == 0 else dist.irecv(whole, 0)


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def rank_main(rank: int, kind: str, processes: int, folder: str) -> None:
    """One process; the first writes what was measured into ``folder``."""
    if kind == "cpu":
        from reflectron.engine.parallel.cpu_backend import keep_freed_memory, redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
        keep_freed_memory()
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    # Small tensors of the host are reduced as well.
    backend = "cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    result = measure(device)
    if rank == 0:
        Path(folder, "measured.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
