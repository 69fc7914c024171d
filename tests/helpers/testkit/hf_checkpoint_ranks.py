"""The ranks of ``test_hf_checkpoint.py``: load, export and run models in every parallel layout.

``python hf_checkpoint_ranks.py PLAN.json RANKS`` imports everything, forks the ranks and runs the plan's layouts one
after the other; importing takes seconds, so many small jobs share one start. A job names the sections of its
configuration and the folder ``out``, where rank 0 leaves ``export/``, ``small_files/`` and ``logits.pt``; with ``dist``
its weights come through megatron-core's loader.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from reflectron.engine.config import Config, DataConfig, ModelConfig, ParallelConfig, TokenizerConfig
from reflectron.engine.data.microbatch import segments_of
from reflectron.engine.model.attention import PackedRows
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.model.inputs import ModelInputs, read_model_inputs
from reflectron.engine.parallel.launch import ProcessPlace, free_port
from reflectron.engine.parallel.process_groups import (
    ParallelGroups,
    model_parallel_groups,
    start_process_groups,
    stop_process_groups,
)
from reflectron.engine.training.build import load_model, load_weights
from reflectron.engine.weights.readers import SafetensorsSource, TensorSource
from reflectron.engine.weights.writers import export_checkpoint, export_weights


def job_config(job: dict[str, Any], parallel: ParallelConfig) -> Config:
    return Config(
        seed=7,
        model=ModelConfig(**job["model"]),
        tokenizer=TokenizerConfig(**job.get("tokenizer", {})),
        data=DataConfig(**job.get("data", {})),
        parallel=parallel,
    )


def layout_groups(parallel: ParallelConfig) -> ParallelGroups:
    """The groups of a layout over the processes that have joined, in place of the layout before."""
    parallel_state.destroy_model_parallel()
    # Second groups over gloo serve CUDA jobs only, and the fake backend cannot make them.
    return model_parallel_groups(parallel, torch.device("cpu"), seed=1, create_gloo_process_groups=False)


def run_job(job: dict[str, Any], parallel: ParallelConfig, groups: ParallelGroups) -> None:
    """Load, export, and if asked export once more in small files and compute logits."""
    out, config = Path(job["out"]), job_config(job, parallel)
    out.mkdir(parents=True, exist_ok=True)
    inputs = read_model_inputs(config)
    chunks = load_model(config, inputs, groups, getattr(torch, config.model.dtype), with_weights="dist" not in job)
    if "dist" in job:
        (model,) = chunks
        wanted = {"model": model.sharded_state_dict()}
        model.load_state_dict(dist_checkpointing.load(wanted, job["dist"])["model"])
    export_checkpoint(chunks, inputs, groups, out / "export")
    if "max_file_bytes" in job:
        (out / "small_files").mkdir(exist_ok=True)
        export_weights(chunks, inputs.arch, groups, out / "small_files", job["max_file_bytes"])
    if "batch" in job:
        (model,) = chunks
        logits = packed_logits(model, inputs, parallel, groups, torch.load(job["batch"]))
        if groups.is_main:
            torch.save(logits, out / "logits.pt")


def packed_logits(
    model: PackedGPT,
    inputs: ModelInputs,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    batch: dict[str, Any],
) -> torch.Tensor:
    """Logits [T, V] of a pack, padding of the vocabulary cut off."""

    def logits(hidden_states: torch.Tensor, weight: torch.Tensor, context: None) -> torch.Tensor:
        if parallel.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=groups.tp)
        shard = hidden_states.squeeze(1) @ weight.T
        shards = [torch.empty_like(shard) for _ in range(groups.tp.size())]
        dist.all_gather(shards, shard, group=groups.tp)
        return torch.cat(shards, dim=1)[:, : inputs.arch.vocab_size]

    model.output_processor = logits
    lengths = batch["lengths"]
    segments = segments_of(lengths, lengths, len(batch["positions"]))
    rows = PackedRows(segments=segments, position_ids=batch["positions"])
    with torch.no_grad():
        return model(
            input_ids=batch["tokens"][None],
            position_ids=batch["positions"][None],
            attention_mask=None,
            packed_seq_params=rows,
        )


class CountingSource:
    """Passes on what another source reads, and counts it."""

    def __init__(self, source: TensorSource) -> None:
        self.source, self.bytes_read = source, 0

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        tensor = self.source.read(name, shape, dim, start, stop)
        self.bytes_read += tensor.nbytes
        return tensor


def bytes_read(job: dict[str, Any], parallel: ParallelConfig, rank: int) -> int:
    """What ``rank`` of ``parallel`` reads, without the other ranks: torch's fake backend stands in for them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.tensor_model_parallel_size)
    groups = layout_groups(parallel)
    config = job_config(job, parallel)
    inputs = read_model_inputs(config)
    chunks = load_model(config, inputs, groups, torch.float32)
    source = CountingSource(SafetensorsSource(job["model"]["path"]))
    load_weights(chunks, inputs.arch, source, groups)
    stop_process_groups()
    return source.bytes_read


def rank_main(rank: int, plan_file: Path, world_size: int, port: int) -> None:
    place = ProcessPlace(
        rank=rank, world_size=world_size, local_rank=rank, master_address="127.0.0.1", master_port=port
    )
    os.environ |= place.variables()
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    start_process_groups(ParallelConfig(device="cpu"), seed=1)
    for layout in plan["layouts"]:
        parallel = ParallelConfig(device="cpu", **layout["parallel"])
        groups = layout_groups(parallel)
        for job in layout["jobs"]:
            run_job(job, parallel, groups)
    stop_process_groups()
    if rank == 0:
        for job in plan["counted"]:
            parallel = ParallelConfig(**job["parallel"])
            counts = [bytes_read(job, parallel, rank) for rank in range(parallel.tensor_model_parallel_size)]
            (Path(job["out"]) / "bytes_read.json").write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    ranks = int(sys.argv[2])
    torch.multiprocessing.start_processes(
        rank_main, (Path(sys.argv[1]), ranks, free_port()), nprocs=ranks, start_method="fork"
    )
