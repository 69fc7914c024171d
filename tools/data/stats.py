"""Count what training on a dataset will cost, in tokens.

The samples, masks and packs are those of a run with the same configuration: the numbers come from the code that trains.
No model is needed, so packs are balanced by tokens alone; a run also balances their FLOPs within the same length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from reflectron.engine.config import Config
from reflectron.engine.data.batch_source import StoreSource
from reflectron.engine.data.global_batch import GlobalBatch, GlobalBatches
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.packing import CostModel
from reflectron.engine.data.sampler import SampleOrder, SampleRef, mask_draws
from reflectron.engine.data.store import TokenStore, build_store
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import make_views
from reflectron.engine.files import write_text
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.training.run import check_budget, run_length, sample_order, store_folder
from reflectron.tools.load_config import load_config
from reflectron.tools.planner.hardware import Cluster
from reflectron.tools.planner.predict import LayoutPrediction, Planner
from reflectron.tools.planner.report import show_layouts
from reflectron.tools.planner.samples import samples_of

# Where the strategy ``block`` hides one, two and three types of blocks, and the end.
_RATES = (0.0, 0.33, 0.67, 1.0)


@dataclass(frozen=True)
class FileStats:
    """One training file."""

    path: str
    samples: int
    too_long: int
    rejected: int
    with_special_tokens: int
    """Samples whose contents spell a special token."""
    reflection: int
    """Samples with a student."""
    tokens_mean: float
    tokens_p50: float
    tokens_p95: float
    tokens_max: int
    student_share: dict[str, float] | None
    """Student's tokens / teacher's tokens, by mask rate; None without reflection samples."""


@dataclass(frozen=True)
class StepStats:
    """One optimizer step; tokens are of the global batch."""

    step: int
    mask_rate: float
    teacher: int
    student: int
    generation: int
    padded: int
    """Tokens that the packs hold, padding included."""
    reference: int
    """Tokens that the reference computes: padded batches, and the whole sequence for the student too."""
    microbatches: int
    sequence_length: int
    fill: float


@dataclass(frozen=True)
class DatasetStats:
    """A training set, file by file, and steps of a run on it."""

    files: list[FileStats]
    total_steps: int
    """Steps of the run."""
    reference_batch_size: int
    """Samples that the reference pads to one length."""
    steps: list[StepStats]
    """Those that were looked at."""


def stats_config(words: Sequence[str], data: Sequence[str] | None, tokenizer: str | None, scratch: Path) -> Config:
    """Return the configuration of a run, or one for data files alone, whose token store lies in ``scratch``.

    Args:
        words: the path of a configuration and overrides; overrides alone with ``data``.
        data: training files, with ``tokenizer``.

    Raises:
        ValueError: for a configuration beside data files, or neither.
    """
    has_config = bool(words) and "=" not in words[0]
    if has_config == bool(data) or bool(tokenizer) != bool(data):
        raise ValueError("expected either CONFIG or --data with --tokenizer")
    if has_config:
        return load_config(words[0], list(words[1:]))
    tree = {
        "output_dir": str(scratch),
        "data": {"train": [{"path": path} for path in data or ()]},
        "tokenizer": {"path": tokenizer},
    }
    path = scratch / "data.yaml"
    write_text(path, yaml.safe_dump(tree))
    return load_config(str(path), list(words))


def training_store(config: Config, *, show_progress: bool) -> TokenStore:
    """Build or reuse the token store of ``data.train``.

    Raises:
        ValueError: naming the key at fault, or when no sample is left.
    """
    tokenizer_path = config.tokenizer.path or config.model.path
    if tokenizer_path is None:
        raise ValueError("tokenizer.path is null, expected a folder (or model.path)")
    if not config.data.train:
        raise ValueError("data.train is empty, expected at least one file")
    tokenizer = load_tokenizer(tokenizer_path, config.data.template)
    store = build_store(config.data, config.data.train, tokenizer, store_folder(config, "train"), show_progress)
    check_budget(store, config.data.train, config)
    if not len(store):
        raise ValueError("data.train has no sample left, expected at least one")
    return store


def count(store: TokenStore, config: Config, steps: int, reference_batch_size: int) -> DatasetStats:
    """Count the tokens of every file, and of evenly spaced steps.

    Args:
        steps: to look at, 0 for all.
    """
    reflection = np.array([store[i].kind != "generation" for i in range(len(store))])
    order = sample_order(store, config.data.train, config.seed)
    total_steps, looked_at = _step_stats(store, reflection, order, config, steps, reference_batch_size)
    return DatasetStats(_file_stats(store, reflection, config), total_steps, reference_batch_size, looked_at)


def best_layout(store: TokenStore, config: Config, arch: Architecture, cluster: Cluster) -> LayoutPrediction:
    """Predict the fastest layout of a model on this data."""
    return Planner(arch, config, samples_of(store, config), cluster).search()[0]


def show(stats: DatasetStats, best: LayoutPrediction | None) -> None:
    """Print the tables, and the predicted layout where there is one."""
    _print_files(stats.files)
    _print_steps(stats)
    if best is not None:
        show_layouts([best], None)
        print(f"Predicted, not measured: {best.gpu_hours:.1f} GPU hours in the fastest layout that fits.")


def write_json(path: Path, stats: DatasetStats, best: LayoutPrediction | None) -> None:
    """Write everything as one JSON object."""
    content = {**asdict(stats), "planned_gpu_hours": best.gpu_hours if best is not None else None}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _file_stats(store: TokenStore, reflection: np.ndarray, config: Config) -> list[FileStats]:
    stats = []
    for number, summary in enumerate(store.summaries):
        own = store.file_index == number
        # One zero where all records were rejected.
        lengths = store.lengths[own] if own.any() else np.zeros(1, np.int32)
        stats.append(
            FileStats(
                path=summary.path,
                samples=int(own.sum()),
                too_long=summary.too_long,
                rejected=summary.rejected_total,
                with_special_tokens=summary.with_special_tokens,
                reflection=int((own & reflection).sum()),
                tokens_mean=float(lengths.mean()),
                tokens_p50=float(np.median(lengths)),
                tokens_p95=float(np.percentile(lengths, 95)),
                tokens_max=int(lengths.max()),
                student_share=_student_share(store, np.flatnonzero(own & reflection), config),
            )
        )
    return stats


def _student_share(store: TokenStore, samples: np.ndarray, config: Config) -> dict[str, float] | None:
    teacher = int(store.lengths[samples].sum())
    student = dict.fromkeys(_RATES, 0)
    for index in samples.tolist():
        sample = store[index]
        for rate in _RATES:
            draws = mask_draws(config.seed, SampleRef(0, index, 0))
            views = make_views(sample, visible_tokens(sample, config.mask, rate, draws))
            student[rate] += len(views.student_positions)
    return {str(rate): tokens / teacher for rate, tokens in student.items()} if teacher else None


def _step_stats(
    store: TokenStore,
    reflection: np.ndarray,
    order: SampleOrder,
    config: Config,
    look_at: int,
    reference_batch_size: int,
) -> tuple[int, list[StepStats]]:
    """Return the number of steps of the run, and the stats of those that are looked at."""
    total_steps, epochs = run_length(config, order)
    replicas = config.parallel.data_parallel_size or 1
    source = StoreSource(store, order, config, total_steps=total_steps, epochs=epochs)
    batches = GlobalBatches(
        source,
        config,
        CostModel(per_token=1.0, per_token_squared=0.0, per_row=0.0),
        data_parallel_rank=0,
        data_parallel_size=replicas,
    )
    count = total_steps if look_at == 0 else min(look_at, total_steps)
    stats = []
    # Each step stands for an equal part of the run and lies in its middle.
    for step in ((np.arange(count) + 0.5) * total_steps / count).astype(int).tolist():
        batch = batches.batch(step)
        samples = np.array([ref.sample for ref in source.refs(step)])
        reference = reference_tokens(store.lengths[samples], reflection[samples], reference_batch_size)
        stats.append(_step(step, batch, replicas, reference))
    return total_steps, stats


def _step(step: int, batch: GlobalBatch, replicas: int, reference: int) -> StepStats:
    microbatches = len(batch.microbatches) * replicas
    return StepStats(
        step=step,
        mask_rate=batch.mask_rate,
        teacher=batch.tokens.teacher,
        student=batch.tokens.student,
        generation=batch.tokens.generation,
        padded=microbatches * batch.sequence_length,
        reference=reference,
        microbatches=microbatches,
        sequence_length=batch.sequence_length,
        fill=batch.fill,
    )


def reference_tokens(lengths: np.ndarray, reflection: np.ndarray, batch_size: int) -> int:
    """Return the tokens of a step in the reference implementation.

    It takes ``batch_size`` samples of similar length at a time, pads them to the longest, and runs reflection samples
    twice, once for the teacher and once for the student, who pays for the tokens that are hidden as well.

    Args:
        lengths: int [n], tokens of each sample.
        reflection: bool [n], samples with a student.
    """
    total = 0
    for with_student in (False, True):
        own = np.sort(lengths[reflection == with_student])[::-1]
        for first in range(0, len(own), batch_size):
            batch = own[first : first + batch_size]
            total += int(batch[0]) * len(batch) * (2 if with_student else 1)
    return total


def _print_files(files: Sequence[FileStats]) -> None:
    lengths = ("tokens_mean", "tokens_p50", "tokens_p95", "tokens_max")
    rows = [
        [
            *(str(number) for number in (file.samples, file.too_long, file.rejected, file.reflection)),
            *(f"{getattr(file, name):.0f}" for name in lengths),
            *(f"{file.student_share[str(rate)]:.0%}" if file.student_share else "-" for rate in _RATES),
            file.path,
        ]
        for file in files
    ]
    header = ["samples", "too long", "rejected", "reflection", "mean", "p50", "p95", "longest"]
    print("tokens of a sample, and the student's share of them at four mask rates")
    _print_table([*header, *map(str, _RATES), "file"], rows)


def _print_steps(stats: DatasetStats) -> None:
    steps = stats.steps
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).astype(int))]
    tokens = ("teacher", "student", "generation", "reference")
    rows = [
        [
            str(step.step),
            f"{step.mask_rate:.2f}",
            *(f"{getattr(step, name):,}" for name in tokens),
            f"{step.microbatches} x {step.sequence_length}",
            f"{step.fill:.1%}",
        ]
        for step in shown
    ]
    print("\ntokens of a step")
    _print_table(["step", "mask rate", *tokens, "packs", "fill"], rows)
    total = {name: sum(getattr(step, name) for step in steps) for name in (*tokens, "padded")}
    real = total["teacher"] + total["student"] + total["generation"]
    print(f"\n{len(steps)} of {stats.total_steps} steps: fill {real / total['padded']:.1%}")
    if total["teacher"]:
        print(f"students' views cost {1 - total['student'] / total['teacher']:.1%} fewer tokens than whole sequences")
    print(
        f"padding included, {1 - total['padded'] / total['reference']:.1%} fewer tokens than the reference computes "
        f"with {stats.reference_batch_size} to a batch"
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their cells, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
