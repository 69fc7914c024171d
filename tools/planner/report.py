"""Predictions as Markdown tables, with every assumption in words, and the best layout as a recipe.

A recipe is a YAML file that ``reflectron train`` reads: the predictions at its top, then what is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from reflectron.engine.config import Config
from reflectron.engine.terminal import console
from reflectron.tools.planner import hardware, memory, samples
from reflectron.tools.planner.backends import LAYER_TRAFFIC, HeadBackend, PlannedBackends
from reflectron.tools.planner.hardware import Cluster, planned_backends
from reflectron.tools.planner.memory import GIB
from reflectron.tools.planner.predict import LayoutPrediction, Planner
from reflectron.tools.planner.speed import head_backend

_HEADS: dict[HeadBackend, str] = {"reference": "plain", "triton": "Triton"}
# ReflectionCoder's 34B run: 25 hours on 16 A800 (arXiv 2405.17057).
PAPER_GPU_HOURS = 400


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, however wide."""
    table = Table(box=box.MARKDOWN)
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    page = console(width=220)
    with page.capture() as capture:
        page.print(table)
    print(capture.get().strip() + "\n")


def show_layouts(predictions: Sequence[LayoutPrediction], price: float | None) -> None:
    """Print one row a layout."""
    header = ["TP", "CP", "PP", "chunks", "DP", "tokens", "recompute", "GiB", "s/step", "MFU", "GPU hours", "hours"]
    rows = []
    for one in predictions:
        parallel = one.config.parallel
        recompute = "+".join(parallel.recompute_modules) if parallel.recompute == "selective" else parallel.recompute
        rows.append(
            [
                str(parallel.tensor_model_parallel_size),
                str(parallel.context_parallel_size),
                str(parallel.pipeline_model_parallel_size),
                str(parallel.virtual_pipeline_model_parallel_size),
                str(one.replicas),
                str(one.config.batch.tokens_per_microbatch),
                recompute,
                f"{one.memory.total / GIB:.1f}",
                f"{one.step_seconds:.2f}",
                f"{one.mfu:.0%}",
                f"{one.gpu_hours:.1f}",
                f"{one.gpu_hours / one.cluster.gpus:.1f}",
                *([f"{one.gpu_hours * price:,.0f}"] if price is not None else []),
            ]
        )
    show([*header, *(["price"] if price is not None else [])], rows)


def show_parts(best: LayoutPrediction) -> None:
    """Print where the best layout's time and memory go."""
    seconds = {name: samples.over_phases([getattr(t, name) for t in best.times]) for name in vars(best.times[0])}
    show(
        ["time of a step", "s", "share"],
        [[name.replace("_", " "), f"{s:.2f}", f"{s / best.step_seconds:.1%}"] for name, s in seconds.items()],
    )
    show(
        ["memory of the fullest GPU", "GiB"],
        [[name, f"{value / GIB:.1f}"] for name, value in vars(best.memory).items()],
    )


def show_tokens(planner: Planner) -> None:
    """Print an epoch's tokens and operations if all of it lay in one phase of the mask schedule, and the run's mean."""
    data, arch, config = planner.samples, planner.arch, planner.config
    whole = float((data.teacher * data.repeat).sum())
    reflection = float((data.teacher * data.repeat)[data.reflection].sum())
    listed = float(data.repeat.sum()) / config.batch.global_batch_size
    columns: list[list[float]] = []
    for phase, batch in enumerate(planner.batches):
        load = samples.pack_load(arch, config, batch, replicas=1)
        student = float((data.student[phase] * data.repeat).sum())
        reference = samples.reference_flops(arch, batch)
        columns.append([student, whole + student, whole + reflection, load.useful_flops * listed, reference * listed])
    columns.append([samples.over_phases(values) for values in zip(*columns, strict=True)])
    names = [f"{low:.2f} to {high:.2f}" for low, high in samples.PHASES]
    rows = [
        [
            name,
            f"{(whole - reflection) / 1e6:.1f}",
            f"{reflection / 1e6:.1f}",
            f"{student / 1e6:.1f}",
            f"{useful / 1e6:.1f}",
            f"{reference / 1e6:.1f}",
            f"{1 - useful / reference:.0%}",
            f"{flops / 1e18:.1f}",
            f"{reference_flops / 1e18:.1f}",
            f"{reference_flops / flops:.2f}",
        ]
        for name, (student, useful, reference, flops, reference_flops) in zip([*names, "run"], columns, strict=True)
    ]
    print("Millions of tokens an epoch, and 10^18 operations, by mask rate; reference: both views at full length,")
    print("all layers computed once more for the backward, logits of every token.\n")
    show(
        ["mask rate", "instruction", "teacher", "student", "useful", "reference", "saved", "EFLOP", "ref.", "ratio"],
        rows,
    )


def _machine(cluster: Cluster, config: Config, backends: PlannedBackends) -> list[str]:
    """Describe the rates of the machines, and what hides behind what."""
    share, gb = cluster.gpu.fractions, hardware.GB
    if cluster.is_cpu:
        return [
            f"{cluster.gpus} processes on the CPU: products up to {cluster.matmul_flops / 1e9:.0f} "
            f"GFLOP/s, memory {cluster.memory_bytes_per_second / gb:.1f} GB/s."
        ]
    host = (
        f"the host launches an operator in {hardware.LAUNCH * 1e6:.0f} microseconds, "
        f"{LAYER_TRAFFIC[backends.layers].operators} a layer and microbatch."
        if cluster.calibration is None
        else "the host's time was measured."
    )
    return [
        f"{cluster.gpu.name}: {cluster.gpu.bf16_flops / 1e12:.0f} TFLOP/s dense bfloat16, "
        f"{cluster.gpu.memory_bytes_per_second / gb:.0f} GB/s, NVLink "
        f"{cluster.gpu.nvlink_bytes_per_second / gb:.0f} GB/s a direction, network "
        f"{cluster.gpu.network_bytes_per_second / gb:.0f} GB/s a GPU.",
        f"Fractions of the datasheet, where nothing is measured: products {share.matmul:.0%} (FP8 {share.fp8:.0%}), "
        f"attention {cluster.attention_flops(backends.attention) / cluster.gpu.bf16_flops:.0%}, memory "
        f"{share.memory:.0%}, links {share.bus:.0%}.",
        f"Used: products {cluster.matmul_flops / 1e12:.0f}"
        + (f", in FP8 {cluster.gpu.fp8_flops * share.fp8 / 1e12:.0f}," if config.model.fp8 != "none" else "")
        + f" and attention {cluster.attention_flops(backends.attention) / 1e12:.0f} TFLOP/s, "
        f"memory {cluster.memory_bytes_per_second / gb:.0f}, inside a machine "
        f"{cluster.node_bytes_per_second / gb:.0f}, between machines {cluster.network_bytes_per_second / gb:.0f} GB/s.",
        f"{cluster.gpus_per_node} GPUs a machine; {1 - cluster.exposed(2**24):.0%} of communication hides behind what "
        f"it may overlap with; {hardware.LATENCY * 1e6:.0f} microseconds a collective; {host}",
    ]


def assumptions(planner: Planner, best: LayoutPrediction) -> list[str]:
    """Say all that the predictions rest on, one sentence each."""
    cluster, data, config = planner.cluster, planner.samples, planner.config
    backends = planned_backends(config, cluster)
    lines = [
        f"Rates: {cluster.source}.",
        *_machine(cluster, config, backends),
        f"Backends: {', '.join(f'{part} {name}' for part, name in vars(backends).items())}; the "
        f"{_HEADS[head_backend(config, cluster)]} head; products in "
        + (
            f"{config.model.dtype}."
            if config.model.fp8 == "none"
            else "FP8 but for attention and the head; FP8 weights are kept."
        ),
        f"Lengths: {data.source}; an epoch lists {data.repeat.sum():,.0f}, "
        f"{(data.teacher * data.repeat).sum() / 1e6:.0f} million tokens without students.",
    ]
    if data.source.startswith("assumed"):
        lines += samples.DISTRIBUTION_NOTES
    return [
        *lines,
        f"{best.steps} steps of {config.batch.global_batch_size} samples; three typical steps stand for the mask "
        "schedule; packs are planned by the engine's own code.",
        f"{memory.RESERVED_BYTES / GIB:.0f} GiB for CUDA, NCCL and cuBLAS, {memory.FRAGMENTATION:.0%} of "
        "activations, head and transient tensors lost to fragmentation; a layout fills "
        f"{memory.FULLEST:.0%} of a GPU at most.",
        "Without a tokenizer in tokenizer.path or model.path the vocabulary grows by the template's tags, too much "
        "where the model has spare rows.",
        "Not counted: loading, tokenising, saving, validation, waiting, failures, an update on the CPU.",
    ]


# What a reader of a recipe looks for, whatever the defaults are.
_ALWAYS = {
    *("global_batch_size", "tokens_per_microbatch", "max_length", "learning_rate", "clip_grad_norm", "name", "shape"),
    *("epochs", "tensor_model_parallel_size", "pipeline_model_parallel_size", "recompute"),
}
_PREDICTED = "# Predicted, not measured: {hours:.1f} GPU hours ({wall:.1f} h), {need:.1f} of {have:.1f} GiB; {source}."


def write_recipe(path: Path, best: LayoutPrediction, command: str) -> None:
    """Write the configuration of ``best``; ``command`` is how it was made."""
    cluster = best.cluster
    head = [
        f"# {cluster.gpus} x {cluster.gpu.name}, {cluster.gpus_per_node} a machine; made by",
        f"#   {command}",
        predicted_line(best),
    ]
    body = yaml.safe_dump(unlike_defaults(best.config), sort_keys=False, default_flow_style=False, width=120)
    path.write_text("\n".join(head) + "\n" + body, encoding="utf-8")


def predicted_line(best: LayoutPrediction) -> str:
    """Return the comment that says what is predicted."""
    return _PREDICTED.format(
        hours=best.gpu_hours,
        wall=best.gpu_hours / best.cluster.gpus,
        need=best.memory.total / GIB,
        have=best.cluster.gpu.memory_bytes / GIB,
        source=best.cluster.source,
    )


def unlike_defaults(config: Config) -> dict[str, Any]:
    """Return what a file must say so that it loads as ``config``."""

    def changed(value: Any, default: Any) -> dict[str, Any]:
        result = {}
        for field in dataclasses.fields(value):
            mine, other = getattr(value, field.name), getattr(default, field.name)
            if dataclasses.is_dataclass(mine):
                result[field.name] = changed(mine, other)
            elif mine != other or field.name in _ALWAYS:
                result[field.name] = _plain(mine)
        return {name: value for name, value in result.items() if value != {}}

    return changed(config, Config())


def _plain(value: Any) -> Any:
    """Return ``value`` as YAML has it; elements of a list of sections without what they do not set."""
    if not isinstance(value, tuple):
        return value
    return [
        {
            field.name: getattr(item, field.name)
            for field in dataclasses.fields(item)
            if getattr(item, field.name) != field.default
        }
        if dataclasses.is_dataclass(item)
        else item
        for item in value
    ]
