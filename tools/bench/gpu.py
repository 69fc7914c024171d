"""Runs everything that needs a GPU in a given time, as rows and a page of them.

Stages run in order of importance, each in a process of its own with a limit of its own, so that a run cut short keeps
what matters most. What a stage has measured is on disk before the next one begins; one that fails or takes too long is
reported and the next one runs. Nothing in the page is not in a row.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.model.backends.choose import PLAIN
from reflectron.tools.bench.harness import BenchRows, Row, by_key, goal_table, read_rows, run_process, table, title
from reflectron.tools.bench.report import train_goals
from reflectron.tools.provenance import provenance

DISTRIBUTIONS = ("reflectron", "torch", "triton", "orda-kernel", "liger-kernel", "cut-cross-entropy")
# Of the planner's bytes in tensors against what torch allocated.
MEMORY = 0.15
_CLI = "reflectron.tools.cli"
# A step of bench train that fits a GPU's time: fewer samples and rounds than its defaults.
_QUICK = ["--samples", "32", "--rounds", "3"]
_TINY = ["--device", "cpu", "--samples", "6", "--budget", "512", "--max-length", "256", "--rounds", "1"]
_TINY += ["--mask-rates", "0.5"]

# ---- stages ----


@dataclass(frozen=True)
class GpuStage:
    """One command of a run."""

    name: str
    what: str
    checks: bool
    """Whether it compares with a truth: then its failure is the run's."""
    minutes: float
    """Its share of the whole run's time."""
    words: Callable[[Path, bool, float], list[str]]
    """(folder of the run, whether there is CUDA, minutes) -> what follows ``python -m``."""


def _check(name: str) -> Callable[[Path, bool, float], list[str]]:
    words = ["reflectron.tools.bench.checks", name]
    return lambda out, cuda, minutes: [*words, str(out / name), "cuda" if cuda else "cpu"]


def _train(name: str, *words: str) -> Callable[[Path, bool, float], list[str]]:
    """Return ``bench train`` with ``words``, on the CPU with none but the tiny sizes and the builds."""

    def command(out: Path, cuda: bool, minutes: float) -> list[str]:
        common = [_CLI, "bench", "train", "--out", str(out / name), "--minutes", f"{minutes:.2f}"]
        rates = out / "calibration.json"
        if not cuda:
            kept = [w for at, w in enumerate(words) if w in _KEPT or (at and words[at - 1] in _KEPT)]
            return [*common, *_TINY, *kept]
        return [*common, *_QUICK, *words, *(["--calibration", str(rates)] if rates.exists() else [])]

    return command


_KEPT = ("--variants", "--build")


def _calibrate(out: Path, cuda: bool, minutes: float) -> list[str]:
    return [_CLI, "bench", "calibrate", "--out", str(out / "calibration.json"), "--processes", "1"]


def _head(out: Path, cuda: bool, minutes: float) -> list[str]:
    words = [_CLI, "bench", "head", "--quick", "--minutes", f"{minutes:.2f}", "--out", str(out / "head")]
    # Triton's interpreter takes minutes for what a GPU does in milliseconds.
    return words if cuda else [*words, "--providers", "cublas,reference,eager"]


_7B = ("--shapes", "codellama-7b")
_TORCH = ",".join(f"backends.{part}={plain}" for part, plain in PLAIN.names.items())
_BUILDS = ("--build", "fp8:model.fp8=current", "--build", f"torch:{_TORCH}")
_MLP = "parallel.recompute=selective,parallel.recompute_modules=[mlp]"
_RECOMPUTE = ("--build", f"mlp:{_MLP}", "--build", "full:parallel.recompute=full")

_34B = ("--shapes", "codellama-34b", "--variants", "hf_reference,engine")
_MEMORY = (*_7B, "--layers", "4", "--variants", "engine", "--mask-rates", "0.5", *_RECOMPUTE)

_ALL_STAGES = (
    GpuStage("kernels", "the head's kernels against float64", True, 0.8, _check("kernels")),
    GpuStage("parity", "backends of attention, layers and AdamW against float64", True, 0.7, _check("parity")),
    GpuStage("step", "training steps against the CPU's", True, 0.9, _check("step")),
    GpuStage("calibrate", "the rates that the planner divides by", False, 0.9, _calibrate),
    GpuStage("train", "training steps of a 7B slice", False, 2.3, _train("train", *_7B, *_BUILDS)),
    GpuStage("train_34b", "training steps of a 34B slice", False, 1.7, _train("train_34b", *_34B)),
    GpuStage("memory", "peak memory against the planner's", False, 0.7, _train("memory", *_MEMORY)),
    GpuStage("head", "the head beside its peers", False, 1.0, _head),
)
STAGES = {stage.name: stage for stage in _ALL_STAGES}


def chosen_stages(names: Sequence[str]) -> list[GpuStage]:
    """Return some of the stages, all where none is named, in their order.

    Raises:
        ValueError: when there is no such stage.
    """
    if unknown := set(names) - set(STAGES):
        raise ValueError(f"--stages names {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}")
    return [stage for name, stage in STAGES.items() if not names or name in names]


def bench_gpu(out: Path | None, stages: Sequence[GpuStage], minutes: float, cuda: bool) -> int:
    """Run ``stages`` into ``out``, by default ``examples/benchmarks/<GPU>``; 1 when a check among them failed."""
    common = provenance(DISTRIBUTIONS, cuda=cuda)
    out = out or Path("examples/benchmarks") / slug(common["device"])
    if (out / "stages.jsonl").exists():
        raise ValueError(f"{out}/stages.jsonl exists; name another folder with --out, rows are never overwritten")
    out.mkdir(parents=True, exist_ok=True)
    rows = BenchRows("gpu", common, out / "stages.jsonl")
    began, whole, page, failed = time.monotonic(), sum(stage.minutes for stage in STAGES.values()), "", []
    for stage in stages:
        left = 60 * minutes - (time.monotonic() - began)
        row = run_stage(stage, out, cuda, min(left, stage.minutes / whole * 60 * minutes), rows)
        page = write_page(out)
        if row["outcome"] != "passed" and stage.checks:
            failed.append(stage.name)
    print(page)
    if failed:
        print(f"reflectron bench gpu: correctness is not shown by {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_stage(stage: GpuStage, out: Path, cuda: bool, limit_s: float, rows: BenchRows) -> Row:
    """Run one stage, its output in ``<out>/logs/<stage>.log``; add the row of what became of it and return it."""
    print(f"[{stage.name}] {stage.what}", flush=True)
    facts: Row = {"stage": stage.name, "checks": stage.checks, "limit_s": round(limit_s, 1)}
    if limit_s < 1:
        return rows.add("time", "s", reason="the time of the run was spent", outcome="not run", **facts)
    # 10 seconds for what a stage does after its own deadline.
    words = stage.words(out, cuda, max(limit_s - 10, 1) / 60)
    done = run_process(["-m", *words], out / "logs" / f"{stage.name}.log", limit_s=limit_s)
    seconds = round(done.seconds, 1)
    outcome = "passed" if done.code == 0 else "took too long" if done.code is None else "failed"
    reason = None if done.code == 0 else done.last_line[:300]
    print(f"[{stage.name}] {outcome} after {seconds} s{f': {reason}' if reason else ''}", flush=True)
    return rows.add("time", "s", [seconds], reason=reason, outcome=outcome, exit_code=done.code, **facts)


def slug(device: str) -> str:
    """Return the name of a device's folder: ``NVIDIA H100 80GB HBM3`` -> ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


# ---- the page ----

_TRAIN = ("train", "train_34b", "memory")


def write_page(out: Path) -> str:
    """Write and return the page of a run as far as it has come."""
    stages = read_rows(out / "stages.jsonl")
    train = [row for name in _TRAIN for row in read_rows(out / name / "rows.jsonl")]
    outcomes = [
        [row["stage"], STAGES[row["stage"]].what, row["outcome"], f"{row['p50'] or 0:.0f}", row["reason"] or ""]
        for row in stages
    ]
    parts = [
        title(stages[0]["device"], stages[0]) + "Made by `reflectron bench gpu` from the rows in this folder.\n",
        table(["stage", "", "outcome", "s", ""], outcomes),
        *(_check_table(stage, read_rows(out / name / "rows.jsonl")) for name, stage in STAGES.items() if stage.checks),
        _memory_table(train),
        "## Goals of training steps\n",
        goal_table(train_goals(train)),
        _links(out),
    ]
    text = "\n".join(part for part in parts if part)
    (out / "README.md").write_text(text, encoding="utf-8")
    return text


def _check_table(stage: GpuStage, rows: list[Row]) -> str:
    """Return of each part, backend and type how many numbers were compared, how many are wrong, the largest error."""
    if not rows:
        return ""
    lines = []
    for kind, group in by_key(rows, "part", "backend", "dtype").items():
        compared = [row for row in group if "passed" in row]
        worst = max(compared, key=_error, default=None)
        place = f"{_error(worst):.2g} ({worst['case']}, {worst['tensor']})" if worst else ""
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in group if row["reason"]))
        lines.append([*kind, str(len(compared)), str(sum(not row["passed"] for row in compared)), place, reasons])
    header = ["part", "backend", "type", "numbers", "wrong", "largest relative error", ""]
    return f"## {stage.name}: {stage.what}\n\n{table(header, lines)}"


def _error(row: Row) -> float:
    """Return the error of a row; what is not finite is the largest."""
    return float("inf") if row["p50"] is None else row["p50"]


def _memory_table(rows: list[Row]) -> str:
    """Return the peak memory of every step that the planner has a prediction for."""
    lines = []
    for row in rows:
        measured, predicted = row.get("peak_memory_gib"), row.get("predicted_memory_gib")
        if measured is None or predicted is None:
            continue
        error = predicted / measured - 1
        place = f"{row['shape']} x{row['layers']}, {row['variant']}, mask rate {row['mask_rate']:.2f}"
        verdict = "yes" if abs(error) <= MEMORY else "no"
        lines.append([place, f"{measured:.2f}", f"{predicted:.2f}", f"{error:+.1%}", verdict])
    if not lines:
        return ""
    header = ["step", "measured GiB", "predicted GiB", "error", f"within {MEMORY:.0%}"]
    return f"## Peak memory\n\n{table(header, lines)}"


def _links(out: Path) -> str:
    pages = [f"- [{path.parent.name}]({path.relative_to(out)})" for path in sorted(out.glob("*/*.md"))]
    return "Tables:\n\n" + "\n".join(pages) + "\n" if pages else ""
