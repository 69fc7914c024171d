"""The run that the reference recorded, computed by the engine: logits, accumulated gradients, the run, what it ends in.

``python recorded_run.py OUT.json`` writes all of it, as the one rank of a job.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectron.engine.config import (
    Config,
    DataConfig,
    DataFile,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
)
from testkit.places import TESTS_DIR

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from reflectron.engine.data.global_batch import GlobalBatch
    from reflectron.engine.data.tokenization import TokenizedSample
    from reflectron.engine.data.views import SampleViews
    from reflectron.engine.model.architecture import Architecture
    from reflectron.engine.model.gpt import PackedGPT
    from reflectron.engine.parallel.process_groups import ParallelGroups


GOLDEN_DIR = TESTS_DIR / "golden"
GOLDEN: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))
RUN = GOLDEN["train_runs"]["bs1_ga4_2epochs_fp64"]
ACCUMULATED = RUN["setup"]["gradient_accumulation_steps"]
ACCUMULATION = next(one for one in GOLDEN["grad_accumulation"] if one["model"] == "llama")
LOGITS = GOLDEN["logits"]["llama"]
VOCABULARY = GOLDEN["tokenizer"]["llama"]["vocab_after"]
# golden.json does not say at which rate the final losses were taken: with text and code hidden they agree.
FINAL_RATE = 0.5
CONFIG = Config(
    model=ModelConfig(path=str(GOLDEN_DIR / "llama_after"), dtype="float32"),
    tokenizer=TokenizerConfig(path=str(GOLDEN_DIR / "tokenizer_after")),
    data=DataConfig(max_length=448),
    mask=MaskConfig(strategy="block", order="tce"),
    optimizer=OptimizerConfig(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, clip_grad_norm=1.0),
)

# Records that golden.json names in the run but does not list, by their number in samples.jsonl.
_UNLISTED = {
    **{f"g_{index:02}": index for index in range(12)},
    "r_three_repeats": 14,
    "r_two_code_blocks": 16,
    "r_empty_blocks": 18,
    "r_text_only_between": 20,
    "r_exec_first": 22,
    "r_five_repeats": 23,
}
INDEX = _UNLISTED | {sample["name"]: sample["index"] for sample in GOLDEN["samples"]}


def tokenized_samples() -> dict[str, TokenizedSample]:
    """Every sample that fits, by name."""
    from reflectron.engine.data.sources import read_records
    from reflectron.engine.data.tokenization import tokenize
    from reflectron.engine.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(GOLDEN_DIR / "tokenizer_after"), "reflection")
    records = list(read_records(DataFile(path=str(GOLDEN_DIR / "samples.jsonl"))))
    return {
        name: tokenize(records[index].conversation(), tokenizer, "reflection", CONFIG.data.max_length)
        for name, index in INDEX.items()
        if name != "r_too_long"
    }


def views_at(sample: TokenizedSample, rate: float) -> SampleViews:

    from reflectron.engine.data.masking import visible_tokens
    from reflectron.engine.data.sampler import Draws
    from reflectron.engine.data.views import make_views

    return make_views(sample, visible_tokens(sample, CONFIG.mask, rate, Draws(0)))


def one_sample_microbatches(views: Sequence[SampleViews]) -> GlobalBatch:
    """A global batch laid out as the reference did it: every sample in a forward of its own, in this order."""
    from reflectron.engine.data.global_batch import GlobalBatch, TermWeights, count_tokens
    from reflectron.engine.data.microbatch import pack
    from reflectron.engine.data.views import row_weights

    length = max(len(v.input_ids) + len(v.student_positions) for v in views)
    pairs = zip(views, row_weights(views, LossConfig()), strict=True)
    return GlobalBatch(
        microbatches=tuple(pack([v], [w], length) for v, w in pairs),
        members=tuple((index,) for index in range(len(views))),
        sequence_length=length,
        fill=1.0,
        mask_rate=0.0,
        tokens=count_tokens(views),
        term_weights=TermWeights(0, 0, 0, 0),
    )


def compute(groups: ParallelGroups) -> dict[str, Any]:
    """Everything that the tests compare, by one model: logits and gradients first, then the run that changes it."""

    from reflectron.engine.model.backends.choose import choose_backends
    from reflectron.engine.model.inputs import read_model_inputs
    from reflectron.engine.training.build import build_model, weight_source

    samples, inputs = tokenized_samples(), read_model_inputs(CONFIG)
    backends = choose_backends(CONFIG, inputs.arch, groups.device)
    built = build_model(CONFIG, inputs.arch, groups, weight_source(CONFIG, inputs), backends)
    (model,), (wrapped,) = built.chunks, built.wrapped
    return {
        "logits": compute_logits(model, samples),
        "accumulation": compute_accumulation(wrapped, built.optimizer, groups, samples),
        **compute_run(wrapped, built.optimizer, groups, samples),
        **compute_final_state(model, inputs.arch, samples),
    }


def compute_logits(model: PackedGPT, samples: dict[str, TokenizedSample]) -> dict[str, Any]:
    """Both views' logits of the recorded sample, from a model whose output processor returns them."""
    import numpy as np
    import torch

    from reflectron.engine.data.microbatch import pack
    from reflectron.engine.data.views import row_weights
    from reflectron.engine.model.attention import PackedRows

    sample = samples[LOGITS["sample"]]
    views = views_at(sample, float(LOGITS["rate"]))
    length, seen = len(sample.input_ids), views.student_positions
    batch = pack([views], row_weights([views], LossConfig()), length + len(seen))
    loss = model.output_processor
    model.output_processor = lambda hidden, weight, _: hidden.squeeze(1) @ weight[:VOCABULARY].t()
    with torch.no_grad():
        logits = model(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            packed_seq_params=PackedRows(segments=batch.segments, position_ids=batch.position_ids),
        )
    model.output_processor = loss
    teacher, student = logits.split([length, len(seen)])
    rows = {"teacher": {int(row): teacher[int(row)] for row in LOGITS["teacher_first8"]}}
    rows["student"] = {int(row): student[np.searchsorted(seen, int(row))] for row in LOGITS["student_first8"]}
    return {
        view: {row: {"first8": x[:8].tolist(), "logsumexp": x.logsumexp(0).item()} for row, x in of_row.items()}
        for view, of_row in rows.items()
    }


def compute_accumulation(
    wrapped: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    samples: dict[str, TokenizedSample],
) -> dict[str, Any]:
    """Loss of each of the three microbatches and the norm of their mean's gradient."""
    from reflectron.engine.training.step import forward_backward

    views = [views_at(samples[name], float(ACCUMULATION["rate"])) for name in ACCUMULATION["micro_batches"]]
    wrapped.zero_grad_buffer()
    terms = forward_backward([wrapped], groups, one_sample_microbatches(views))
    optimizer.prepare_grads()
    return {"losses": (terms[:, 0] * len(views)).tolist(), "grad_norm": float(optimizer.get_grad_norm())}


def compute_run(
    wrapped: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
    samples: dict[str, TokenizedSample],
) -> dict[str, Any]:
    """Train the recorded run again, its samples, mask rates and learning rates handed in."""
    from reflectron.engine.optim.optimizer import set_learning_rate
    from reflectron.engine.training.step import forward_backward

    losses: list[float] = []
    grad_norms: list[float] = []
    for step, learning_rate in enumerate(RUN["lr_used"]):
        recorded = RUN["collated"][ACCUMULATED * step : ACCUMULATED * (step + 1)]
        views = [views_at(samples[name], *(one["mask_rates"] or [0.0])) for one in recorded for name in one["samples"]]
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        terms = forward_backward([wrapped], groups, one_sample_microbatches(views))
        losses += (terms[:, 0] * ACCUMULATED).tolist()
        set_learning_rate(optimizer, learning_rate)
        _, grad_norm, _ = optimizer.step()
        grad_norms.append(float(grad_norm))
    return {"losses": losses, "grad_norms": grad_norms}


def compute_final_state(model: PackedGPT, arch: Architecture, samples: dict[str, TokenizedSample]) -> dict[str, Any]:
    """Losses and parameters after the run."""
    import torch

    from reflectron.engine.model.hf_mapping import hf_pieces
    from reflectron.engine.training.diagnostics import sample_loss

    parameters = {}
    for parameter, pieces in hf_pieces([model], arch, tensor_parallel_size=1):
        for piece in pieces:
            value = piece.view(parameter.detach()).double()
            first4 = value.flatten()[:4].tolist()
            parameters[piece.name] = {"norm": value.norm().item(), "sum": value.sum().item(), "first4": first4}
    with torch.no_grad():
        final_loss = {
            name: sample_loss(model, views_at(samples[name], FINAL_RATE))[1].loss for name in RUN["final_loss"]
        }
    return {"parameters": parameters, "final_loss": final_loss}


def main(out: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups

    groups = start_process_groups(CONFIG.parallel, CONFIG.seed)
    out.write_text(json.dumps(compute(groups)))
    stop_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
