"""One rank of ``reflectron bench checkpoint``: saves and loads the state of random models, and writes the rows."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reflectron.engine.checkpoint.checkpointer import Checkpointer, find_resume_point
from reflectron.engine.checkpoint.manifest import SkippedSteps
from reflectron.engine.checkpoint.retention import checkpoints_folder, step_folder
from reflectron.engine.checkpoint.storage import load
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import CheckpointConfig, Config, OptimizerConfig
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.backends.choose import PLAIN
from reflectron.engine.model.gpt import build_chunks, transformer_config
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.parallelize import parallelize
from reflectron.engine.optim.optimizer import build_optimizer
from reflectron.engine.parallel.process_groups import ParallelGroups, start_process_groups, stop_process_groups
from reflectron.engine.training.build import load_weights
from reflectron.engine.weights.readers import RandomSource
from reflectron.tools.bench.machine import machine

DISTRIBUTIONS = ("reflectron", "torch", "megatron-core")
DTYPE = torch.bfloat16


def architecture(layers: int) -> Architecture:
    """A Llama with 12.6 million parameters a layer."""
    return parse_architecture(
        {
            "model_type": "llama",
            "hidden_size": 1024,
            "intermediate_size": 2731,
            "num_attention_heads": 16,
            "num_hidden_layers": layers,
            "rms_norm_eps": 1e-5,
            "vocab_size": 1024,
        }
    )


def training_state(arch: Architecture, config: Config, groups: ParallelGroups) -> TrainingState:
    """A random model and its optimizer after a step without a gradient."""
    transformer = transformer_config(arch, config.parallel, DTYPE, PLAIN)
    chunks = build_chunks(arch, transformer, arch.vocab_size, lambda hidden, *_: hidden, PLAIN)
    load_weights(chunks, arch, RandomSource(0, 0.02), groups)
    wrapped = parallelize(chunks, config.parallel, shard_optimizer=True)
    optimizer = build_optimizer(OptimizerConfig(), wrapped, chunks, arch, groups, shard=True)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.step()
    return TrainingState(chunks, optimizer, arch, groups)


def seconds(action: Callable[[], Any]) -> float:
    """Until the last rank has done it."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Let go of what the kernel still holds of the files, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(state: TrainingState, root: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by metric."""
    found: dict[str, list[float]] = {}

    def note(metric: str, value: float) -> None:
        found.setdefault(metric, []).append(value)

    for asynchronous in (False, True):
        config = Config(
            output_dir=str(root / f"asynchronous_{asynchronous}"),
            checkpoint=CheckpointConfig(asynchronous=asynchronous),
        )
        messages: list[str] = []
        checkpointer = Checkpointer(config, state, {}, {}, messages.append)
        for step in range(1, rounds + 1):
            start = seconds(lambda: checkpointer.save(step, SkippedSteps()))  # noqa: B023
            if asynchronous:
                note("asynchronous_stall", start)
                note("asynchronous_complete", start + seconds(checkpointer.wait))
            else:
                note("save", start)
            assert "could not" not in messages[-1], messages[-1]
    checkpoints = checkpoints_folder(str(root / "asynchronous_False"))
    folder = step_folder(checkpoints, rounds)
    found["bytes"] = [float(sum(path.stat().st_size for path in folder.iterdir()))]
    for _ in range(rounds):
        forget(folder)
        note("check", seconds(lambda: find_resume_point(checkpoints, {})))
        forget(folder)
        note("load", seconds(lambda: load(state, folder, updates=rounds, same_layout=True)))
    return found


def write_rows(path: Path, arch: Architecture, found: dict[str, list[float]], common: dict[str, Any]) -> None:
    """A row a metric: the 20, 50 and 80 per cent quantiles over the rounds."""
    with path.open("a", encoding="utf-8") as file:
        for metric, values in found.items():
            quantiles = dict(zip(("p20", "p50", "p80"), np.quantile(values, (0.2, 0.5, 0.8)).tolist(), strict=True))
            unit = "bytes" if metric == "bytes" else "s"
            row = {"bench": "checkpoint", "metric": metric, "unit": unit, **quantiles, "rounds": len(values)}
            row |= common | {"model": asdict(arch)}
            print(f"{row['parameters'] / 1e6:8.1f} M parameters  {metric:22} {row['p50']:.4g} {unit}", flush=True)
            file.write(json.dumps(row) + "\n")


def main(plan_file: Path) -> None:
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    groups = start_process_groups(Config().parallel, seed=1)
    common = machine(DISTRIBUTIONS) | {"processes": dist.get_world_size(), "dtype": str(DTYPE), "optimizer": "adamw"}
    for layers in plan["layers"]:
        arch = architecture(layers)
        state = training_state(arch, Config(), groups)
        parameters = sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters())
        found = measure(state, Path(plan["scratch"]) / str(layers), plan["rounds"])
        if groups.is_main:
            write_rows(Path(plan["rows"]), arch, found, common | {"parameters": parameters})
    stop_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
