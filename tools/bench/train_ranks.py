"""One rank of ``reflectron bench train``: builds the models of one shape, times their steps side by side, adds rows.

A row is the time of a step of one variant on one mask rate, with its speed, memory, loss and prediction; ``reason``
says why something could not be measured. All steps have learning rate 0: the update is computed in full and changes
nothing, so that every variant sees the same weights in every round. A step is timed on the host between two moments at
which every rank's device is idle; the slowest rank counts.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reflectron.engine.config import Config
from reflectron.engine.data.global_batch import count_tokens
from reflectron.engine.data.packing import CostModel
from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.data.views import SampleViews
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.backends.choose import choose_on_every_rank
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.parallel.process_groups import ParallelGroups, start_process_groups, stop_process_groups
from reflectron.engine.training.diagnostics import TIME_GROUPS, time_by_group
from reflectron.engine.training.flops import decoder_shape, training_cost, training_flops
from reflectron.engine.weights.readers import RandomSource
from reflectron.tools.bench.harness import (
    BenchRows,
    RankClock,
    Row,
    collections_between_rounds,
    peak_memory,
    profiled,
    read_plan,
    reason_of,
    release,
    spread,
    take_turns,
)
from reflectron.tools.bench.models import EngineModel, HfReference, is_published_loss
from reflectron.tools.bench.report import BASELINE, ENGINE
from reflectron.tools.bench.train import (
    VARIANTS,
    LayoutWork,
    TrainPlan,
    hf_config_of,
    make_batch,
    samples_of_file,
)
from reflectron.tools.load_config import load_config
from reflectron.tools.planner.hardware import gpu_of, make_cluster
from reflectron.tools.planner.predict import batch_of_views, fitting_layers, predict_step
from reflectron.tools.planner.samples import synthetic_samples, views_at
from reflectron.tools.provenance import provenance

DISTRIBUTIONS = (
    *("reflectron", "torch", "triton", "liger-kernel"),
    *("megatron-core", "transformers", "transformer-engine", "flash-attn", "apex"),
)
BASELINE_NOTE = "transformers, one sample a forward, both views at full length, full logits, gradient checkpointing"
OUT_OF_TIME = "the time of the run was spent"

Step = Callable[[], tuple[float, float]]
"""Runs an optimizer step; loss and gradient norm."""


@dataclass
class Candidate:
    """A variant on one mask rate."""

    name: str
    step: Step
    facts: Row
    others_bytes: int
    """Memory of the model that is built beside this one."""


class MeasuredShape:
    """One shape on this job's ranks, as ``plan`` says."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.config = load_config(plan.config, plan.overrides)
        self.groups = start_process_groups(self.config.parallel, self.config.seed)
        self.clock = RankClock(self.groups)
        vocabulary: int | None = None
        samples: list[TokenizedSample] = []
        if plan.data is not None:
            assert plan.tokenizer is not None, "the command asks for it"
            samples, vocabulary = samples_of_file(Path(plan.data), plan.tokenizer, plan.samples, self.config)
        self.hf_config = hf_config_of(plan.shape, vocabulary)
        if plan.data is None:
            samples = synthetic_samples(plan.samples, self.config, self.hf_config["vocab_size"])
        self.views = {rate: views_at(samples, rate, self.config) for rate in plan.mask_rates}
        self.hf_config["num_hidden_layers"] = plan.layers or self._fitting_layers()
        self.arch = parse_architecture(self.hf_config, plan.shape)
        self.source = RandomSource(self.config.seed, self.arch.initializer_range, self.groups.device)
        self.cost = training_cost(decoder_shape(self.arch, self.config), "none")
        common = provenance(DISTRIBUTIONS, cuda=self.groups.device.type == "cuda") | self._common()
        self.device = str(common["device"])
        self.rows = BenchRows("train", common, Path(plan.rows) if self.groups.is_main else None)

    def _fitting_layers(self) -> int:
        if self.groups.device.type != "cuda":
            return int(self.hf_config["num_hidden_layers"])
        device = torch.cuda.get_device_properties(self.groups.device)
        gpu, world = gpu_of(device.name), dist.get_world_size()
        if gpu is None:
            raise ValueError(f"--layers is auto, expected a number: the planner does not know {device.name}")
        # At the lowest rate students see the most.
        batch = batch_of_views(self.views[min(self.plan.mask_rates)])
        cluster, beside = make_cluster(gpu.name, world, world), BASELINE in self.plan.variants
        whole = parse_architecture(self.hf_config)
        return fitting_layers(whole, self.config, cluster, batch, device.total_memory, beside)

    def _common(self) -> Row:
        """Return what the rows of this shape share."""
        parallel = self.config.parallel
        return {
            "shape": self.plan.shape,
            "layers": self.arch.num_layers,
            "dtype": self.config.model.dtype,
            "seed": self.config.seed,
            "devices": dist.get_world_size(),
            "data": self.plan.data or "assumed distribution 'papers'",
            "samples": self.plan.samples,
            "tokens_per_microbatch": self.config.batch.tokens_per_microbatch,
            "parallel": vars(parallel),
            "recompute": parallel.recompute,
            "overrides": self.plan.overrides,
        }

    def measure(self) -> None:
        """Measure the variants side by side, then the other builds of the engine one after the other."""
        self._measure_main()
        for name, overrides in self.plan.builds.items():
            release(self.groups.device)
            shown = f"{ENGINE}[{name}]"
            engine = self._attempt(shown, partial(self._engine, overrides))
            if engine is None:
                continue
            for rate in self.plan.mask_rates:
                candidate = self._engine_candidate(engine, ENGINE, rate, 0)
                candidate.name, candidate.facts["build"] = shown, overrides
                self._run(rate, [candidate])
            del engine

    def _engine(self, overrides: Sequence[str] = ()) -> EngineModel:
        config = load_config(self.plan.config, [*self.plan.overrides, *overrides])
        chosen = choose_on_every_rank(config, self.arch, self.groups.device)
        return EngineModel(config, self.arch, self.source, self.groups, chosen)

    def _measure_main(self) -> None:
        plan, start = self.plan, allocated_bytes(self.groups)
        engine = self._engine()
        names = [name for name in plan.variants if name in VARIANTS]
        first = plan.mask_rates[0]
        # A first step makes the optimizer's state, which stays.
        self._attempt(ENGINE, self._engine_candidate(engine, ENGINE, first, 0).step)
        engine_bytes, baseline, baseline_bytes = allocated_bytes(self.groups) - start, None, 0
        if BASELINE in plan.variants and (baseline := self._attempt(BASELINE, self._baseline)) is not None:
            if self._attempt(BASELINE, self._baseline_candidate(baseline, first, 0).step) is None:
                baseline = None
            baseline_bytes = allocated_bytes(self.groups) - start - engine_bytes
        for rate in plan.mask_rates:
            candidates = [self._engine_candidate(engine, n, rate, baseline_bytes) for n in names]
            if baseline is not None:
                candidates.insert(0, self._baseline_candidate(baseline, rate, engine_bytes))
            self._run(rate, candidates)

    def _baseline(self) -> HfReference:
        if not is_published_loss(self.config.loss):
            raise ValueError("the baseline computes the published loss only")
        dtype = getattr(torch, self.config.model.dtype)
        return HfReference(self.hf_config, self.source, dtype, self.config.optimizer, self.groups)

    def _baseline_candidate(self, baseline: HfReference, rate: float, others_bytes: int) -> Candidate:
        views = self.views[rate]
        # Both views of a reflection sample at full length, a forward a sample.
        lengths = [len(v.input_ids) * (1 if v.is_generation else 2) for v in views]
        work = LayoutWork(sum(lengths), len(lengths), max(len(v.input_ids) for v in views))
        about: Row = {"note": BASELINE_NOTE, "build": [], "backends": {"attention": baseline.attention}}
        step = partial(baseline.step, baseline.samples(views), len(views))
        return Candidate(BASELINE, step, vars(work) | about, others_bytes)

    def _engine_candidate(self, engine: EngineModel, name: str, rate: float, others_bytes: int) -> Candidate:
        variant, views = VARIANTS[name], self.views[rate]
        batch, work = make_batch(views, variant.layout, rate, engine.config, self.cost, self.groups)
        facts = vars(work) | {"note": variant.note, "build": [], "backends": engine.backends(variant.fused_head)}
        if variant.layout == "packed":
            calibration = Path(self.plan.calibration) if self.plan.calibration else None
            facts |= predicted_facts(engine.settled(variant.fused_head), self.arch, views, self.device, calibration)
        return Candidate(name, partial(engine.step, batch, variant.fused_head), facts, others_bytes)

    def _run(self, rate: float, candidates: list[Candidate]) -> None:
        """Warm up with results and peak memory, time rounds side by side, and profile, all that get so far."""
        if self.clock.is_late(self.plan.deadline):
            for candidate in candidates:
                self._add_reason(candidate.name, OUT_OF_TIME, rate)
            return
        able = [c for c in candidates if self._attempt(c.name, partial(self._warm_up, c), rate) is not None]
        if not able:
            return
        times = time_rounds({c.name: c.step for c in able}, self.plan.rounds, self.plan.deadline, self.clock)
        for candidate in able:
            seconds = times[candidate.name]
            candidate.facts |= speed_facts(self.views[rate], self.cost, seconds, self.config, self.device)
            # A profiler that fails, as without the right to the device's counters, costs its own numbers only.
            profile = partial(profile_step, candidate.step, self.clock)
            candidate.facts["time_ms_by_group"] = self._attempt(f"{candidate.name}, profiled", profile, rate)
            self._add(candidate.name, rate, [one * 1e3 for one in seconds], candidate.facts)

    def _warm_up(self, candidate: Candidate) -> bool:
        candidate.step()
        peak, (loss, norm) = peak_bytes(candidate.step, self.clock)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        alone = None if peak is None else (peak - candidate.others_bytes) / 2**30
        candidate.facts |= {"loss": loss, "grad_norm": norm, "peak_memory_gib": alone}
        return True

    def _attempt(self, name: str, action: Callable[[], Any], rate: float | None = None) -> Any:
        """Return what ``action`` returns; None when it fails, which becomes a row."""
        try:
            return action()
        except Exception as error:
            # Other ranks would wait for this one.
            if dist.get_world_size() > 1:
                raise
            reason = reason_of(error)
        # Outside the handler, whose exception holds the tensors of the failed action.
        release(self.groups.device)
        self._add_reason(name, reason, rate)
        return None

    def _add_reason(self, name: str, reason: str, rate: float | None = None) -> None:
        """Add rows that say why there is nothing: of one mask rate, or of all."""
        for one in self.plan.mask_rates if rate is None else (rate,):
            self._add(name, one, (), {"build": []}, reason)

    def _add(self, name: str, rate: float, times_ms: Sequence[float], facts: Row, reason: str | None = None) -> None:
        """Add a row with the tokens that the paper's loss needs, and their operations."""
        tokens = count_tokens(self.views[rate])
        needed = {f"tokens_{kind}": getattr(tokens, kind) for kind in ("teacher", "student", "generation")}
        facts = needed | {"useful_flops": useful_flops(self.views[rate], self.cost)} | facts
        row = self.rows.add("step_time", "ms", times_ms, reason=reason, variant=name, mask_rate=rate, **facts)
        if self.groups.is_main:
            print(f"{self.plan.shape} x{self.arch.num_layers}  {name:22} rate {rate:.2f}  {_result(row)}", flush=True)


def _result(row: Row) -> str:
    """Return what a row holds, for the terminal."""
    if row["reason"]:
        return str(row["reason"])
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    return f"{row['p50']:9.1f} ms  {row['samples_per_second']:8.2f} samples/s{mfu}"


# ---- facts of a row ----


def useful_flops(views: Sequence[SampleViews], cost: CostModel) -> float:
    """Count what a step cannot do without: each view as long as it is seen, logits of the rows with a loss."""
    lengths = [len(v.input_ids) for v in views] + [len(v.student_positions) for v in views]
    return training_flops(cost, lengths, sum(v.logit_rows for v in views))


def speed_facts(
    views: Sequence[SampleViews], cost: CostModel, seconds: Sequence[float], config: Config, device: str
) -> Row:
    """Return rates from a time a round; model FLOPs utilisation is null where the planner does not know the peak."""
    median, gpu = spread(seconds)["p50"], gpu_of(device)
    peak = gpu.bf16_flops if gpu and config.model.dtype == "bfloat16" else None
    done = useful_flops(views, cost) / (median * dist.get_world_size())
    return {
        "samples_per_second": len(views) / median,
        "useful_tokens_per_second": count_tokens(views).total / median,
        "dense_bf16_peak_flops": peak,
        "mfu": None if peak is None else done / peak,
    }


def predicted_facts(
    config: Config, arch: Architecture, views: Sequence[SampleViews], device: str, calibration: Path | None
) -> Row:
    """Return the planner's step and its bytes in tensors; nothing on a device that it has no rates of."""
    gpu, devices = gpu_of(device), dist.get_world_size()
    if gpu is None:
        return {}
    try:
        cluster = make_cluster(gpu.name, devices, devices, calibration)
        step = predict_step(config, arch, cluster, batch_of_views(views))
    except ValueError as error:
        return {"predicted_from": f"nothing: {error}"}
    return {
        "predicted_step_time_ms": step.step_seconds * 1e3,
        "predicted_memory_gib": (step.memory.total - step.memory.reserved) / 2**30,
        "predicted_from": cluster.source,
    }


# ---- timing ----


def time_rounds(steps: Mapping[str, Step], rounds: int, deadline: float, clock: RankClock) -> dict[str, list[float]]:
    """Return seconds of every step, one a round; fewer, but one, where ``time.time()`` passes ``deadline``."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    with collections_between_rounds():
        for index, order in enumerate(take_turns(list(steps), rounds)):
            if index and clock.is_late(deadline):
                break
            for name in order:
                found[name].append(clock.slowest(steps[name])[0])
            gc.collect()
    return found


def peak_bytes(step: Step, clock: RankClock) -> tuple[float | None, tuple[float, float]]:
    """Return the peak of allocated memory in a step, on the fullest rank, and what it returned; None on the CPU."""
    if clock.groups.device.type != "cuda":
        return None, step()
    peak, result = peak_memory(step)
    return clock.most(peak), result


def allocated_bytes(groups: ParallelGroups) -> int:
    """Return the device memory in use now; 0 on the CPU."""
    return torch.cuda.memory_allocated() if groups.device.type == "cuda" else 0


def profile_step(step: Step, clock: RankClock) -> dict[str, float]:
    """Return milliseconds of one step by what they go to, on this rank: kernels of a GPU, operations of the CPU.

    ``idle`` is the wall time in which no kernel ran; the profiler slows the host down, so it is an upper bound. Every
    rank calls it.
    """
    device = clock.groups.device
    recorded, (seconds, _) = profiled(lambda: clock.slowest(step), device)
    spent = dict.fromkeys(TIME_GROUPS, 0.0) | time_by_group(recorded.events(), device.type == "cuda")
    return spent | {"idle": max(seconds * 1e3 - sum(spent.values()), 0.0)}


if __name__ == "__main__":
    MeasuredShape(TrainPlan(**read_plan())).measure()
    stop_process_groups()
