"""The ranks of ``test_planned_time.py``: seconds of real optimizer steps in several layouts.

``python time_ranks.py PLAN.json`` forks the ranks of each job, as ``layout_ranks.py`` does, one thread a rank. Rank 0
writes the least time of the steps to the job's file: whatever else the machine does can only add to it.
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
from layout_ranks import TOKENIZER, Job

from megatron.core import parallel_state  # isort: skip

from reflectron.engine.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, ParallelConfig
from reflectron.engine.data.global_batch import assemble, share_of_batch
from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.data.views import SampleViews, make_views
from reflectron.engine.flops import decoder_shape, training_cost
from reflectron.engine.model.parallelize import parallelize
from reflectron.engine.optimizer import build_optimizer, shards_optimizer
from reflectron.engine.parallel.process_groups import ParallelGroups, model_parallel_groups
from reflectron.engine.preparation import read_model_inputs
from reflectron.engine.train_step import train_step
from reflectron.engine.trainer import load_model


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
    """Instruction and reflection samples in turn, of lengths that fill the microbatches unevenly."""
    random = np.random.default_rng(0)
    lengths = random.integers(job["tokens"] // 8, job["tokens"] // 4, job["samples"])
    return [_views(int(length), bool(i % 2), random) for i, length in enumerate(lengths)]


def _views(length: int, reflection: bool, random: np.random.Generator) -> SampleViews:
    prompt, final = length // 8, length - length // 6
    supervised = np.arange(length) >= prompt
    visible = np.arange(length) >= length // 2
    sample = TokenizedSample(
        kind="reflection" if reflection else "generation",
        input_ids=random.integers(0, 700, length, dtype=np.int32),
        supervised=supervised,
        blocks=np.empty((0, 3), np.int32),
        prefix_end=final - 8 if reflection else 0,
        final_start=final if reflection else -1,
    )
    return make_views(sample, visible if reflection else None)


def run_job(job: Job, groups: ParallelGroups) -> None:
    config = job_config(job)
    inputs = read_model_inputs(config)
    cost = training_cost(decoder_shape(inputs.arch, config), "none")
    whole = assemble(job_views(job), config, cost, 0.5, groups.data.rank(), groups.data.size())
    batch = share_of_batch(whole, groups.context.rank(), groups.context.size())
    shard = shards_optimizer(config.optimizer, config.parallel.distributed_optimizer)
    chunks = load_model(config, inputs, groups, torch.float32)
    wrapped = parallelize(chunks, config.parallel, shard)
    optimizer = build_optimizer(config.optimizer, wrapped, chunks, inputs.arch, groups, shard)
    train_step(wrapped, optimizer, groups, batch, 1e-5)
    seconds: list[float] = []
    processor: list[float] = []
    for _ in range(job["steps"]):
        dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        train_step(wrapped, optimizer, groups, batch, 1e-5)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    if groups.is_main:
        result: dict[str, Any] = {"seconds": seconds, "processor_seconds": processor}
        Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def rank_main(rank: int, world_size: int, jobs: list[Job], rendezvous: Path) -> None:
    torch.set_num_threads(1)
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
