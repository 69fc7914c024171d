"""Measures the rates that ``reflectron plan`` divides by, on this machine in a minute.

As many processes as a plan's ranks on one machine measure the same at the same time, because in a run they share
memory, caches and links as well: on CUDA one a device, on the CPU as many as are asked for. Each part of a step is made
by the backends that a run here would take: products as a linear layer and its backward lay them out, gradients added to
their sums; passes over memory by the engine's own modules; the head and the update whole; the host by steps of a model
so small that nothing else takes time.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from typing_extensions import assert_never

from reflectron.engine.config import (
    AttentionBackend,
    BatchConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
)
from reflectron.engine.data.global_batch import assemble
from reflectron.engine.data.microbatch import segments_of, to_device
from reflectron.engine.model.backends.attention_kernels import AttentionShape, attention_kernel
from reflectron.engine.model.backends.choose import PLAIN, choose_backends
from reflectron.engine.parallel.process_groups import ParallelGroups, start_process_groups, stop_process_groups
from reflectron.engine.training.build import build_model
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.training.step import train_step
from reflectron.engine.weights.readers import RandomSource
from reflectron.kernels.products import add_product, as_factor
from reflectron.kernels.types import HeadBackend
from reflectron.tools.bench.harness import RankClock, Row, read_plan, run_ranks, small_llama
from reflectron.tools.bench.models import Action, head_step, parts_of_layers, summed_or_copied, update
from reflectron.tools.planner.backends import (
    CALIBRATION_SIZES,
    COLLECTIVES,
    HOST_PARTS,
    LAYER_TRAFFIC,
    SUMMED,
    UPDATED,
    Collective,
    PlannedBackends,
)
from reflectron.tools.planner.samples import instant_views
from reflectron.tools.provenance import provenance

DISTRIBUTIONS = ("reflectron", "torch", "megatron-core")
_HEAD_DIMS = (64, 128)
# Rounds of a measurement go on for so long, but there are as many as these.
_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 0.03, 2, 30
# What ranks wait for each other differs from one time to the next.
_OFTEN = 8
# Of a difference between two times: what is less is nothing.
_LEAST_SECONDS = 1e-6


def calibrate(processes: int) -> Row:
    """Return the content of a calibration file."""
    cuda = torch.cuda.is_available()
    about = provenance(DISTRIBUTIONS, cuda=cuda)
    memory_bytes = about["device_memory_gib"] if cuda else about["memory_gib"] / processes
    # The file names the kind of a CPU only: rates are looked up by the device.
    device = about["device"] if cuda else "CPU"
    threads = max(about["cores"] // processes, 1)
    with tempfile.TemporaryDirectory() as folder:
        code = run_ranks("calibrate", {"folder": folder}, processes, Path(folder), threads)
        if code:
            raise ValueError(f"a process that measures ended with exit code {code}, see its lines above")
        measured = json.loads(Path(folder, "measured.json").read_bytes())
    return about | {"processes": processes, "memory_bytes": memory_bytes * 2**30, **measured, "device": device}


def summary(content: Row) -> list[str]:
    """Return one line a table: its slowest and its fastest point."""
    lines = [f"{content['device']}, {content['dtype']}, {content['processes']} processes at once"]
    for name, table in content["tables"].items():
        rates = np.array(table["rates"])
        lines.append(f"{name}: {rates.min():.3g} to {rates.max():.3g} a second")
    return [*lines, *(f"host, {name}: {s * 1e3:.2f} ms" for name, s in content["host_seconds"].items())]


class RateClock(RankClock):
    """Turns what all ranks do at once into rates."""

    def seconds(self, action: Action, least: float = _SECONDS) -> float:
        """Return the seconds of ``action`` after one that is not counted, the longest of any rank.

        The least on the CPU, where whatever else the machine does can only add to it; the median on CUDA, whose clocks
        sink with use.
        """
        self.local(action)
        rounds = int(self.most(least / max(self.local(action)[0], 1e-9)))
        times = [self.local(action)[0] for _ in range(min(max(rounds, _LEAST_ROUNDS), _MOST_ROUNDS))]
        return self.most(statistics.median(times) if self.groups.device.type == "cuda" else min(times))

    def rate(self, amount: float, action: Action) -> float:
        """Return ``amount`` over the seconds of ``action``."""
        return amount / self.seconds(action)


def measure(groups: ParallelGroups) -> Row:
    """Return all tables of ``planner.calibration``, and the host's seconds."""
    device = groups.device
    chosen: dict[str, Any] = choose_backends(Config(), None, device).names
    backends = PlannedBackends(**chosen)
    clock, sizes = RateClock(groups), CALIBRATION_SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        tables: dict[str, Any] = {
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
    """Return tables by name over three sides of a product. One of more than ``most`` operations, ``factor`` times its
    sides, is taken to be as fast as one whose longest side is shorter."""
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


def _products(clock: RateClock, sizes: dict[str, Any], dtype: torch.dtype, adds: bool) -> dict[str, Any]:
    """Measure y = x W^T, and in the backward dx = dy W and dW = dy^T x summed in float32, in operations a second."""
    names = ("product_forward", "product_input", "product_weight")

    def rates(tokens: int, inner: int, outer: int) -> dict[str, float]:
        actions = _linear_layer(clock.groups.device, dtype, sizes["cached"], (tokens, inner, outer), adds)
        return {name: clock.rate(2 * tokens * inner * outer, act) for name, act in zip(names, actions, strict=True)}

    return _tables((sizes["tokens"], sizes["widths"], sizes["widths"]), sizes["most_operations"], 2, rates)


def _linear_layer(
    device: torch.device, dtype: torch.dtype, cached: int, size: tuple[int, int, int], adds: bool
) -> tuple[Callable[[], None], ...]:
    """Return the forward of a linear layer, and the two products of its backward.

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


def _attention(
    clock: RateClock, backend: AttentionBackend, segments: Sequence[int], dtype: torch.dtype
) -> dict[str, Any]:
    """Measure packs of equal segments, forward and backward, laid out by token after; causal pairs alone count."""
    heads = 8

    def rate(length: int, width: int) -> float:
        count = max(1, segments[-1] // length)
        shape = AttentionShape(
            num_attention_heads=heads,
            num_query_groups=heads,
            head_dim=width,
            softmax_scale=width**-0.5,
            whole_segments=True,
        )
        attend, tokens, device = attention_kernel(backend, shape), length * count, clock.groups.device
        packed = to_device(segments_of([length] * count, [length] * count, tokens), device)
        q, k, v, gradient = (
            torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(4)
        )
        joined = gradient.detach().reshape(tokens, -1)
        return clock.rate(
            3 * 4 * heads * width * count * length * (length + 1) / 2,
            lambda: torch.autograd.grad(attend(q, k, v, packed).reshape(tokens, -1), (q, k, v), joined),
        )

    return _table((segments, _HEAD_DIMS), rate)


def _passes(clock: RateClock, backends: PlannedBackends, elements: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Measure passes over memory in bytes a second, by what makes them; ``planner.traffic`` counts the bytes."""
    element, layers = dtype.itemsize, LAYER_TRAFFIC[backends.separate_layers]
    moved = {
        "norm": layers.block.both * element / 2,
        "rotation": layers.rotation.both * element / 2,
        "gated": layers.gated.both * element / 2,
        "copy": 2 * element,
        "sum": SUMMED["torch"][element],
        "update": UPDATED[backends.fused_update][element],
    }
    makers: dict[str, Callable[[int], Callable[[], object]]] = {
        **parts_of_layers(backends.separate_layers, clock.groups.device, dtype),
        **summed_or_copied(clock.groups.device, dtype),
        "update": lambda count: update(backends.adamw, clock.groups.device, dtype, count),
    }
    return {
        f"pass_{part}": _table(
            [elements], lambda count, part=part: clock.rate(count * moved[part], makers[part](count))
        )
        for part in makers
    }


def _heads(clock: RateClock, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Measure the distillation head, forward and backward, in operations a second of each logit's three products."""
    # Which of them a run takes is not known here.
    backends: tuple[HeadBackend, ...] = (
        ("reference", "triton") if clock.groups.device.type == "cuda" else ("reference",)
    )

    def rates(rows: int, hidden: int, columns: int) -> dict[str, float]:
        return {
            f"head_{backend}": clock.rate(
                6 * rows * hidden * columns, head_step(backend, clock.groups.device, dtype, rows, hidden, columns)
            )
            for backend in backends
        }

    return _tables((sizes["rows"], sizes["hidden"], sizes["columns"]), sizes["most_head_operations"], 6, rates)


def _collectives(clock: RateClock, sizes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Measure collectives in bytes a second of what a rank has in the end (of the sum, of what was gathered, or before
    what is scattered), and the share of the time that is left where a product runs meanwhile.

    Each comes behind a product, as in a step, because ranks then are never ready at the same moment.
    """
    (rows, inner, outer), device = sizes["beside"], clock.groups.device
    x, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, outer)))

    def often(action: Callable[[], object]) -> float:
        return clock.seconds(lambda: [action() for _ in range(_OFTEN)]) / _OFTEN

    alone = often(lambda: x @ weight)

    def added(kind: Collective, size: int, beside: bool) -> float:
        """Return the seconds that a collective adds to a product that it runs behind, or beside."""
        start = _collective(kind, size, device)

        def action() -> None:
            under_way = start() if beside else None
            x @ weight
            _finish(under_way if beside else start())

        return max(often(action) - alone, _LEAST_SECONDS)

    seconds = {(kind, size): added(kind, size, False) for kind in COLLECTIVES for size in sizes["bytes"]}

    def left(size: int) -> float:
        kinds: tuple[Collective, ...] = ("all_gather", "reduce_scatter")
        return min(1.0, sum(added(kind, size, True) for kind in kinds) / sum(seconds[kind, size] for kind in kinds))

    tables: dict[str, Any] = {
        kind: _table([sizes["bytes"]], lambda size, kind=kind: size / seconds[kind, size]) for kind in COLLECTIVES
    }
    return {**tables, "exposed": _table([sizes["bytes"]], left)}


def _collective(kind: Collective, size: int, device: torch.device) -> Callable[[], dist.Work | None]:
    """Return what starts a collective of ``size`` bytes in all."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    count = size // 4 // ranks * ranks
    whole, part = (torch.zeros(n, device=device) for n in (count, count // ranks))
    match kind:
        case "all_reduce":
            return lambda: dist.all_reduce(whole, async_op=True)
        case "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, part, async_op=True)
        case "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole, async_op=True)
        case "transfer":
            pair = {0: lambda: dist.isend(whole, 1), 1: lambda: dist.irecv(whole, 0)}
            return pair.get(rank, lambda: None)
    assert_never(kind)


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def host_seconds(clock: RateClock) -> dict[str, float]:
    """Measure steps whose tensors are next to nothing: by step and microbatch, for each layer and beside them."""
    layers, microbatches = (1, 5), (1, 5)
    times = {size: _tiny_step(clock, *size) for size in itertools.product(layers, microbatches)}
    # time = step + step_layer L + microbatch M + microbatch_layer L M
    terms = np.array([(1, layer, micro, layer * micro) for layer, micro in times])
    found = np.linalg.solve(terms, list(times.values())).clip(min=0.0)
    return dict(zip(HOST_PARTS, found.tolist(), strict=True))


def _tiny_step(clock: RateClock, layers: int, microbatches: int) -> float:
    """Return the seconds of a step without parallelism, on every rank alike."""
    groups = clock.groups
    arch = small_llama(64, 64, 1, 1, layers, 128)
    config = Config(
        model=ModelConfig(dtype="float32" if groups.device.type == "cpu" else "bfloat16"),
        loss=LossConfig(backend="reference"),
        data=DataConfig(max_length=64),
        batch=BatchConfig(tokens_per_microbatch=64),
        parallel=ParallelConfig(distributed_optimizer=False),
    )
    model = build_model(config, arch, groups, RandomSource(0, 0.02, groups.device), PLAIN)
    # One instruction and one reflection sample a microbatch.
    views = instant_views([24] * 2 * microbatches, arch.vocab_size)
    cost = training_cost(decoder_shape(arch, config), "none")
    ranks = groups.dp.size()
    batch = assemble(list(views) * ranks, config, cost, 0.5, groups.dp.rank(), ranks)
    assert len(batch.microbatches) == microbatches
    return clock.seconds(lambda: train_step(model.wrapped, model.optimizer, groups, batch, 1e-5), least=0.2)


def main() -> None:
    """Be one of the processes; the first writes what was measured into the folder of the plan."""
    groups = start_process_groups(ParallelConfig(), seed=1)
    result = measure(groups)
    if groups.is_main:
        Path(read_plan()["folder"], "measured.json").write_text(json.dumps(result), encoding="utf-8")
    stop_process_groups()


if __name__ == "__main__":
    main()
