"""The ranks of ``test_layouts.py``: one global batch's gradient, and the weights after a step, in many layouts.

``python layout_ranks.py PLAN.json`` imports everything once and forks the ranks, which run one layout after the other:
importing takes longer than a layout does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.attention.bias  # brings torch's compiler along; context-parallel ranks would import it one by one
from safetensors.torch import save_file

from reflectron.engine.config import (
    BackendsConfig,
    BatchConfig,
    Config,
    DataConfig,
    DataFile,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
)
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.microbatch import Microbatch, pack
from reflectron.engine.data.sampler import Draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.views import SampleViews, make_views, row_weights
from reflectron.engine.model.inputs import ModelInputs, read_model_inputs
from reflectron.engine.parallel.cpu_backend import redirect_cuda_to_cpu
from testkit import varlen_kernel
from testkit.places import TESTS_DIR

redirect_cuda_to_cpu()


from reflectron.engine.data.global_batch import GlobalBatch, assemble, share_of_batch  # noqa: E402
from reflectron.engine.model.backends.choose import choose_backends  # noqa: E402
from reflectron.engine.model.gpt import PackedGPT  # noqa: E402
from reflectron.engine.model.hf_mapping import hf_pieces  # noqa: E402
from reflectron.engine.model.parallelize import gather_parameters  # noqa: E402
from reflectron.engine.parallel.process_groups import ParallelGroups, model_parallel_groups, stop_process_groups  # noqa: E402
from reflectron.engine.training.build import build_model, weight_source  # noqa: E402
from reflectron.engine.training.flops import decoder_shape, training_cost  # noqa: E402
from reflectron.engine.training.step import forward_backward, reduce_terms, train_step  # noqa: E402
from reflectron.engine.weights.writers import gather_piece  # noqa: E402
from reflectron.kernels import tuning  # noqa: E402

# Fewer, wider tiles: the interpreter's time goes by the number of programs. Only eight shards of 96 columns fit one.
tuning.INTERPRETER = dataclasses.replace(tuning.INTERPRETER, columns=128)

GOLDEN = TESTS_DIR / "golden"
TOKENIZER = TokenizerConfig(path=str(GOLDEN / "tokenizer_before"))
# Generation and reflection samples in turn.
SAMPLES = (9, 18, 3, 21, 0, 12, 22, 15)

Job = dict[str, Any]
Work = Callable[[Job, ParallelGroups], None]


def job_config(job: Job) -> Config:
    budget = job["layout"].get("tokens_per_microbatch", 384)
    return Config(
        seed=1,
        model=ModelConfig(
            config=job["model"], dtype="float32", make_vocab_size_divisible_by=job["layout"].get("divisible_by", 8)
        ),
        tokenizer=TOKENIZER,
        data=DataConfig(max_length=192),
        loss=LossConfig(backend=job["layout"].get("backend", "reference")),
        batch=BatchConfig(tokens_per_microbatch=budget),
        parallel=ParallelConfig(device="cpu", **job["layout"].get("parallel", {})),
        backends=BackendsConfig(**job["layout"].get("backends", {})),
        # A step of the size of the gradient, so that the weights show it.
        optimizer=OptimizerConfig(learning_rate=1.0, eps=1.0, clip_grad_norm=0.0),
    )


@functools.cache
def model_inputs(model: str) -> ModelInputs:
    return read_model_inputs(Config(model=ModelConfig(config=model), tokenizer=TOKENIZER))


@functools.cache
def golden_views(model: str) -> list[SampleViews]:
    """Every sample, the reflection samples at mask rate 0.5."""
    config = Config()
    records = list(read_records(DataFile(path=str(GOLDEN / "samples.jsonl"))))
    tokenizer = model_inputs(model).tokenizer
    samples = [tokenize(records[i].conversation(), tokenizer, "reflection", 192) for i in SAMPLES]
    return [make_views(s, visible_tokens(s, config.mask, 0.5, Draws(0, i))) for i, s in enumerate(samples)]


def global_batch(job: Job, config: Config, inputs: ModelInputs, groups: ParallelGroups) -> GlobalBatch:
    views = golden_views(job["model"])[: job["layout"].get("samples", len(SAMPLES))]
    cost = training_cost(decoder_shape(inputs.arch, config), "none")
    batch = assemble(views, config, cost, 0.5, groups.dp.rank(), groups.dp.size())
    if job["layout"].get("unpacked"):
        return dataclasses.replace(batch, microbatches=one_by_one(views, config.loss))
    return share_of_batch(batch, groups.cp.rank(), groups.cp.size())


def one_by_one(views: list[SampleViews], loss: LossConfig) -> tuple[Microbatch, ...]:
    """A microbatch a sample, without padding."""
    weights = row_weights(views, loss)
    return tuple(
        pack([view], [weight], len(view.input_ids) + len(view.student_positions))
        for view, weight in zip(views, weights, strict=True)
    )


def run_job(job: Job, groups: ParallelGroups) -> None:
    """Write the gradient of unsharded data parallelism, then the weights after steps with sharded optimizer state.

    Where communication overlaps, the first step is unlike all others: it learns in which order gradients arrive, and
    needs no gathered parameters.
    """
    config, inputs, out = job_config(job), model_inputs(job["model"]), Path(job["out"])
    sys.modules["flash_attn"] = sys.modules["transformer_engine.pytorch"] = varlen_kernel
    batch = global_batch(job, config, inputs, groups)
    backends = dataclasses.replace(
        choose_backends(config, inputs.arch, groups.device), attention=job["layout"].get("attention", "sdpa")
    )
    out.mkdir(parents=True, exist_ok=True)

    weights = weight_source(config, inputs)
    parallel = dataclasses.replace(config.parallel, distributed_optimizer=False, overlap_param_gather=None)
    model = build_model(dataclasses.replace(config, parallel=parallel), inputs.arch, groups, weights, backends)
    with torch.no_grad():
        validated = reduce_terms(forward_backward(model.wrapped, groups, batch, forward_only=True), batch, groups)
    calls = count_calls(model.chunks[0])
    for _ in range(job["steps"]):
        for chunk in model.wrapped:
            chunk.zero_grad_buffer()
        terms = reduce_terms(forward_backward(model.wrapped, groups, batch), batch, groups)
    save_pieces(model.chunks, "main_grad", inputs, groups, out / f"gradient_{groups.pp.rank()}.safetensors")

    model = build_model(config, inputs.arch, groups, weights, backends)
    norms = []
    for step in range(1, job["steps"] + 1):
        norms.append(train_step(model.wrapped, model.optimizer, groups, batch, 1.0).grad_norm)
        # Reading the weights brings them up to date, which is the next forward's task.
        if job["saves_every_step"] or step == job["steps"]:
            gather_parameters(model.wrapped)
            save_pieces(model.chunks, "data", inputs, groups, out / f"weights_{step}_{groups.pp.rank()}.safetensors")
    assert validated == terms, "a forward alone takes the same way"
    if groups.is_main:
        computed = {name: count / job["steps"] / len(batch.microbatches) for name, count in calls.items()}
        numbers = {**vars(terms), "grad_norms": norms, "microbatches": len(batch.microbatches), "computed": computed}
        (out / "numbers.json").write_text(json.dumps(numbers), encoding="utf-8")


def count_calls(chunk: PackedGPT) -> dict[str, int]:
    """How often a layer's attention and MLP run from now on; a recomputed one runs twice a microbatch."""
    layer = chunk.decoder.layers[0]
    calls = {"core_attn": 0, "mlp": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    layer.self_attention.core_attention.register_forward_hook(count("core_attn"))
    layer.mlp.register_forward_hook(count("mlp"))
    return calls


def save_pieces(
    chunks: Sequence[PackedGPT], attribute: str, inputs: ModelInputs, groups: ParallelGroups, file: Path
) -> None:
    """Write the whole Hugging Face tensors of this stage, of its parameters or of what hangs on them."""
    tensors = {
        piece.name: gather_piece(piece.view(getattr(parameter, attribute)), piece, groups.tp).clone().contiguous()
        for parameter, pieces in hf_pieces(chunks, inputs.arch, groups.tp.size())
        for piece in pieces
    }
    if groups.dp_cp.rank() == 0 and groups.tp.rank() == 0:
        save_file(tensors, file)


def rank_main(rank: int, work: Work, job: Job, rendezvous: Path) -> None:
    meeting = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job["processes"])
    work(job, model_parallel_groups(job_config(job).parallel, torch.device("cpu"), seed=1))
    stop_process_groups()


def main(plan: Path, work: Work = run_job) -> None:
    """Do ``work`` as every rank of each job, one job after the other."""
    jobs: list[Job] = json.loads(plan.read_text(encoding="utf-8"))
    for model in {job["model"] for job in jobs}:
        golden_views(model)
    # Each job has ranks of its own. Models wrapped for data parallelism are never freed, nor then their groups, whose
    # threads look for messages a hundred times a second: after fifty layouts they are all that the machine does.
    for number, job in enumerate(jobs):
        rendezvous = plan.with_name(f"rendezvous_{number}")
        torch.multiprocessing.start_processes(
            rank_main, (work, job, rendezvous), nprocs=job["processes"], start_method="fork"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
