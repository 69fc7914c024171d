"""The cluster of a planned run: datasheets of GPUs, and the rates that predictions divide by.

A rate is either a number of the datasheet times an assumed achievable fraction, or one that ``reflectron bench
calibrate`` measured at the very size. Without a calibration file nothing here has been measured by this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import assert_never

from reflectron.engine.config import AttentionBackend, Config, LayersBackend
from reflectron.tools.planner.backends import (
    COLLECTIVES,
    LAYER_TRAFFIC,
    STACKS,
    Calibration,
    Collective,
    HeadBackend,
    Pass,
    PlannedBackends,
    Product,
    read_calibration,
)

GB = 10**9
# Share of communication that hides behind the computation it may overlap with, on CUDA. Assumed.
OVERLAP = 0.7
# Seconds that a collective takes however little it moves. Assumed.
LATENCY = 20e-6
# Seconds in which the host launches an operator, autograd and megatron-core's Python included. Assumed.
LAUNCH = 10e-6


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU by its datasheet; rates a second, dense."""

    name: str
    bf16_flops: float
    fp8_flops: float
    """0 where there is none."""
    memory_bytes: float
    """As torch reports it: less than the name says, by what the driver keeps."""
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    """One direction, to all GPUs of its machine together: half of the datasheet's figure."""
    network_bytes_per_second: float
    """One direction, of its share of the machine's network: no datasheet, one adapter a GPU is assumed."""
    fractions: Fractions


@dataclass(frozen=True, kw_only=True)
class Fractions:
    """Shares of the datasheet's rates that a training step is assumed to reach."""

    matmul: float
    fp8: float
    attention: float
    """Kernels as old as FlashAttention-2."""
    new_attention: float
    """FlashAttention-3, -4 and transformer-engine's (cuDNN)."""
    memory: float
    bus: float


# Assumed, not measured here. Products of 4k to 30k a side in cuBLAS reach about 250 of A100's 312 TFLOP/s and 650 to
# 700 of H100's 989 at their sustained clocks, in FP8 about 1,100 to 1,300 of 1,979; a step has smaller ones too. Older
# attention is FlashAttention-2, also torch's: forward and backward of causal segments of 0.5k to 4k tokens
# (arXiv 2307.08691, figures 5 and 6: 130 to 190 TFLOP/s on A100; about 300 on H100, for which it is not tuned). Newer
# attention gains on Hopper alone (arXiv 2407.08608, figures 5 and 6: at 0.5k to 4k causal tokens about 300 to 550
# forward and 250 to 450 backward). NCCL's bus bandwidth comes to about 80 % of the links'.
_AMPERE = Fractions(matmul=0.75, fp8=0.0, attention=0.45, new_attention=0.45, memory=0.80, bus=0.80)
_HOPPER = Fractions(matmul=0.65, fp8=0.55, attention=0.30, new_attention=0.38, memory=0.80, bus=0.80)

# Adapters of the usual machines: 200 Gbit/s InfiniBand a GPU with A100 and A800, 400 Gbit/s with H100 and later.
_HDR, _NDR = 25 * GB, 50 * GB

# NVIDIA A100 datasheet (nvidia-1758950, SXM 80GB): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s.
_A100 = Gpu(
    name="A100-80GB",
    bf16_flops=312e12,
    fp8_flops=0.0,
    memory_bytes=79.2 * 2**30,
    memory_bytes_per_second=2039 * GB,
    nvlink_bytes_per_second=300 * GB,
    network_bytes_per_second=_HDR,
    fractions=_AMPERE,
)
# NVIDIA H100 datasheet (SXM): 1,979 TFLOP/s bf16 with sparsity, half of it dense, FP8 twice that; 3.35 TB/s, NVLink 900
# GB/s.
_H100 = Gpu(
    name="H100-80GB",
    bf16_flops=989e12,
    fp8_flops=1979e12,
    memory_bytes=79.1 * 2**30,
    memory_bytes_per_second=3350 * GB,
    nvlink_bytes_per_second=450 * GB,
    network_bytes_per_second=_NDR,
    fractions=_HOPPER,
)
GPUS = {
    gpu.name: gpu
    for gpu in (
        _A100,
        # An A100 whose NVLink is cut to 400 GB/s (Reuters, November 2022).
        replace(_A100, name="A800-80GB", nvlink_bytes_per_second=200 * GB),
        _H100,
        # An H100 whose NVLink is cut to 400 GB/s (DeepSeek-V3, arXiv 2412.19437 and 2505.09343).
        replace(_H100, name="H800-80GB", nvlink_bytes_per_second=200 * GB),
        # NVIDIA H200 datasheet (SXM): H100's compute, 141 GB, 4.8 TB/s, NVLink 900 GB/s.
        replace(_H100, name="H200-141GB", memory_bytes=139.8 * 2**30, memory_bytes_per_second=4800 * GB),
    )
}


def gpu_of(device_name: str) -> Gpu | None:
    """Return the planner's entry for a device as torch names it; None for one whose rates it does not know."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None  # slower than the SXM modules that the entries are of
    words = re.findall(r"\w+", device_name)
    return next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in words), None)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a run, and how fast they are."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network_bytes_per_second: float
    """Rate of one GPU's adapter, as used."""
    backends: PlannedBackends
    """What ``auto`` comes to there."""
    calibration: Calibration | None = None
    """Rates measured on such a machine."""

    @property
    def measured(self) -> PlannedBackends | None:
        """Backends that the calibration's tables were measured with."""
        return None if self.calibration is None else self.calibration.backends

    @property
    def source(self) -> str:
        """Say where the rates are from."""
        if self.calibration is None:
            return "datasheets and assumed fractions, nothing measured"
        return self.calibration.source + ("" if self.is_cpu else "; network by the datasheet")

    @property
    def is_cpu(self) -> bool:
        """Whether host and device are one, so that each waits for what the other does."""
        return self.gpu.name == "CPU"

    def exposed(self, size: float) -> float:
        """Return the share of a collective of ``size`` bytes that computation beside it does not hide."""
        measured = self.calibration.tables.get("exposed") if self.calibration is not None else None
        return 1 - OVERLAP if measured is None else measured.at(size)

    @property
    def matmul_flops(self) -> float:
        """Rate of large products in bfloat16, or in the calibration's type."""
        if self.calibration is not None:
            return float(self.calibration.tables["product_forward"].values.max())
        return self.gpu.bf16_flops * self.gpu.fractions.matmul

    @property
    def memory_bytes_per_second(self) -> float:
        """Rate of a pass over much memory."""
        if self.calibration is not None:
            return float(self.calibration.tables["pass_copy"].values[-1])
        return self.gpu.memory_bytes_per_second * self.gpu.fractions.memory

    @property
    def node_bytes_per_second(self) -> float:
        """Bus bandwidth of a collective inside a machine, in NCCL's definition."""
        return self.gpu.nvlink_bytes_per_second * self.gpu.fractions.bus

    def product(self, kind: Product, tokens: float, inner: float, outer: float, fp8: bool = False) -> float:
        """Return the seconds of one of a linear layer's products."""
        operations = 2 * tokens * inner * outer
        if fp8:
            return operations / (self.gpu.fp8_flops * self.gpu.fractions.fp8)
        if self.calibration is not None:
            return operations / self.calibration.tables[f"product_{kind}"].at(tokens, inner, outer)
        return operations / self.matmul_flops

    def linear(self, tokens: float, inner: float, outer: float, forwards: int = 1, fp8: bool = False) -> float:
        """Return the seconds of a linear layer's forwards and its backward."""
        forward = self.product("forward", tokens, inner, outer, fp8)
        backward = self.product("input", tokens, inner, outer, fp8) + self.product("weight", tokens, inner, outer, fp8)
        return forwards * forward + backward

    def attention(self, operations: float, segment_length: float, head_dim: int, backend: AttentionBackend) -> float:
        """Return the seconds of the causal attention of segments, forward and backward."""
        if self.calibration is not None and backend == self.calibration.backends.attention:
            return operations / self.calibration.tables["attention"].at(segment_length, head_dim)
        return operations / self.attention_flops(backend)

    def attention_flops(self, backend: AttentionBackend) -> float:
        """Return the useful operations of a forward and a backward over the time of both."""
        match backend:
            case "transformer_engine" | "flash_attention_3" | "flash_attention_4":
                return self.gpu.bf16_flops * self.gpu.fractions.new_attention
            case "flash_attention_2" | "torch_varlen" | "sdpa":
                return self.gpu.bf16_flops * self.gpu.fractions.attention
        assert_never(backend)

    def head(self, backend: HeadBackend, rows: float, hidden: float, columns: float) -> float | None:
        """Return the seconds of the distillation head, forward and backward, where it was measured."""
        table = self.calibration.tables.get(f"head_{backend}") if self.calibration is not None else None
        return None if table is None else 6 * rows * hidden * columns / table.at(rows, hidden, columns)

    def passes(self, part: Pass, elements: float, bytes_per_element: float) -> float:
        """Return the seconds of passes over a tensor of ``elements``."""
        if self.calibration is None:
            return elements * bytes_per_element / self.memory_bytes_per_second
        return elements * bytes_per_element / self.calibration.tables[f"pass_{part}"].at(elements)

    def collective(self, kind: Collective, size: float, ranks: int, stride: int) -> float:
        """Return the seconds of a collective of ``ranks`` GPUs that are ``stride`` apart, or of a transfer between two.

        ``size`` is the bytes of the whole: of the sum, of what is gathered, or of what is scattered.
        """
        if ranks == 1:
            return 0.0
        inside = (ranks - 1) * stride < self.gpus_per_node
        measured = self.calibration.tables.get(kind) if self.calibration is not None else None
        if measured is not None and inside:
            return size / measured.at(size)
        if kind == "transfer":
            return size / (self.node_bytes_per_second if inside else self.network_bytes_per_second)
        once = size * (ranks - 1) / ranks / self.bus(ranks, stride) + LATENCY
        if kind == "all_reduce":
            return 2 * once
        if kind == "all_gather" or kind == "reduce_scatter":
            return once
        assert_never(kind)

    def bus(self, ranks: int, stride: int) -> float:
        """Return the bus bandwidth, in bytes a second, of ``ranks`` GPUs that are ``stride`` apart.

        A ring that leaves the machine goes through the adapters of all its members there.
        """
        if (ranks - 1) * stride < self.gpus_per_node:
            return self.node_bytes_per_second
        members = max(1, min(ranks, self.gpus_per_node // stride))
        return min(self.node_bytes_per_second, members * self.network_bytes_per_second)

    def host(self, layers: LayersBackend) -> dict[str, float]:
        """Return the seconds of the host, by ``HOST_PARTS``, with a backend of ``layers``."""
        operators = LAYER_TRAFFIC[layers].operators
        if self.calibration is not None:
            ratio = operators / LAYER_TRAFFIC["torch"].operators
            return self.calibration.host | {"microbatch_layer": self.calibration.host["microbatch_layer"] * ratio}
        # The embedding, the head and the schedule come to about one plain layer; an update to a few launches a layer.
        plain = LAYER_TRAFFIC["torch"].operators * LAUNCH
        return {
            "step": plain,
            "step_layer": 10 * LAUNCH,
            "microbatch": plain,
            "microbatch_layer": operators * LAUNCH,
        }


def make_cluster(
    name: str, gpus: int, gpus_per_node: int = 8, calibration: Path | None = None, stack: str | None = None
) -> Cluster:
    """Return GPUs of one kind, with measured rates where ``calibration`` has them; ``CPU`` for processes over gloo.

    ``stack`` is what is installed, a key of ``STACKS``; without one it is what the calibration was measured with, or
    else ``pip``.

    Raises:
        ValueError: for an unknown GPU, an impossible number, or a calibration that is none or of another machine.
    """
    measured = read_calibration(calibration) if calibration is not None else None
    if name == "CPU":
        return _cpu_cluster(gpus, measured)
    if name not in GPUS:
        raise ValueError(f"--gpu is {name!r}, expected one of {', '.join(GPUS)} or CPU")
    if stack is not None and stack not in STACKS:
        raise ValueError(f"--backends is {stack!r}, expected one of {', '.join(STACKS)}")
    if gpus < 1 or gpus_per_node < 1 or (gpus > gpus_per_node and gpus % gpus_per_node):
        raise ValueError(f"--gpus is {gpus}, expected a positive number, whole machines of {gpus_per_node}")
    gpu = GPUS[name]
    return Cluster(
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        network_bytes_per_second=gpu.network_bytes_per_second * gpu.fractions.bus,
        backends=measured.backends if measured is not None and stack is None else STACKS[stack or "pip"],
        calibration=measured,
    )


def _cpu_cluster(processes: int, measured: Calibration | None) -> Cluster:
    """Return a machine without datasheet: all that is known of it was measured."""
    if measured is None or measured.processes != processes:
        found = "no calibration" if measured is None else f"a calibration of {measured.processes} processes"
        raise ValueError(
            f"--gpu is CPU with {found}, expected one of --gpus {processes}: reflectron bench calibrate --out FILE "
            f"--processes {processes}, then --calibration FILE"
        )
    products, collectives = measured.tables["product_forward"], [measured.tables.get(kind) for kind in COLLECTIVES]
    link = max((float(table.values.max()) for table in collectives if table is not None), default=GB)
    return Cluster(
        gpu=Gpu(
            name="CPU",
            bf16_flops=float(products.values.max()),
            fp8_flops=0.0,
            memory_bytes=measured.memory_bytes,
            memory_bytes_per_second=float(measured.tables["pass_copy"].values[-1]),
            nvlink_bytes_per_second=link,
            network_bytes_per_second=link,
            fractions=Fractions(matmul=1, fp8=1, attention=1, new_attention=1, memory=1, bus=1),
        ),
        gpus=processes,
        gpus_per_node=processes,
        network_bytes_per_second=link,
        backends=measured.backends,
        calibration=measured,
    )


def planned_backends(config: Config, cluster: Cluster) -> PlannedBackends:
    """Return the backends of a run on ``cluster``: those that it names, and what ``auto`` comes to there.

    Raises:
        ValueError: for FP8 on GPUs without it, or without transformer-engine's layers, which alone have it.
    """
    named: dict[str, Any] = {part: name for part, name in vars(config.backends).items() if name != "auto"}
    chosen = replace(cluster.backends, **named)
    if config.model.fp8 != "none":
        if not cluster.gpu.fp8_flops:
            raise ValueError(f"model.fp8 is {config.model.fp8!r}, expected 'none': {cluster.gpu.name} has no FP8")
        if chosen.layers != "transformer_engine":
            raise ValueError(
                f"model.fp8 is {config.model.fp8!r}, expected 'none' with backends.layers {chosen.layers!r}: plan with "
                "--backends te"
            )
    return chosen
