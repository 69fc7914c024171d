"""Measures the distillation head beside its peers: every provider on every case, side by side in one process.

With a CUDA device there are times, memory and errors, each round calling every provider once. Without one tiny shapes
run, the kernels in Triton's interpreter, and errors alone become rows. A provider that cannot be imported or fails is a
row that says why.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reflectron.tools.bench.harness import (
    BenchRows,
    collections_between_rounds,
    new_rows_file,
    peak_memory,
    profiled,
    reason_of,
    release,
    take_turns,
)
from reflectron.tools.bench.head_providers import (
    BUILDERS,
    FLOOR,
    OURS,
    HeadCase,
    Mode,
    Provider,
    ProviderGradients,
    ProviderInputs,
    ProviderTruth,
    errors,
    exact,
    make_inputs,
)
from reflectron.tools.bench.report import where, write_head_report
from reflectron.tools.provenance import provenance

DISTRIBUTIONS = ("reflectron", "torch", "triton", "orda-kernel", "liger-kernel", "cut-cross-entropy")
NO_DEVICE = (
    "no CUDA device: tiny shapes in Triton's interpreter, for correctness only; times mean nothing, none are kept"
)
OUT_OF_TIME = "the time of the run was spent"

# ---- cases, the most telling first, so that a run cut short keeps what matters most ----

SHAPES = ((8192, 32016), (4096, 32016), (7168, 32256), (5120, 152064))
"""(d, V): CodeLlama 70B and 7B, DeepSeek-Coder 33B, Qwen2.5-Coder 32B."""


def all_cases() -> list[HeadCase]:
    """Return the whole table. The time does not depend on the teacher: a far one is timed on the first shape only."""
    cases = [HeadCase(*SHAPES[0], pairs) for pairs in (4096, 8192, 16384)]  # 8192 pairs: the goal for memory
    cases += [HeadCase(*SHAPES[1], pairs) for pairs in (4096, 16384)]
    cases += [HeadCase(*shape, 4096, teacher="far", timed=shape == SHAPES[0]) for shape in SHAPES]
    cases += [HeadCase(*shape, 4096) for shape in SHAPES[2:]]
    cases += [HeadCase(*shape, 4096, tp=tp) for shape in SHAPES for tp in (4, 8)]
    cases += [HeadCase(*shape, 1024) for shape in SHAPES]
    cases += [HeadCase(*shape, pairs, tp=tp) for shape in SHAPES for tp in (4, 8) for pairs in (1024, 16384)]
    cases += [HeadCase(*shape, pairs, teacher="far", timed=False) for shape in SHAPES for pairs in (1024, 16384)]
    return cases + [HeadCase(*shape, 16384) for shape in SHAPES[2:]]


def quick_cases() -> list[HeadCase]:
    """Return both sides of every question once."""
    large, small = SHAPES[:2]
    far = HeadCase(*large, 4096, teacher="far", timed=False)
    return [HeadCase(*large, 4096), far, HeadCase(*small, 1024), HeadCase(*large, 4096, tp=4)]


def tiny_cases() -> list[HeadCase]:
    """Return what the interpreter computes in seconds; nothing divides the tiles evenly."""
    options: tuple[dict[str, Any], ...] = ({}, {"teacher": "far"}, {"tp": 4})
    return [HeadCase(72, 132, 9, timed=False, **one) for one in options]


# ---- measuring ----

WARM_UP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 20, 60
SECONDS = 2.0  # of a case; more than ``MIN_ROUNDS`` rounds where they fit
FLUSH_BYTES = 2**28  # several times any L2 cache

Call = Callable[[], object]
CallKey = tuple[str, Mode]  # name of a provider, and what it is asked for


class CallTimes(NamedTuple):
    """What the rounds gave."""

    time_ms: dict[CallKey, list[float]]
    """One time a round."""
    sm_clock_mhz: list[float]
    """One reading a round, while the device works; empty without nvidia-ml-py."""
    allocation_retries: int
    """How often memory was so short that the allocator emptied its cache, which costs time."""


def bench_head(out: Path | None, *, quick: bool, names: Sequence[str] | None, minutes: float, profile: bool) -> int:
    """Run the benchmark; the meaning of the arguments is told by ``reflectron bench head --help``.

    Returns:
        0; what failed is in the rows.

    Raises:
        ValueError: on an unknown provider, a folder that has rows already, or a profile without a CUDA device.
    """
    unknown = set(names or ()) - set(BUILDERS)
    if unknown:
        raise ValueError(f"--providers names {', '.join(sorted(unknown))}, expected some of {', '.join(BUILDERS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    if profile and not cuda:
        raise ValueError("--profile needs a CUDA device: what the CPU spends its time on says nothing about a GPU")
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
        print(NO_DEVICE, flush=True)
    cases = (quick_cases() if quick else all_cases()) if cuda else tiny_cases()
    path = None if out is None or profile else new_rows_file(out)
    rows = BenchRows("head", provenance(DISTRIBUTIONS, cuda=cuda) | {"dtype": "bfloat16", "seed": 0}, path)
    chosen = _build(names or tuple(BUILDERS), rows)
    if profile:
        _profile(chosen, cases[0], device, out)
        return 0
    deadline = time.monotonic() + 60 * minutes
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {where(asdict(case))}", flush=True)
            _MeasuredCase(case, rows, deadline).measure(chosen, device)
    finally:
        print(write_head_report(rows.rows, out))
    if not cuda:
        print(NO_DEVICE)
    return 0


def _build(names: Sequence[str], rows: BenchRows) -> list[Provider]:
    """Return the providers that this machine has; a row says why it lacks another."""
    found = []
    for name in (name for name in BUILDERS if name in names):
        try:
            found.append(BUILDERS[name]())
        except Exception as error:  # a peer built for another torch raises anything
            reason = f"{reason_of(error)}; pip install 'reflectron[bench]'"
            rows.add("availability", provider=name, mode="full", note="", configuration={}, reason=reason)
            print(f"{name}: {reason}", flush=True)
    return found


class _MeasuredCase:
    """One case: its tensors live as long as this."""

    def __init__(self, case: HeadCase, rows: BenchRows, deadline: float) -> None:
        self.case, self.rows, self.deadline = case, rows, deadline

    def measure(self, chosen: Sequence[Provider], device: torch.device) -> None:
        """Add errors and memory of each provider that can take the case, then the times of all that got so far."""
        able = [p for p in chosen if p.sharded or self.case.tp == 1]
        if time.monotonic() > self.deadline:
            return self._no_times(able, OUT_OF_TIME)
        inputs = make_inputs(self.case, device)
        truth = exact(inputs)
        self._add("float64", "kl", "nats", [truth.terms["kl"].loss.item()])
        able = [p for p in able if self._try(p, inputs, truth)]
        release(device)
        if device.type != "cuda":
            return self._no_times(able, "no CUDA device")
        return self._time(able, inputs) if self.case.timed else None

    def _try(self, provider: Provider, inputs: ProviderInputs, truth: ProviderTruth) -> bool:
        """Make the first calls, in which a provider compiles and tunes; whether they went well."""
        try:
            self._check(provider, inputs, truth)
            if inputs.weight.is_cuda:
                extra = extra_memory_bytes(lambda: provider.step(inputs, provider.terms or "full"))
                self._add(provider, "extra_memory", "MiB", [extra / 2**20])
                if provider.forward is not None:
                    provider.forward(inputs)
        except Exception as error:  # whatever a peer raises is the finding
            self._add(provider, "availability", "", reason=reason_of(error))
            print(f"    {provider.name}: {reason_of(error)}", flush=True)
        else:
            return True
        # Outside the handler, whose exception holds the tensors of the failed call. A device that is broken raises here
        # again and ends the run.
        release(inputs.weight.device)
        return False

    def _check(self, provider: Provider, inputs: ProviderInputs, truth: ProviderTruth) -> None:
        """Add errors of its largest loss, and of the divergence alone, which the cross entropies would hide."""
        if provider.terms is None:
            provider.step(inputs, "full")
            return
        for terms in ("full", "kl") if provider.terms == "full" else (provider.terms,):
            inputs.main_grad.zero_()
            prefix = "kl_error" if terms == "kl" else "error"
            for name, error in errors(provider.step(inputs, terms), truth, terms).items():
                self._add(provider, f"{prefix}_{name}", "relative", [error])

    def _time(self, able: Sequence[Provider], inputs: ProviderInputs) -> None:
        calls: dict[CallKey, Call] = {}
        for provider in able:
            calls[provider.name, "full"] = partial(provider.step, inputs, provider.terms or "full")
            if provider.forward is not None:
                calls[provider.name, "forward"] = partial(provider.forward, inputs)
        try:
            rounds = time_rounds(calls, self.deadline)
        except torch.OutOfMemoryError as error:
            return self._no_times(able, reason_of(error))
        if rounds is None:
            return self._no_times(able, OUT_OF_TIME)
        by_name = {provider.name: provider for provider in able}
        for name, mode in calls:
            self._add_times(by_name[name], mode, rounds)
        self._add("gpu", "sm_clock", "MHz", rounds.sm_clock_mhz)
        return None

    def _add_times(self, provider: Provider, mode: Mode, rounds: CallTimes) -> None:
        """Add time and throughput, and the ratios to the floor and to the head in the same round."""
        times = rounds.time_ms[provider.name, mode]
        retries = rounds.allocation_retries
        reason = f"memory was short: {retries} allocations retried, times include it" if retries else None
        self._add(provider, "time", "ms", times, mode, reason)
        # 10^9 FLOP in a millisecond are a TFLOP/s.
        self._add(provider, "throughput", "TFLOP/s", [self.case.flop(mode) / t / 1e9 for t in times], mode)
        for base in (FLOOR, OURS):
            if (against := rounds.time_ms.get((base, mode))) is not None and base != provider.name:
                ratios = [t / b for t, b in zip(times, against, strict=True)]
                self._add(provider, f"time_over_{base}", "ratio", ratios, mode)

    def _no_times(self, able: Sequence[Provider], reason: str) -> None:
        for provider in able:
            self._add(provider, "time", "ms", reason=reason)

    def _add(
        self,
        of: Provider | str,
        metric: str,
        unit: str,
        values: Sequence[float] = (),
        mode: Mode = "full",
        reason: str | None = None,
    ) -> None:
        name, note, configuration = (of, "", {}) if isinstance(of, str) else (of.name, of.note, dict(of.configuration))
        case = {key: value for key, value in asdict(self.case).items() if key != "timed"}
        facts = {"note": note, "configuration": configuration}
        self.rows.add(metric, unit, values, reason=reason, provider=name, mode=mode, **case, **facts)


def time_rounds(calls: Mapping[CallKey, Call], deadline: float) -> CallTimes | None:
    """Time all calls side by side; the L2 cache is overwritten before each, and nothing of the device is set.

    Args:
        calls: what to time; each has run before, and compiled and tuned what it needs.
        deadline: ``time.monotonic()`` by which to end.

    Returns:
        At least ``MIN_ROUNDS`` rounds, or None where they do not fit before the deadline.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    keys = list(calls)
    seconds = 0.0
    for _ in range(WARM_UP_ROUNDS):
        start = time.monotonic()
        _round(keys, calls, flush)
        seconds = time.monotonic() - start
    if time.monotonic() + MIN_ROUNDS * seconds > deadline:
        return None
    count = min(max(int(SECONDS / seconds), MIN_ROUNDS), MAX_ROUNDS)
    found = CallTimes({key: [] for key in keys}, [], _allocation_retries())
    with collections_between_rounds():
        for order in take_turns(keys, count):
            for key, milliseconds in _round(order, calls, flush, found.sm_clock_mhz).items():
                found.time_ms[key].append(milliseconds)
    return found._replace(allocation_retries=_allocation_retries() - found.allocation_retries)


def _round(
    keys: list[CallKey], calls: Mapping[CallKey, Call], flush: torch.Tensor, clocks: list[float] | None = None
) -> dict[CallKey, float]:
    """Return the milliseconds of each call on the device."""
    times = {}
    for key in keys:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        calls[key]()
        end.record()
        if clocks is not None and key == keys[-1]:
            clocks += _sm_clock_mhz()
        end.synchronize()
        times[key] = begin.elapsed_time(end)
    return times


def _allocation_retries() -> int:
    return torch.cuda.memory_stats()["num_alloc_retries"]


def _sm_clock_mhz() -> list[float]:
    """Return one reading, or none where NVML cannot be asked: a driver may refuse it, as for a part of a GPU."""
    try:
        return [float(torch.cuda.clock_rate())]
    except Exception:
        return []


def extra_memory_bytes(call: Callable[[], ProviderGradients]) -> int:
    """Return the peak of allocated memory in a call, beyond what was there before and the gradients it returns."""
    before = torch.cuda.memory_allocated()
    peak, found = peak_memory(call)
    returned = torch.cuda.memory_allocated() - before
    del found
    return peak - before - returned


def _profile(chosen: Sequence[Provider], case: HeadCase, device: torch.device, out: Path | None) -> None:
    """Print the table of each provider, and keep it in ``out``."""
    inputs = make_inputs(case, device)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for provider in chosen:
        try:
            spent = profile_call(partial(provider.step, inputs, provider.terms or "full"), device)
        except Exception as error:
            spent = reason_of(error)
        text = f"{provider.name}: {where(asdict(case))}, one call\n{spent}\n"
        print(text, flush=True)
        if out is not None:
            (out / f"profile_{provider.name}.txt").write_text(text, encoding="utf-8")


def profile_call(call: Call, device: torch.device) -> str:
    """Return torch.profiler's table of one call, the longest kernel first."""
    for _ in range(WARM_UP_ROUNDS):
        call()
    recorded, _ = profiled(call, device)
    return recorded.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=70)
