"""The ranks of ``test_planned_time.py``: seconds of real optimizer steps in several layouts, beside the planner's.

``python time_ranks.py PLAN.json`` forks the ranks of each job, as ``layout_ranks.py`` does, one thread a rank. Rank 0
writes the times to the job's file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from testkit.layout_ranks import TOKENIZER, Job

from megatron.core import parallel_state  # isort: skip

from reflectron.engine.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, ParallelConfig
from reflectron.engine.data.global_batch import assemble, share_of_batch
from reflectron.engine.data.views import SampleViews
from reflectron.engine.model.backends.choose import choose_on_every_rank
from reflectron.engine.model.inputs import read_model_inputs
from reflectron.engine.parallel.cpu_backend import keep_freed_memory
from reflectron.engine.parallel.process_groups import ParallelGroups, model_parallel_groups
from reflectron.engine.training.build import build_model, weight_source
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.training.step import train_step
from reflectron.tools.planner.hardware import make_cluster
from reflectron.tools.planner.predict import batch_of_views, predict_step
from reflectron.tools.planner.samples import instant_views


def job_config(job: Job) -> Config:
    return Config(
        seed=1,
        model=ModelConfig(config=job["model"], dtype="float32"),
        tokenizer=TOKENIZER,
        data=DataConfig(max_length=job["tokens"] // 2),
        loss=LossConfig(backend="reference"),
        batch=BatchConfig(tokens_per_microbatch=job["tokens"]),
        parallel=ParallelConfig(device="cpu", **job["parallel"]),
    )


def job_views(job: Job) -> list[SampleViews]:
    """Samples of lengths that fill the microbatches unevenly."""
    lengths = np.random.default_rng(0).integers(job["tokens"] // 8, job["tokens"] // 4, job["samples"])
    return instant_views(lengths.tolist(), 700)


def run_job(job: Job, groups: ParallelGroups) -> None:
    config = job_config(job)
    inputs = read_model_inputs(config)
    cost = training_cost(decoder_shape(inputs.arch, config), "none")
    views = job_views(job)
    whole = assemble(views, config, cost, 0.5, groups.dp.rank(), groups.dp.size())
    batch = share_of_batch(whole, groups.cp.rank(), groups.cp.size())
    backends = choose_on_every_rank(config, inputs.arch, groups.device)
    model = build_model(config, inputs.arch, groups, weight_source(config, inputs), backends)
    train_step(model.wrapped, model.optimizer, groups, batch, 1e-5)
    seconds: list[float] = []
    processor: list[float] = []
    for _ in range(job["steps"]):
        dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        train_step(model.wrapped, model.optimizer, groups, batch, 1e-5)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    if groups.is_main:
        predicted = None
        if job["rates"]:
            cluster = make_cluster("CPU", job["processes"], calibration=Path(job["rates"]))
            predicted = predict_step(config, inputs.arch, cluster, batch_of_views(views)).parts
        result: dict[str, Any] = {"seconds": seconds, "processor_seconds": processor, "predicted": predicted}
        Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def rank_main(rank: int, world_size: int, jobs: list[Job], rendezvous: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    for job in jobs:
        groups = model_parallel_groups(job_config(job).parallel, torch.device("cpu"), seed=1)
        run_job(job, groups)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def main(plan: Path) -> None:
    jobs: list[Job] = json.loads(plan.read_text(encoding="utf-8"))
    for world_size in sorted({job["processes"] for job in jobs}):
        mine = [job for job in jobs if job["processes"] == world_size]
        torch.multiprocessing.start_processes(
            rank_main,
            (world_size, mine, plan.with_name(f"rendezvous_{world_size}")),
            nprocs=world_size,
            start_method="fork",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
