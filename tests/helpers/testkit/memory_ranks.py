"""The ranks of ``test_planned_memory.py``: bytes of real tensors in several layouts, beside what the planner counts.

``python memory_ranks.py PLAN.json`` forks the ranks of each job, as ``layout_ranks.py`` does, whose model and samples
it takes. A rank writes its numbers to the job's folder.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from reflectron.engine.optim.optimizer import optimizer_parts
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.build import build_model, weight_source
from reflectron.engine.training.step import train_step
from reflectron.tools.planner import memory
from reflectron.tools.planner.backends import STACKS
from testkit.layout_ranks import Job, global_batch, job_config, main, model_inputs


class SavedBytes:
    """Peak bytes of the storages that autograd has saved and not freed yet, parameters excluded."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters, self.live, self.now, self.peak = parameters, dict[int, int](), 0, 0

    def pack(self, tensor: torch.Tensor) -> Saved:
        return Saved(self, tensor)

    def count(self, storage: torch.UntypedStorage, change: int) -> None:
        address = storage.data_ptr()
        if address in self.parameters:
            return
        holders = self.live.get(address, 0)
        self.live[address] = holders + change
        if (holders == 0) != (holders + change == 0):
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class Saved:
    """A saved tensor; autograd drops it when the backward has used it."""

    def __init__(self, total: SavedBytes, tensor: torch.Tensor) -> None:
        # Detached: a custom function's own output would hold its graph, and with it this object.
        self.total, self.tensor = total, tensor.detach()
        total.count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.total.count(self.tensor.untyped_storage(), -1)


def tensors_of(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    return []


def run_job(job: Job, groups: ParallelGroups) -> None:
    config = job_config(job)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=job["dtype"]),
        optimizer=dataclasses.replace(config.optimizer, **job["optimizer"]),
    )
    inputs = model_inputs(job["model"])
    batch = global_batch(job, config, inputs, groups)
    model = build_model(config, inputs.arch, groups, weight_source(config, inputs))
    optimizer = model.optimizer
    parameters = [p for chunk in model.chunks for p in chunk.parameters()]
    saved = SavedBytes({p.untyped_storage().data_ptr() for p in parameters})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda one: one.tensor):
        train_step(model.wrapped, optimizer, groups, batch, 1e-3)
    # float32 copies of bfloat16 parameters are the optimizer's own parameters.
    masters = [p for group in optimizer.param_groups for p in group["params"] if p.dtype != parameters[0].dtype]
    states = [t for o in optimizer_parts(optimizer) for t in optimizer_tensors(o)]
    measured = {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": sum(t.nbytes for t in (*masters, *states) if t.dim()),
        "saved": saved.peak,
    }
    stage = memory.stages_of(inputs.arch, config.parallel)[groups.pp.rank()]
    rows = max(len(m.loss_rows.index) + 2 * len(m.loss_rows.teacher_index) for m in batch.microbatches)
    sizes = {"sequence_length": batch.sequence_length, "rows": rows * config.parallel.context_parallel_size}
    backends = STACKS["plain"]
    planned = memory.rank_memory(
        inputs.arch, config, backends, stage, replicas=groups.dp.size(), microbatches=len(batch.microbatches), **sizes
    )
    layer = memory.layer_activations(inputs.arch, config, backends, batch.sequence_length)
    again = layer.everything - layer.kept(config.parallel)
    head = memory.head_kept_bytes(inputs.arch, config, backends, **sizes) if stage.is_last else 0
    result = {
        "measured": measured,
        "planned": {
            **{name: getattr(planned, name) for name in ("parameters", "gradients", "optimizer")},
            "saved": planned.activations + again + head,
        },
    }
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")


def optimizer_tensors(optimizer: object) -> list[torch.Tensor]:
    return tensors_of(dict(optimizer.optimizer.state))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]), run_job)
