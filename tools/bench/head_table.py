"""Table of the distillation head: every provider on every case, side by side in one process, as rows, text, plot.

With a CUDA device it measures times, memory and errors. Without one it runs tiny shapes, the kernels in Triton's
interpreter, and records errors only. A provider that cannot be imported or fails is a row that says why.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from reflectron.engine.text import one_line
from reflectron.tools.bench import peers, providers
from reflectron.tools.bench.cases import Case, Mode, all_cases, quick_cases, tiny_cases
from reflectron.tools.bench.inputs import Inputs, Truth, errors, exact, make_inputs
from reflectron.tools.bench.measure import Key, Rounds, extra_memory_bytes, profile_call, time_rounds
from reflectron.tools.bench.providers import FLOOR, OURS, Provider
from reflectron.tools.bench.report import write_report
from reflectron.tools.bench.rows import RowFile, environment

BUILDERS: dict[str, Callable[[], Provider]] = {
    FLOOR: providers.floor,
    OURS: partial(providers.head, "triton"),
    "reference": partial(providers.head, "reference"),
    "orda": peers.orda,
    "liger": peers.liger,
    "cut-cross-entropy": peers.cut_cross_entropy,
    "eager": providers.eager,
    "compile": providers.compiled,
}
NO_DEVICE = (
    "no CUDA device: tiny shapes in Triton's interpreter, for correctness only; times mean nothing, none are kept"
)


def bench_head(out: Path | None, *, quick: bool, names: Sequence[str] | None, minutes: float, profile: bool) -> int:
    """Run the benchmark; the meaning of the arguments is told by ``reflectron bench --help``.

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
    chosen, missing = _build(names or tuple(BUILDERS))
    if profile:
        _profile(chosen, cases[0], device, out)
        return 0
    rows = RowFile(out, environment(device))
    for name, reason in missing.items():
        rows.add(None, name, "availability", "", reason=reason)
    deadline = time.monotonic() + 60 * minutes
    try:
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.text}", flush=True)
            _Run(case, rows, deadline).measure(chosen, device)
    finally:
        print(write_report(rows.rows, out))
    if not cuda:
        print(NO_DEVICE)
    return 0


class _Run:
    """One case: its tensors live as long as this."""

    def __init__(self, case: Case, rows: RowFile, deadline: float) -> None:
        self.case, self.rows, self.deadline = case, rows, deadline

    def measure(self, chosen: Sequence[Provider], device: torch.device) -> None:
        """Errors and memory of each provider that can take the case, then the times of all that got so far."""
        able = [p for p in chosen if p.sharded or self.case.tp == 1]
        if time.monotonic() > self.deadline:
            return self._no_times(able, "the time of the run was spent")
        inputs = make_inputs(self.case, device)
        truth = exact(inputs)
        self.rows.add(self.case, "float64", "kl", "nats", [truth.loss["kl"]])
        able = [p for p in able if self._try(p, inputs, truth)]
        _release(device)
        if device.type != "cuda":
            self._no_times(able, "no CUDA device")
        elif self.case.timed:
            self._time(able, inputs)
        return None

    def _try(self, provider: Provider, inputs: Inputs, truth: Truth) -> bool:
        """First calls, in which a provider compiles and tunes; whether they went well."""
        try:
            self._check(provider, inputs, truth)
            if inputs.weight.is_cuda:
                extra = extra_memory_bytes(lambda: provider.step(inputs, provider.terms or "full"))
                self._add(provider, "extra_memory", "MiB", [extra / 2**20])
                if provider.forward is not None:
                    provider.forward(inputs)
        except Exception as error:  # whatever a peer raises is the finding
            self._add(provider, "availability", "", reason=_reason(error))
            print(f"    {provider.name}: {_reason(error)}", flush=True)
        else:
            return True
        # Outside the handler, whose exception holds the tensors of the failed call. A device that is broken raises here
        # again and ends the run.
        _release(inputs.weight.device)
        return False

    def _check(self, provider: Provider, inputs: Inputs, truth: Truth) -> None:
        """Errors of its largest loss, and of the divergence alone, which the cross entropies would hide."""
        if provider.terms is None:
            provider.step(inputs, "full")
            return
        for terms in ("full", "kl") if provider.terms == "full" else (provider.terms,):
            inputs.main_grad.zero_()
            prefix = "kl_error" if terms == "kl" else "error"
            for name, error in errors(provider.step(inputs, terms), truth, terms).items():
                self._add(provider, f"{prefix}_{name}", "relative", [error])

    def _time(self, able: Sequence[Provider], inputs: Inputs) -> None:
        calls: dict[Key, Callable[[], object]] = {}
        for provider in able:
            calls[provider.name, "full"] = partial(provider.step, inputs, provider.terms or "full")
            if provider.forward is not None:
                calls[provider.name, "forward"] = partial(provider.forward, inputs)
        try:
            rounds = time_rounds(calls, self.deadline)
        except torch.OutOfMemoryError as error:
            return self._no_times(able, _reason(error))
        if rounds is None:
            return self._no_times(able, "the time of the run was spent")
        for provider in able:
            for mode in ("full", "forward") if provider.forward else ("full",):
                self._add_times(provider, mode, rounds)
        self.rows.add(self.case, "gpu", "sm_clock", "MHz", rounds.sm_clock_mhz)
        return None

    def _add_times(self, provider: Provider, mode: Mode, rounds: Rounds) -> None:
        """Time and throughput, and the ratios to the floor and to the head in the same round."""
        times = rounds.time_ms[provider.name, mode]
        retries = rounds.allocation_retries
        reason = f"memory was short: {retries} allocations retried, times include it" if retries else None
        self._add(provider, "time", "ms", times, mode=mode, reason=reason)
        # 10^9 FLOP in a millisecond are a TFLOP/s.
        self._add(provider, "throughput", "TFLOP/s", [self.case.flop(mode) / t / 1e9 for t in times], mode=mode)
        for base in (FLOOR, OURS):
            if (against := rounds.time_ms.get((base, mode))) is not None and base != provider.name:
                ratios = [t / b for t, b in zip(times, against, strict=True)]
                self._add(provider, f"time_over_{base}", "ratio", ratios, mode=mode)

    def _no_times(self, able: Sequence[Provider], reason: str) -> None:
        for provider in able:
            self._add(provider, "time", "ms", reason=reason)

    def _add(
        self,
        provider: Provider,
        metric: str,
        unit: str,
        values: Sequence[float] = (),
        mode: Mode = "full",
        reason: str | None = None,
    ) -> None:
        self.rows.add(
            self.case,
            provider.name,
            metric,
            unit,
            values,
            mode=mode,
            reason=reason,
            note=provider.note,
            configuration=provider.configuration,
        )


def _build(names: Sequence[str]) -> tuple[list[Provider], dict[str, str]]:
    """The providers that this machine has, and why it lacks the others."""
    found, missing = [], {}
    for name in BUILDERS:
        if name not in names:
            continue
        try:
            found.append(BUILDERS[name]())
        except Exception as error:  # a peer built for another torch raises anything
            missing[name] = f"{_reason(error)}; pip install 'reflectron[bench]'"
            print(f"{name}: {missing[name]}", flush=True)
    return found, missing


def _profile(chosen: Sequence[Provider], case: Case, device: torch.device, out: Path | None) -> None:
    """Print the table of each provider, and keep it in ``out``."""
    inputs = make_inputs(case, device)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    for provider in chosen:
        try:
            table = profile_call(partial(provider.step, inputs, provider.terms or "full"))
        except Exception as error:
            table = _reason(error)
        text = f"{provider.name}: {case.text}, one call\n{table}\n"
        print(text, flush=True)
        if out is not None:
            (out / f"profile_{provider.name}.txt").write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    return one_line(error)[:200]


def _release(device: torch.device) -> None:
    """Give memory back, so that one provider's leavings do not stand in another's way."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
