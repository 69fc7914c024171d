"""Measures the engine beside the reference's way of training, and beside itself without its parts.

This half holds what is measured (shapes, samples, variants and the layouts of their batches) and starts the ranks of
``train_ranks``. Every shape runs in processes of its own, so that none finds another's memory; its variants run side by
side in them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.config import Config, DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.global_batch import GlobalBatch, lay_out, share_of_batch
from reflectron.engine.data.microbatch import pack, page_locked
from reflectron.engine.data.packing import CostModel, packing_sizes
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import SampleViews, SampleWeights, row_weights
from reflectron.engine.model.hf_config import read_hf_config
from reflectron.engine.parallel.process_groups import ParallelGroups, device_type
from reflectron.tools.bench.harness import ASSETS, new_rows_file, read_rows, run_ranks
from reflectron.tools.bench.report import ENGINE, write_train_report
from reflectron.tools.load_config import load_config

NO_RESULT = "on the CPU this shows that the harness works; its times say nothing about training and are no results"

Layout = Literal["packed", "one_by_one", "hidden_kept"]
"""``packed``: as the engine trains. ``one_by_one``: a microbatch a sample, padded to a multiple of 64 tokens at most.
``hidden_kept``: every student's view costs as many tokens as the teacher's. What the student does not see lies beside
it as a segment of its own without a loss: the linear layers pay for it as in the reference, attention a little less,
since a hidden token then attends to hidden ones only."""


@dataclass(frozen=True)
class Variant:
    """One way of training on the same samples."""

    layout: Layout = "packed"
    fused_head: bool = True
    """The Triton backend of the head where it can run; plain torch in chunks of rows otherwise."""
    note: str = ""


VARIANTS = {
    ENGINE: Variant(note="as `reflectron train`"),
    "engine_unpacked": Variant(layout="one_by_one", note="a sample a microbatch"),
    "engine_full_student": Variant(layout="hidden_kept", note="hidden tokens stay in the student's row"),
    "engine_plain_head": Variant(fused_head=False, note="loss.backend reference"),
}
"""Of the engine; ``BASELINE`` is beside them."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What the ranks of one shape measure; it travels as JSON."""

    shape: str
    config: str
    """YAML file of the engine's settings, below the overrides."""
    overrides: list[str]
    layers: int | None
    """None takes as many as fit."""
    samples: int
    data: str | None
    tokenizer: str | None
    mask_rates: list[float]
    variants: list[str]
    builds: dict[str, list[str]]
    """The engine built once more with the overrides of each name."""
    rounds: int
    deadline: float
    """``time.time()`` after which no more work begins."""
    calibration: str | None
    rows: str
    """File that rows are added to."""


def bench_train(plans: Sequence[TrainPlan], settings: dict[str, Any], folder: Path, gpus: int) -> int:
    """Measure each plan and report.

    Args:
        plans: one a shape, with ``config`` and ``rows`` in ``folder``.
        settings: of the engine, which its file gets.
        folder: of rows, pages and logs.
        gpus: ranks.

    Returns:
        Not 0 when the processes of a plan failed, or the engine was measured on none.
    """
    rows = new_rows_file(folder)
    # JSON is YAML.
    Path(plans[0].config).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    cpu = device_type(load_config(plans[0].config, plans[0].overrides).parallel) == "cpu"
    if cpu and settings["parallel"]["device"] != "cpu":
        raise ValueError("no CUDA device is visible; --device cpu tests the harness on a tiny shape")
    code = 0
    for plan in plans:
        code = run_ranks("train_ranks", asdict(plan), gpus, folder / "runs" / Path(plan.shape).stem) or code
    found = read_rows(rows)
    print(write_train_report(found, folder))
    if cpu:
        print(NO_RESULT)
    return code or int(not any(row["variant"] == ENGINE and row["reason"] is None for row in found))


# ---- shapes: real widths and vocabularies, and as many layers as the device holds ----

SHAPES = ("codellama-7b", "codellama-34b", "deepseek-coder-33b")
# Tags that the template ``reflection`` adds to the vocabulary.
_TAGS = 7
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 120,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""For a machine without a GPU: shows that the harness works, and nothing about speed."""


def hf_config_of(shape: str, vocab_size: int | None = None) -> dict[str, Any]:
    """Return ``config.json`` of a shape by name or path, its vocabulary with the tags or as large as given.

    Raises:
        ValueError: when there is no such file.
    """
    named = ASSETS / "models" / f"{shape}.json"
    if shape != "tiny" and not named.exists() and not Path(shape).exists():
        raise ValueError(f"--shapes names {shape!r}, expected {', '.join(SHAPES)}, tiny or a config.json")
    content = dict(TINY) if shape == "tiny" else read_hf_config(named if named.exists() else shape)
    content["vocab_size"] = max(content["vocab_size"], vocab_size or 0) if vocab_size else content["vocab_size"] + _TAGS
    return content


# ---- samples: made up from the papers' lengths, or the user's own ----


def samples_of_file(path: Path, tokenizer_path: str, count: int, config: Config) -> tuple[list[TokenizedSample], int]:
    """Return samples of a file of conversations at even distances from the sorted list, and the tokenizer's size.

    Raises:
        ValueError: when the file has fewer samples that fit than ``count``.
    """
    tokenizer = load_tokenizer(tokenizer_path, config.data.template)
    found = []
    for record in read_records(DataFile(path=str(path))):
        try:
            found.append(tokenize(record.conversation(), tokenizer, config.data.template, config.data.max_length))
        except BadRecord:
            continue
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} samples that fit, expected at least --samples {count}")
    found.sort(key=lambda sample: (sample.kind, len(sample.input_ids)))
    chosen = ((np.arange(count) + 0.5) / count * len(found)).astype(int)
    return [found[index] for index in chosen], tokenizer.size


# ---- layouts: they have the same loss and gradient, and differ in what is computed beside what is needed ----


@dataclass(frozen=True)
class LayoutWork:
    """What a layout makes the model do, over all ranks."""

    model_tokens: int
    """Padding included."""
    microbatches: int
    sequence_length: int
    """Of the longest microbatch."""


def make_batch(
    views: Sequence[SampleViews], layout: Layout, rate: float, config: Config, cost: CostModel, groups: ParallelGroups
) -> tuple[GlobalBatch, LayoutWork]:
    """Return this rank's microbatches, page-locked for CUDA, and the work of all ranks."""
    rank, replicas = groups.dp.rank(), groups.dp.size()
    listed, weights = list(views), row_weights(views, config.loss)
    if layout == "hidden_kept":
        hidden = [_hidden_tokens(v) for v in views if len(v.student_positions)]
        listed, weights = listed + hidden, weights + [SampleWeights(0.0, 0.0, 0.0)] * len(hidden)
    batch = lay_out(listed, weights, config, cost, rate, rank, replicas)
    if layout == "packed" or layout == "hidden_kept":
        microbatches = len(batch.microbatches) * replicas
        work = LayoutWork(microbatches * batch.sequence_length, microbatches, batch.sequence_length)
    elif layout == "one_by_one":
        lengths = _padded_lengths(views, config)
        order = np.argsort([-length for length in lengths], kind="stable")
        mine = tuple(pack([listed[i]], [weights[i]], lengths[i]) for i in order[rank::replicas])
        batch = replace(batch, microbatches=mine, sequence_length=max(lengths))
        work = LayoutWork(sum(lengths), len(lengths), max(lengths))
    else:
        assert_never(layout)
    batch = share_of_batch(batch, groups.cp.rank(), groups.cp.size())
    if groups.device.type == "cuda":
        batch = replace(batch, microbatches=tuple(map(page_locked, batch.microbatches)))
    return batch, work


def _hidden_tokens(view: SampleViews) -> SampleViews:
    """Return what the student does not see, as a view without a loss."""
    none = np.empty(0, np.int64)
    return SampleViews(
        input_ids=np.delete(view.input_ids, view.student_positions),
        student_positions=none,
        rows=none,
        pair_rows=none,
        pair_teacher_labels=none,
        pair_student_labels=none,
    )


def _padded_lengths(views: Sequence[SampleViews], config: Config) -> list[int]:
    """Return the tokens of each sample's microbatch; pipeline stages exchange equal ones only."""
    _, multiple = packing_sizes(config)
    tokens = [len(v.input_ids) + len(v.student_positions) for v in views]
    lengths = [-(-count // multiple) * multiple for count in tokens]
    return lengths if config.parallel.pipeline_model_parallel_size == 1 else [max(lengths)] * len(lengths)
