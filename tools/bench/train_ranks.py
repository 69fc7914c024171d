"""One rank of ``reflectron bench train``: builds the models of one shape, times their steps side by side, writes rows.

A row is a JSON object: one variant on one mask rate. What could not be measured is null or absent, and ``reason`` says
why. All steps have learning rate 0: the update is computed in full and changes nothing, so that every variant sees the
same weights in every round.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
from reflectron.engine.text import one_line
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.weights.readers import RandomSource
from reflectron.tools.bench.hf_baseline import HfReference, is_published_loss
from reflectron.tools.bench.machine import machine
from reflectron.tools.bench.rows import environment, installed_version
from reflectron.tools.bench.train_batches import make_batch
from reflectron.tools.bench.train_facts import (
    Row,
    baseline_work,
    gib,
    predicted_facts,
    row_line,
    sample_facts,
    speed_facts,
    work_facts,
)
from reflectron.tools.bench.train_model import EngineModel
from reflectron.tools.bench.train_plan import BASELINE, ENGINE, VARIANTS, Build, TrainPlan, read_plan
from reflectron.tools.bench.train_samples import samples_of_file, synthetic_samples, views_at
from reflectron.tools.bench.train_shapes import fitting_layers, gpu_of, hf_config_of
from reflectron.tools.bench.train_timing import Step, allocated_bytes, is_late, peak_bytes, time_by_group, time_rounds
from reflectron.tools.load_config import load_config
from reflectron.tools.planner.hardware import make_cluster
from reflectron.tools.planner.predict import batch_of_views

DISTRIBUTIONS = ("megatron-core", "transformers", "transformer-engine", "flash-attn", "liger-kernel", "apex")
BASELINE_NOTE = "transformers, one sample a forward, both views at full length, full logits, gradient checkpointing"


@dataclass
class Candidate:
    """A variant on one mask rate."""

    name: str
    step: Step
    facts: Row
    others_bytes: int
    """Memory of the model that is built beside this one."""


class Shape:
    """One shape on this job's ranks, as ``plan`` says."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan = plan
        self.config = load_config(plan.config, list(plan.overrides))
        self.groups = start_process_groups(self.config.parallel, self.config.seed)
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
        self.common = self._common()

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
        return fitting_layers(self.hf_config, self.config, cluster, batch, device.total_memory, beside)

    def _common(self) -> Row:
        """What the rows of this shape share."""
        found, parallel = environment(self.groups.device), self.config.parallel
        if self.groups.device.type == "cpu":
            found["device"] = f"CPU {machine(())['cpu']}"
        found["versions"] |= {name: installed_version(name) for name in DISTRIBUTIONS}
        return found | {
            "benchmark": "train",
            "shape": self.plan.shape,
            "layers": self.arch.num_layers,
            "dtype": self.config.model.dtype,
            "seed": self.config.seed,
            "devices": dist.get_world_size(),
            "data": self.plan.data or "assumed distribution 'papers'",
            "samples": self.plan.samples,
            "tokens_per_microbatch": self.config.batch.tokens_per_microbatch,
            "parallel": {key: value for key, value in vars(parallel).items() if key.endswith("_size")},
            "recompute": parallel.recompute,
            "overrides": list(self.plan.overrides),
        }

    def measure(self) -> None:
        """The variants side by side, then the other builds of the engine one after the other."""
        self._measure_main()
        for build in self.plan.builds:
            self._release()
            name = f"{ENGINE}[{build.name}]"
            engine = self._attempt(name, partial(self._build_again, build))
            if engine is None:
                continue
            for rate in self.plan.mask_rates:
                self._run(rate, [self._engine_candidate(engine, ENGINE, rate, 0, build)])
            del engine

    def _build_again(self, build: Build) -> EngineModel:
        config = load_config(self.plan.config, [*self.plan.overrides, *build.overrides])
        return EngineModel(config, self.arch, self.source, self.groups)

    def _measure_main(self) -> None:
        plan, start = self.plan, allocated_bytes(self.groups)
        engine = EngineModel(self.config, self.arch, self.source, self.groups)
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
        facts = work_facts(baseline_work(views)) | {
            "note": BASELINE_NOTE,
            "build": [],
            "backends": {"attention": baseline.attention},
        }
        step = partial(baseline.step, baseline.samples(views), len(views))
        return Candidate(BASELINE, step, facts, others_bytes)

    def _engine_candidate(
        self, engine: EngineModel, name: str, rate: float, others_bytes: int, build: Build | None = None
    ) -> Candidate:
        variant, views = VARIANTS[name], self.views[rate]
        batch, work = make_batch(views, variant.layout, rate, engine.config, self.cost, self.groups)
        facts = work_facts(work) | {
            "note": variant.note,
            "build": list(build.overrides) if build else [],
            "backends": engine.backends(variant.fused_head),
        }
        if variant.layout == "packed":
            calibration = Path(self.plan.calibration) if self.plan.calibration else None
            place = (self.common["device"], dist.get_world_size(), calibration)
            facts |= predicted_facts(engine.settled(variant.fused_head), self.arch, views, *place)
        shown = f"{name}[{build.name}]" if build else name
        return Candidate(shown, engine.step(batch, variant.fused_head), facts, others_bytes)

    def _run(self, rate: float, candidates: list[Candidate]) -> None:
        """Warm-up with results and peak memory, rounds side by side, and a profile, of all that get so far."""
        if is_late(self.plan.deadline, self.groups):
            for candidate in candidates:
                self._add_reason(candidate.name, "the time of the run was spent", rate)
            return
        able = [c for c in candidates if self._attempt(c.name, partial(self._warm_up, c), rate) is not None]
        if not able:
            return
        times = time_rounds({c.name: c.step for c in able}, self.plan.rounds, self.plan.deadline, self.groups)
        place = (self.config, self.common["device"], dist.get_world_size())
        for candidate in able:
            candidate.facts |= speed_facts(self.views[rate], self.cost, times[candidate.name], *place)
            # A profiler that fails, as without the right to the device's counters, costs its own numbers only.
            profile = partial(time_by_group, candidate.step, self.groups)
            candidate.facts["time_ms_by_group"] = self._attempt(f"{candidate.name}, profiled", profile, rate)
            self._add(candidate.name, rate, candidate.facts)

    def _warm_up(self, candidate: Candidate) -> bool:
        candidate.step()
        peak, (loss, norm) = peak_bytes(candidate.step, self.groups)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        alone = None if peak is None else peak - candidate.others_bytes
        candidate.facts |= {"loss": loss, "grad_norm": norm, "peak_memory_gib": gib(alone)}
        return True

    def _attempt(self, name: str, action: Callable[[], Any], rate: float | None = None) -> Any:
        """What ``action`` returns; None when it fails, which becomes a row."""
        try:
            return action()
        except Exception as error:
            # Other ranks would wait for this one.
            if dist.get_world_size() > 1:
                raise
            reason = one_line(error)[:200]
        # Outside the handler, whose exception holds the tensors of the failed action.
        self._release()
        self._add_reason(name, reason, rate)
        return None

    def _add_reason(self, name: str, reason: str, rate: float | None = None) -> None:
        """Rows that say why there is nothing: of one mask rate, or of all."""
        for one in self.plan.mask_rates if rate is None else (rate,):
            self._add(name, one, {"reason": reason})

    def _add(self, name: str, rate: float, facts: Row) -> None:
        row = {"variant": name, "mask_rate": rate, "reason": None} | sample_facts(self.views[rate], self.cost)
        row |= facts | self.common
        if self.groups.is_main:
            with open(self.plan.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row_line(row), flush=True)

    def _release(self) -> None:
        gc.collect()
        if self.groups.device.type == "cuda":
            torch.cuda.empty_cache()


def main(plan_file: Path) -> None:
    """Measure what the plan says."""
    Shape(read_plan(plan_file)).measure()
    stop_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
