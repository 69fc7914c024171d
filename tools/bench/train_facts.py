"""What a row of ``bench train`` says of its samples, its speed and its prediction, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.config import Config
from reflectron.engine.data.global_batch import count_tokens
from reflectron.engine.data.packing import CostModel
from reflectron.engine.data.views import SampleViews
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.training.flops import training_flops
from reflectron.tools.bench.train_batches import Work
from reflectron.tools.bench.train_shapes import gpu_of
from reflectron.tools.planner.hardware import make_cluster
from reflectron.tools.planner.predict import batch_of_views, predict

Row = dict[str, Any]


def useful_flops(views: Sequence[SampleViews], cost: CostModel) -> float:
    """Of what a step cannot do without: each view as long as it is seen, logits of the rows with a loss."""
    lengths = [len(v.input_ids) for v in views] + [len(v.student_positions) for v in views]
    return training_flops(cost, lengths, sum(v.logit_rows for v in views))


def sample_facts(views: Sequence[SampleViews], cost: CostModel) -> Row:
    """Tokens that the paper's loss needs, and their operations."""
    tokens = count_tokens(views)
    return {
        "tokens_teacher": tokens.teacher,
        "tokens_student": tokens.student,
        "tokens_generation": tokens.generation,
        "useful_flops": useful_flops(views, cost),
    }


def work_facts(work: Work) -> Row:
    """What the model was made to do."""
    return {"model_tokens": work.tokens, "microbatches": work.microbatches, "sequence_length": work.sequence_length}


def baseline_work(views: Sequence[SampleViews]) -> Work:
    """Both views of a reflection sample at full length, a forward a sample."""
    lengths = [len(v.input_ids) * (1 if v.is_generation else 2) for v in views]
    return Work(sum(lengths), len(lengths), max(len(v.input_ids) for v in views))


def speed_facts(
    views: Sequence[SampleViews], cost: CostModel, seconds: Sequence[float], config: Config, device: str, devices: int
) -> Row:
    """From a time a round; model FLOPs utilisation is null where the planner does not know the device's peak."""
    p20, p50, p80 = (float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    gpu = gpu_of(device)
    peak = gpu.bf16_flops if gpu and config.model.dtype == "bfloat16" else None
    return {
        "step_time_ms_p20": p20 * 1e3,
        "step_time_ms_p50": p50 * 1e3,
        "step_time_ms_p80": p80 * 1e3,
        "rounds": len(seconds),
        "samples_per_second": len(views) / p50,
        "useful_tokens_per_second": count_tokens(views).total / p50,
        "dense_bf16_peak_flops": peak,
        "mfu": None if peak is None else useful_flops(views, cost) / (p50 * peak * devices),
    }


def predicted_facts(
    config: Config,
    arch: Architecture,
    views: Sequence[SampleViews],
    device: str,
    devices: int,
    calibration: Path | None,
) -> Row:
    """The planner's step and its bytes in tensors; nothing on a device that it has no rates of."""
    gpu = gpu_of(device)
    if gpu is None:
        return {}
    try:
        cluster = make_cluster(gpu.name, devices, devices, calibration)
        step = predict(config, arch, cluster, batch_of_views(views))
    except ValueError as error:
        return {"predicted_from": f"nothing: {error}"}
    return {
        "predicted_step_time_ms": step.step_seconds * 1e3,
        "predicted_memory_gib": gib(step.memory.total - step.memory.reserved),
        "predicted_from": cluster.source,
    }


def gib(count: float | None) -> float | None:
    """Bytes in GiB."""
    return None if count is None else count / 2**30


def row_line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row['shape']} x{row['layers']}  {row['variant']:22} rate {row['mask_rate']:.2f}"
    if row["reason"]:
        return f"{head}  {row['reason']}"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    return f"{head}  {row['step_time_ms_p50']:9.1f} ms  {row['samples_per_second']:8.2f} samples/s{mfu}"
