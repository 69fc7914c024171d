"""``reflectron data stats``: a training set in; what training on it will cost, in tokens, out.

The samples, masks and packs are those of a run with the same configuration: the numbers come from the code that trains.
No model is needed, so packs are balanced by tokens alone; a run also balances their FLOPs within the same length.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from reflectron.engine.config import Config
from reflectron.tools.load_config import load_config
from reflectron.tools.plan import add_cluster_arguments, cluster_of, planned_architecture

if TYPE_CHECKING:
    from reflectron.engine.data.sampler import SampleOrder
    from reflectron.engine.data.store import TokenStore
    from reflectron.tools.planner.search import Prediction

# Where the strategy ``block`` hides one, two and three types of blocks, and the end.
_RATES = (0.0, 0.33, 0.67, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG] key=value", help="YAML file of a run, and settings that win over it"
    )
    parser.add_argument("--data", nargs="+", metavar="FILE", help="training files, instead of CONFIG")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, with --data")
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="evenly spaced steps to look at, 0 for all (default: 20)"
    )
    parser.add_argument(
        "--reference-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="samples that the reference pads to one length (default: 1, as published)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything there as well")
    parser.add_argument(
        "--plan", metavar="FILE", help="config.json of a model: also predict its GPU hours on this data, as `plan` does"
    )
    add_cluster_arguments(parser)


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


def run(args: argparse.Namespace) -> int:
    """Count; returns the exit code."""
    from reflectron.engine.data.store import build_store
    from reflectron.engine.data.tokenizer import load_tokenizer
    from reflectron.engine.training.run import check_budget, sample_order, store_folder

    for name, least in (("steps", 0), ("reference_batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(args, Path(scratch))
        tokenizer_path = config.tokenizer.path or config.model.path
        if tokenizer_path is None:
            raise ValueError("tokenizer.path is null, expected a folder (or model.path)")
        if not config.data.train:
            raise ValueError("data.train is empty, expected at least one file")
        tokenizer = load_tokenizer(tokenizer_path, config.data.template)
        store = build_store(
            config.data, config.data.train, tokenizer, store_folder(config, "train"), sys.stderr.isatty()
        )
        check_budget(store, config.data.train, config)
        if not len(store):
            raise ValueError("data.train has no sample left, expected at least one")
        reflection = np.array([store[i].kind != "generation" for i in range(len(store))])
        files = _file_stats(store, reflection, config)
        order = sample_order(store, config.data.train, config.seed)
        total_steps, steps = _step_stats(store, reflection, order, config, args)
        best = _best_layout(store, config, args) if args.plan else None
    _print_files(files)
    _print_steps(steps, total_steps, args.reference_batch_size)
    if best is not None:
        from reflectron.tools.planner.tables import show_layouts

        show_layouts([best], None)
        print(f"Predicted, not measured: {best.gpu_hours:.1f} GPU hours in the fastest layout that fits.")
    if args.json:
        content = {
            "files": [asdict(file) for file in files],
            "total_steps": total_steps,
            "reference_batch_size": args.reference_batch_size,
            "steps": [asdict(step) for step in steps],
            "planned_gpu_hours": best.gpu_hours if best is not None else None,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _config(args: argparse.Namespace, scratch: Path) -> Config:
    """The configuration of CONFIG; or of a run on ``--data``, whose token store is not kept."""
    first, *overrides = args.words if args.words and "=" not in args.words[0] else [None, *args.words]
    if (first is None) != bool(args.data) or bool(args.tokenizer) != bool(args.data):
        raise ValueError("expected either CONFIG or --data with --tokenizer")
    if first is not None:
        return load_config(first, overrides)
    tree = {
        "output_dir": str(scratch),
        "data": {"train": [{"path": path} for path in args.data]},
        "tokenizer": {"path": args.tokenizer},
    }
    path = scratch / "data.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_config(str(path), overrides)


def _best_layout(store: TokenStore, config: Config, args: argparse.Namespace) -> Prediction:
    """The fastest layout of the model ``--plan`` on this data."""
    from reflectron.tools.planner.samples import samples_of
    from reflectron.tools.planner.search import Planner

    samples, arch = samples_of(store, config), planned_architecture(args.plan, config)
    return Planner(arch, config, samples, cluster_of(args)).search()[0]


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
    from reflectron.engine.data.masking import visible_tokens
    from reflectron.engine.data.sampler import SampleRef, mask_draws
    from reflectron.engine.data.views import make_views

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
    store: TokenStore, reflection: np.ndarray, order: SampleOrder, config: Config, args: argparse.Namespace
) -> tuple[int, list[StepStats]]:
    """Steps of the run, and the stats of those that are looked at."""
    from reflectron.engine.data.batch_source import StoreSource
    from reflectron.engine.data.global_batch import GlobalBatches
    from reflectron.engine.data.packing import CostModel
    from reflectron.engine.training.run import run_length

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
    count = total_steps if args.steps == 0 else min(args.steps, total_steps)
    stats = []
    # Each step stands for an equal part of the run and lies in its middle.
    for step in ((np.arange(count) + 0.5) * total_steps / count).astype(int).tolist():
        batch = batches.batch(step)
        samples = np.array([ref.sample for ref in source.refs(step)])
        microbatches = len(batch.microbatches) * replicas
        stats.append(
            StepStats(
                step=step,
                mask_rate=batch.mask_rate,
                teacher=batch.tokens.teacher,
                student=batch.tokens.student,
                generation=batch.tokens.generation,
                padded=microbatches * batch.sequence_length,
                reference=reference_tokens(store.lengths[samples], reflection[samples], args.reference_batch_size),
                microbatches=microbatches,
                sequence_length=batch.sequence_length,
                fill=batch.fill,
            )
        )
    return total_steps, stats


def reference_tokens(lengths: np.ndarray, reflection: np.ndarray, batch_size: int) -> int:
    """Tokens of a step in the reference implementation.

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
    header = [
        "samples",
        "too long",
        "rejected",
        "reflection",
        "mean",
        "p50",
        "p95",
        "longest",
        *map(str, _RATES),
        "file",
    ]
    print("tokens of a sample, and the student's share of them at four mask rates")
    _print_table(header, rows)


def _print_steps(steps: Sequence[StepStats], total_steps: int, reference_batch_size: int) -> None:
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
    print(f"\n{len(steps)} of {total_steps} steps: fill {real / total['padded']:.1%}")
    if total["teacher"]:
        print(f"students' views cost {1 - total['student'] / total['teacher']:.1%} fewer tokens than whole sequences")
    print(
        f"padding included, {1 - total['padded'] / total['reference']:.1%} fewer tokens than the reference computes "
        f"with {reference_batch_size} to a batch"
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their cells, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
