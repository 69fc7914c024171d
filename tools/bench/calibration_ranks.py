"""What one of the processes of ``reflectron bench calibrate`` measures: rates of the parts that a training step is of.

All processes measure the same at the same time, because in a run they share memory, caches and links as well. Matrix
products are measured as a linear layer and its backward lay them out, the passes over memory as the engine's plain
modules make them, and the host by steps of a model so small that nothing else takes time.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reflectron.engine.config import BackendsConfig, Config
from reflectron.tools.planner.traffic import LAYERS, LOGIT_BYTES, SUMMED, UPDATED

# Sides of products, tokens of a segment, elements of a pass, bytes of a collective.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "tokens": (512, 2048, 8192),
        "widths": (512, 2048, 8192, 32768),
        "most_operations": 2**42,
        "segments": (256, 1024, 4096),
        "elements": (2**20, 2**24, 2**28),
        "logits": (2**22, 2**26),
        "bytes": (2**14, 2**20, 2**24, 2**28),
    },
    "cpu": {
        "tokens": (32, 128, 512, 2048),
        "widths": (64, 256, 1024, 4096),
        "most_operations": 2**31,
        "segments": (64, 256, 1024),
        "elements": (2**14, 2**17, 2**20, 2**22, 2**23),
        "logits": (2**16, 2**20, 2**22, 2**23, 2**24),
        "bytes": (2**10, 2**16, 2**20, 2**24),
    },
}
_HEAD_DIMS = (64, 128)
# Rounds of a measurement go on for so long, but there are as many as these.
_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 0.03, 2, 30


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
    from reflectron.engine.backends import choose_backends
    from reflectron.tools.bench.calibration_model import host_seconds

    # Nothing but attention is by choice, and a trial of the other parts compiles kernels for seconds.
    asked = BackendsConfig(layers="torch", weight_gradient="torch", adamw="torch")
    attention = choose_backends(Config(backends=asked), None, device).attention
    clock, sizes = Clock(device), SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        tables = {
            **_products(clock, sizes, dtype),
            "attention": _attention(clock, attention, sizes["segments"], dtype),
            **_passes(clock, sizes["elements"], dtype),
            "pass_logits": _logits(clock, sizes["logits"], dtype),
        }
        if dist.get_world_size() > 1:
            tables |= _collectives(clock, sizes["bytes"])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "tables": tables,
        "host_seconds": host_seconds(clock),
    }


def _table(axes: Sequence[Sequence[float]], rate: Callable[..., float]) -> dict[str, Any]:
    values = np.array([rate(*sizes) for sizes in itertools.product(*axes)])
    return {"axes": [list(axis) for axis in axes], "rates": values.reshape([len(axis) for axis in axes]).tolist()}


def _products(clock: Clock, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """y = x W^T, and in the backward dx = dy W and dW = dy^T x; operations a second."""
    axes = (sizes["tokens"], sizes["widths"], sizes["widths"])
    names = ("product_forward", "product_input", "product_weight")
    rates: dict[str, dict[tuple[int, ...], float]] = {name: {} for name in names}
    for tokens, inner, outer in itertools.product(*axes):
        operations = 2 * tokens * inner * outer
        if operations > sizes["most_operations"]:
            # A larger product is as fast as one of half the tokens, or of half the width.
            smaller = next(
                point
                for point in (
                    (_before(axes[0], tokens), inner, outer),
                    (tokens, _before(axes[1], inner), outer),
                    (tokens, inner, _before(axes[2], outer)),
                )
                if point in rates[names[0]]
            )
            for name in names:
                rates[name][tokens, inner, outer] = rates[name][smaller]
            continue
        for name, action in zip(names, _linear_layer(clock.device, dtype, tokens, inner, outer), strict=True):
            rates[name][tokens, inner, outer] = operations / clock.seconds(action)
    return {name: _table(axes, lambda *point, of=of: of[point]) for name, of in rates.items()}


def _linear_layer(
    device: torch.device, dtype: torch.dtype, tokens: int, inner: int, outer: int
) -> tuple[Callable[[], object], ...]:
    """Its forward, and the two products of its backward."""
    shapes = ((tokens, inner), (outer, inner), (tokens, outer))
    x, weight, dy = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return lambda: x.matmul(weight.t()), lambda: dy.matmul(weight), lambda: dy.t().matmul(x)


def _before(axis: Sequence[int], size: int) -> int:
    return axis[max(axis.index(size) - 1, 0)]


def _attention(clock: Clock, backend: str, segments: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Of a pack of equal segments, forward and backward, by what a run would take; counts causal pairs alone."""
    from reflectron.tools.bench.calibration_model import core_attention

    def rate(length: int, width: int) -> float:
        heads, count = 8, max(1, segments[-1] // length)
        attend = core_attention(backend, clock.device, dtype, length, count, heads, width)
        return 3 * 4 * heads * width * count * length * (length + 1) / 2 / clock.seconds(attend)

    return _table((segments, _HEAD_DIMS), rate)


def _passes(clock: Clock, elements: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Bytes a second of passes over memory, by what makes them; bytes as ``planner.traffic`` counts them."""
    from reflectron.tools.bench.calibration_model import plain_parts, update

    element, plain = dtype.itemsize, LAYERS["torch"]
    moved = {
        "norm": plain.block.both * element / 2,
        "rotation": plain.rotation.both * element / 2,
        "gated": plain.gated.both * element / 2,
        "copy": 2 * element,
        "sum": SUMMED["torch"][element],
        "update": UPDATED["torch"][element],
    }
    makers: dict[str, Callable[[int], Callable[[], object]]] = {
        **plain_parts(clock.device, dtype),
        "update": lambda count: update(clock.device, dtype, count),
    }
    return {
        f"pass_{part}": _table(
            [elements], lambda count, part=part: count * moved[part] / clock.seconds(makers[part](count))
        )
        for part in makers
    }


def _logits(clock: Clock, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Of the plain head on a hidden state so narrow that its products take no time."""
    from reflectron.tools.bench.calibration_model import narrow_head

    def rate(logits: int) -> float:
        return logits * LOGIT_BYTES["reference"] / clock.seconds(narrow_head(clock.device, dtype, logits))

    return _table([sizes], rate)


def _collectives(clock: Clock, sizes: Sequence[int]) -> dict[str, Any]:
    """Bytes a second of what a rank has in the end: of the sum, of what was gathered, or before what is scattered."""
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def make(kind: str, count: int) -> Callable[[], object]:
        whole, part = (torch.zeros(n, device=clock.device) for n in (count, count // ranks))
        if kind == "all_reduce":
            return lambda: dist.all_reduce(whole)
        if kind == "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, part)
        if kind == "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole)
        if rank > 1:
            return lambda: None
        return lambda: dist.send(whole, 1) if rank == 0 else dist.recv(whole, 0)

    return {
        kind: _table([sizes], lambda size, kind=kind: size / clock.seconds(make(kind, size // 4 // ranks * ranks)))
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "transfer")
    }


def rank_main(rank: int, kind: str, processes: int, folder: str) -> None:
    """One process; the first writes what was measured into ``folder``."""
    if kind == "cpu":
        from reflectron.engine.parallel.cpu_backend import redirect_cuda_to_cpu

        redirect_cuda_to_cpu()
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
