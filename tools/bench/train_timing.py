"""Steps of several variants -> seconds by round, peak memory, and where the time of one step goes.

A round runs every variant once, each time another one first, so that drift of clock and temperature hits all alike. A
step is timed on the host between two moments at which every rank's device is idle; the slowest rank counts.
"""

from __future__ import annotations

import gc
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from reflectron.engine.parallel.process_groups import ParallelGroups

Step = Callable[[], tuple[float, float]]
"""Runs an optimizer step; loss and gradient norm."""

GROUPS = ("matmul", "attention", "head", "norm and elementwise", "communication", "optimizer", "copies", "idle")
# What a launching operation lies in decides first, then the kernel's own name. "Head" is all of the head with its
# products; the baseline's losses have no function of their own in the backward, where their kernels' names tell.
_INSIDE = (
    (re.compile(r"_DistillationHead|eager loss"), "head"),
    (re.compile(r"scaled_dot_product|ScaledDotProduct|flash_attn|FlashAttn|varlen_attn"), "attention"),
    (re.compile(r"^Optimizer\."), "optimizer"),
)
_NAMES = (
    (re.compile(r"nccl|c10d::|gloo:", re.I), "communication"),
    (re.compile(r"softmax|nll_loss|kl_div", re.I), "head"),
    (re.compile(r"flash|fmha|attention|sdpa", re.I), "attention"),
    (re.compile(r"gemm|cutlass|nvjet|cublas|xmma|aten::(mm|addmm|bmm|matmul|linear)\b", re.I), "matmul"),
    (re.compile(r"memcpy|memset|aten::(copy_|zero_|fill_)", re.I), "copies"),
)


def seconds_of(step: Step, groups: ParallelGroups) -> tuple[float, tuple[float, float]]:
    """Wall time of a step on the slowest rank, and what it returned; every rank calls it."""
    _finish(groups)
    groups.barrier()
    began = time.perf_counter()
    result = step()
    _finish(groups)
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device="cpu")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=groups.hosts)
    return slowest.item(), result


def time_rounds(
    steps: Mapping[str, Step], rounds: int, deadline: float, groups: ParallelGroups
) -> dict[str, list[float]]:
    """Seconds of every step, one a round; fewer rounds, but one, where ``time.time()`` passes ``deadline``."""
    names = list(steps)
    found: dict[str, list[float]] = {name: [] for name in names}
    # A collection within a step would be measured as the step's.
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            if index and is_late(deadline, groups):
                break
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(seconds_of(steps[name], groups)[0])
            gc.collect()
    finally:
        gc.enable()
    return found


def is_late(deadline: float, groups: ParallelGroups) -> bool:
    """Whether the main rank's clock says so; alike on all ranks."""
    late = torch.tensor(int(groups.is_main and time.time() > deadline), device="cpu")
    dist.all_reduce(late, group=groups.hosts)
    return bool(late.item())


def peak_bytes(step: Step, groups: ParallelGroups) -> tuple[float | None, tuple[float, float]]:
    """Most device memory allocated during a step, on the fullest rank, and what the step returned; None on the CPU."""
    if groups.device.type != "cuda":
        return None, step()
    _finish(groups)
    torch.cuda.reset_peak_memory_stats()
    result = step()
    _finish(groups)
    most = torch.tensor(float(torch.cuda.max_memory_allocated()), dtype=torch.float64, device="cpu")
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups.hosts)
    return most.item(), result


def allocated_bytes(groups: ParallelGroups) -> int:
    """Device memory in use now; 0 on the CPU."""
    return torch.cuda.memory_allocated() if groups.device.type == "cuda" else 0


def time_by_group(step: Step, groups: ParallelGroups) -> dict[str, float]:
    """Milliseconds of one step by what they go to, on this rank: kernels of a GPU, operations of the CPU.

    ``idle`` is the wall time in which no kernel ran; the profiler slows the host down, so it is an upper bound. Every
    rank calls it.
    """
    cuda = groups.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        seconds, _ = seconds_of(step, groups)
    spent = grouped_kernels(recorded.events()) if cuda else grouped_operations(recorded.events())
    total = sum(spent.values())
    return {group: spent[group] for group in GROUPS if group != "idle"} | {"idle": max(seconds * 1e3 - total, 0.0)}


def grouped_operations(events: Any) -> dict[str, float]:
    """Milliseconds of the CPU's operations, each without those inside it."""
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CPU":
            spent[_group(event.name, event)] += event.self_cpu_time_total / 1e3
    return spent


def grouped_kernels(events: Any) -> dict[str, float]:
    """Milliseconds of kernels and copies. One that no operation is known to have launched goes by its name alone."""
    spent: dict[str, float] = defaultdict(float)
    attributed: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CPU":
            for kernel in event.kernels:
                spent[_group(kernel.name, event)] += kernel.duration / 1e3
                attributed[kernel.name] += kernel.duration / 1e3
    rest: dict[str, float] = defaultdict(float)
    for event in events:
        # Ranges that a user names appear on the device's track, too, and hold kernels that are counted themselves.
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            rest[event.name] += event.device_time_total / 1e3
    for name, milliseconds in rest.items():
        spent[_group(name, None)] += max(milliseconds - attributed[name], 0.0)
    return spent


def _group(name: str, launcher: Any) -> str:
    """The group of a kernel, from the operations that it was launched inside of and its name."""
    outer = launcher
    while outer is not None:
        for pattern, group in _INSIDE:
            if pattern.search(outer.name):
                return group
        outer = outer.cpu_parent
    names = (name, launcher.name) if launcher is not None else (name,)
    for pattern, group in _NAMES:
        if any(pattern.search(one) for one in names):
            return group
    return "norm and elementwise"


def _finish(groups: ParallelGroups) -> None:
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
