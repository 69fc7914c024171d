"""The ranks of ``test_checkpoint.py``: train, save and load in one layout after the other.

``python checkpoint_ranks.py PLAN.json`` imports everything once and forks the ranks of each group of jobs, which has a
number of processes; importing takes longer than a job does. A job has a layout, what it does, and the file of its
result.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from reflectron.engine.checkpoint.checkpointer import Checkpointer, find_resume_point, parallel_layout
from reflectron.engine.checkpoint.folder import SkippedSteps
from reflectron.engine.checkpoint.storage import PlannedSave, load
from reflectron.engine.checkpoint.training_state import TrainingState
from reflectron.engine.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DataFile,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
)
from reflectron.engine.data.global_batch import GlobalBatch, assemble, share_of_batch
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import Draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.views import make_views
from reflectron.engine.model.backends.choose import choose_backends
from reflectron.engine.model.inputs import ModelInputs, read_model_inputs
from reflectron.engine.optim.optimizer import optimizer_parts
from reflectron.engine.parallel.cpu_backend import redirect_cuda_to_cpu
from reflectron.engine.parallel.process_groups import ParallelGroups, model_parallel_groups, stop_process_groups
from reflectron.engine.training.build import TrainableModel, load_model, make_trainable
from reflectron.engine.training.flops import decoder_shape, training_cost
from reflectron.engine.training.step import train_step
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
RATE = 1e-2


def job_config(job: dict[str, Any]) -> Config:
    return Config(
        output_dir=job["output_dir"],
        seed=1,
        model=ModelConfig(
            config=job["model"],
            dtype=job.get("dtype", "float32"),
            make_vocab_size_divisible_by=job.get("divisible_by", 8),
        ),
        tokenizer=TokenizerConfig(path=str(GOLDEN / "tokenizer_before")),
        data=DataConfig(max_length=448),
        batch=BatchConfig(global_batch_size=4, tokens_per_microbatch=768),
        parallel=ParallelConfig(device="cpu", **job.get("parallel", {})),
        optimizer=OptimizerConfig(name=job.get("optimizer", "adamw"), learning_rate=RATE, weight_decay=0.1),
        checkpoint=CheckpointConfig(asynchronous="steps_while_saving" in job),
    )


def golden_batch(config: Config, inputs: ModelInputs, groups: ParallelGroups) -> GlobalBatch:

    records = list(read_records(DataFile(path=str(GOLDEN / "samples.jsonl"))))
    samples = [
        tokenize(records[i].conversation(), inputs.tokenizer, "reflection", config.data.max_length)
        for i in (0, 1, 2, 12)
    ]
    views = [make_views(s, visible_tokens(s, config.mask, 0.5, Draws(0, i))) for i, s in enumerate(samples)]
    cost = training_cost(decoder_shape(inputs.arch, config), "none")
    whole = assemble(views, config, cost, 0.5, groups.dp.rank(), groups.dp.size())
    return share_of_batch(whole, groups.cp.rank(), groups.cp.size())


@dataclass(frozen=True)
class Training:
    """A model in training."""

    model: TrainableModel
    state: TrainingState
    batch: GlobalBatch

    @staticmethod
    def build(config: Config, groups: ParallelGroups, with_weights: bool, as_experts: bool = False) -> Training:
        inputs = read_model_inputs(config)
        backends, dtype = choose_backends(config, inputs.arch, groups.device), getattr(torch, config.model.dtype)
        chunks = load_model(config, inputs, groups, dtype, backends, with_weights)
        if not with_weights:
            # What happens to be in memory must not matter, not even in the rows that pad the vocabulary.
            for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
                parameter.data.fill_(float("nan"))
        for chunk in chunks if as_experts else []:
            for name, parameter in chunk.named_parameters():
                if ".mlp." in name:
                    parameter.allreduce = False  # type: ignore[attr-defined]
        model = make_trainable(chunks, config, inputs.arch, groups, backends)
        assert len(optimizer_parts(model.optimizer)) == 1 + as_experts
        state = TrainingState(model.chunks, model.optimizer, inputs.arch, groups)
        return Training(model, state, golden_batch(config, inputs, groups))

    def steps(self, count: int) -> list[list[float]]:
        """Loss and gradient norm of each step."""
        model, groups = self.model, self.state.groups
        results = [train_step(model.wrapped, model.optimizer, groups, self.batch, RATE) for _ in range(count)]
        return [[result.terms.loss, result.grad_norm] for result in results]

    def random_numbers(self) -> list[float]:
        return torch.rand(2).tolist()


def run_job(job: dict[str, Any]) -> None:
    config = job_config(job)
    groups = model_parallel_groups(config.parallel, torch.device("cpu"), config.seed)
    result: dict[str, Any] = {"lines": []}
    training = Training.build(config, groups, job["do"] != "load", job.get("as_experts", False))
    updates = job.get("updates", 3)
    if job["do"] == "train":
        training.steps(updates)
    elif job["do"] == "save":
        training.steps(updates)
        checkpointer = Checkpointer(config, training.state, {"seed": 1}, {}, result["lines"].append)
        result["while_saving"] = save(checkpointer, training, job.get("steps_while_saving", 0), updates)
        result["random_numbers"] = training.random_numbers()
    else:
        point = find_resume_point(Path(config.output_dir) / "checkpoints", {"seed": 1})
        assert point is not None
        same_layout = point.manifest.layout == parallel_layout(groups, len(training.state.chunks))
        load(
            training.state,
            point.folder,
            updates=point.manifest.step - point.manifest.skipped.total,
            same_layout=same_layout,
        )
        result["random_numbers"] = training.random_numbers()
    result["steps"] = training.steps(3 - job.get("steps_while_saving", 0))
    if groups.is_main:
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    stop_process_groups()


def save(checkpointer: Checkpointer, training: Training, steps_while_saving: int, updates: int) -> list[list[float]]:
    """Save after three steps, those without an update skipped; steps meanwhile are trained before a byte is written."""
    if not steps_while_saving:
        checkpointer.save(3, SkippedSteps(total=3 - updates, in_a_row=3 - updates))
        return []
    released, write = threading.Event(), PlannedSave.write

    def write_when_released(planned: PlannedSave) -> Any:
        released.wait()
        return write(planned)

    PlannedSave.write = write_when_released  # type: ignore[method-assign]
    checkpointer.save(3, SkippedSteps())
    results = training.steps(steps_while_saving)
    assert checkpointer.is_writing
    assert not (checkpointer.root / "latest").exists()
    released.set()
    checkpointer.wait()
    PlannedSave.write = write  # type: ignore[method-assign]
    return results


def rank_main(rank: int, processes: int, jobs: list[dict[str, Any]], rendezvous: Path) -> None:
    redirect_cuda_to_cpu()
    for number, job in enumerate(jobs):
        meeting = f"file://{rendezvous}_{number}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
        run_job(job)


def main(plan: Path) -> None:
    for number, (processes, jobs) in enumerate(json.loads(plan.read_text(encoding="utf-8"))):
        rendezvous = plan.with_name(f"rendezvous_{number}")
        torch.multiprocessing.start_processes(
            rank_main, (processes, jobs, rendezvous), nprocs=processes, start_method="fork"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
