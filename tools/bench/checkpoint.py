"""Measures saving and loading of training checkpoints: time, stall and bytes, as rows.

The ranks are processes of this machine, the models random, the state that of AdamW after a step, sharded over the
ranks. What is measured is this machine's disk as much as the code; a row says which.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from reflectron.engine.checkpoint.checkpointer import Checkpointer, find_resume_point
from reflectron.engine.checkpoint.folder import SkippedSteps, checkpoints_folder, step_folder
from reflectron.engine.checkpoint.storage import load
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import CheckpointConfig, Config, ModelConfig
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.backends.choose import PLAIN
from reflectron.engine.parallel.process_groups import ParallelGroups, start_process_groups, stop_process_groups
from reflectron.engine.training.build import build_model
from reflectron.engine.weights.readers import RandomSource
from reflectron.tools.bench.harness import (
    BenchRows,
    RankClock,
    new_rows_file,
    quantities,
    read_plan,
    run_ranks,
    small_llama,
)
from reflectron.tools.provenance import provenance

DISTRIBUTIONS = ("reflectron", "torch", "megatron-core")


def bench_checkpoint(out: Path, layers: Sequence[int], processes: int, rounds: int) -> int:
    """Measure models of each number of ``layers``; return the exit code of the ranks."""
    plan = {"layers": layers, "rounds": rounds, "rows": str(new_rows_file(out)), "scratch": str(out / "scratch")}
    try:
        return run_ranks("checkpoint", plan, processes, out / "scratch")
    finally:
        shutil.rmtree(out / "scratch", ignore_errors=True)


def training_state(arch: Architecture, config: Config, groups: ParallelGroups) -> TrainingState:
    """Return a random model and its optimizer after a step without a gradient."""
    model = build_model(config, arch, groups, RandomSource(0, 0.02), PLAIN)
    for chunk in model.wrapped:
        chunk.zero_grad_buffer()
    model.optimizer.step()
    return TrainingState(model.chunks, model.optimizer, arch, groups)


def forget(folder: Path) -> None:
    """Let go of what the kernel still holds of the files, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(state: TrainingState, root: Path, rounds: int, clock: RankClock) -> dict[str, list[float]]:
    """Return the seconds of each round by metric."""
    names = ("save", "asynchronous_stall", "asynchronous_complete", "bytes", "check", "load")
    found: dict[str, list[float]] = {name: [] for name in names}
    for asynchronous in (False, True):
        folder = root / f"asynchronous_{asynchronous}"
        config = Config(output_dir=str(folder), checkpoint=CheckpointConfig(asynchronous=asynchronous))
        messages: list[str] = []
        checkpointer = Checkpointer(config, state, {}, {}, messages.append)
        for step in range(1, rounds + 1):
            stall, _ = clock.slowest(lambda: checkpointer.save(step, SkippedSteps()))  # noqa: B023
            if asynchronous:
                found["asynchronous_stall"].append(stall)
                found["asynchronous_complete"].append(stall + clock.slowest(checkpointer.wait)[0])
            else:
                found["save"].append(stall)
            assert step_folder(checkpoints_folder(str(folder)), step).exists(), messages[-1]
    checkpoints = checkpoints_folder(str(root / "asynchronous_False"))
    folder = step_folder(checkpoints, rounds)
    found["bytes"].append(float(sum(path.stat().st_size for path in folder.iterdir())))
    for _ in range(rounds):
        forget(folder)
        found["check"].append(clock.slowest(lambda: find_resume_point(checkpoints, {}))[0])
        forget(folder)
        found["load"].append(clock.slowest(lambda: load(state, folder, updates=rounds, same_layout=True))[0])
    return found


def main() -> None:
    """Be one rank: measure what the plan says, and on the main rank write a row a metric."""
    plan, config = read_plan(), Config(model=ModelConfig(dtype="bfloat16"))
    groups = start_process_groups(config.parallel, seed=1)
    common = provenance(DISTRIBUTIONS, cuda=groups.device.type == "cuda")
    common |= {"processes": dist.get_world_size(), "dtype": config.model.dtype, "optimizer": "adamw"}
    for layers in plan["layers"]:
        # 12.6 million parameters a layer.
        arch = small_llama(1024, 2731, 16, 16, layers, 1024)
        state = training_state(arch, config, groups)
        parameters = sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters())
        found = measure(state, Path(plan["scratch"]) / str(layers), plan["rounds"], RankClock(groups))
        if groups.is_main:
            rows = BenchRows("checkpoint", common, Path(plan["rows"]))
            for metric, values in found.items():
                unit = "bytes" if metric == "bytes" else "s"
                row = rows.add(metric, unit, values, parameters=parameters, model=asdict(arch))
                print(f"{parameters / 1e6:8.1f} M parameters  {metric:22} {quantities(row)} {unit}", flush=True)
        del state
    stop_process_groups()


if __name__ == "__main__":
    main()
