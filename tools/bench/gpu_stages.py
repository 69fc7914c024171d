"""The stages of ``reflectron bench gpu``, the most important first, so that a run cut short keeps what matters most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.model.backends.choose import PLAIN

_CLI = "reflectron.tools.cli"
# A step of bench train that fits a GPU's time: fewer samples and rounds than its defaults.
_QUICK = ["--samples", "32", "--rounds", "3"]
_TINY = ["--device", "cpu", "--samples", "6", "--budget", "512", "--max-length", "256", "--rounds", "1"]
_TINY += ["--mask-rates", "0.5"]


@dataclass(frozen=True)
class Stage:
    """One command of a run."""

    name: str
    what: str
    checks: bool
    """Whether it compares with a truth: then its failure is the run's."""
    minutes: float
    """Its share of the whole run's time."""
    words: Callable[[Path, str, float], list[str]]
    """(folder of the run, cuda or cpu, minutes) -> what follows ``python -m``."""


def _check(name: str) -> Callable[[Path, str, float], list[str]]:
    return lambda out, device, minutes: ["reflectron.tools.bench.checks", name, str(out / name), device]


def _train(name: str, *words: str) -> Callable[[Path, str, float], list[str]]:
    """``bench train`` with ``words``, on the CPU with none but the tiny sizes and the builds."""

    def command(out: Path, device: str, minutes: float) -> list[str]:
        common = [_CLI, "bench", "train", "--out", str(out / name), "--minutes", f"{minutes:.2f}"]
        rates = out / "calibration.json"
        if device == "cpu":
            kept = [w for at, w in enumerate(words) if w in _KEPT or (at and words[at - 1] in _KEPT)]
            return [*common, *_TINY, *kept]
        return [*common, *_QUICK, *words, *(["--calibration", str(rates)] if rates.exists() else [])]

    return command


_KEPT = ("--variants", "--build")


def _calibrate(out: Path, device: str, minutes: float) -> list[str]:
    return [_CLI, "bench", "calibrate", "--out", str(out / "calibration.json"), "--processes", "1"]


def _head(out: Path, device: str, minutes: float) -> list[str]:
    words = [_CLI, "bench", "head", "--quick", "--minutes", f"{minutes:.2f}", "--out", str(out / "head")]
    # Triton's interpreter takes minutes for what a GPU does in milliseconds.
    return words if device == "cuda" else [*words, "--providers", "cublas,reference,eager"]


_7B = ("--shapes", "codellama-7b")
_TORCH = ",".join(f"backends.{part}={plain}" for part, plain in PLAIN.names.items())
_BUILDS = ("--build", "fp8:model.fp8=current", "--build", f"torch:{_TORCH}")
_MLP = "parallel.recompute=selective,parallel.recompute_modules=[mlp]"
_RECOMPUTE = ("--build", f"mlp:{_MLP}", "--build", "full:parallel.recompute=full")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("kernels", "the head's kernels against float64", True, 0.8, _check("kernels")),
        Stage("parity", "back ends of attention, layers and AdamW against float64", True, 0.7, _check("parity")),
        Stage("step", "training steps against the CPU's", True, 0.9, _check("step")),
        Stage("calibrate", "the rates that the planner divides by", False, 0.9, _calibrate),
        Stage(
            "train", "training steps of a 7B slice", False, 2.3, _train("train", "--shapes", "codellama-7b", *_BUILDS)
        ),
        Stage(
            "train_34b",
            "training steps of a 34B slice",
            False,
            1.7,
            _train("train_34b", "--shapes", "codellama-34b", "--variants", "hf_reference,engine"),
        ),
        Stage(
            "memory",
            "peak memory against the planner's",
            False,
            0.7,
            _train(
                "memory",
                *(*_7B, "--layers", "4", "--variants", "engine"),
                *("--mask-rates", "0.5", *_RECOMPUTE),
            ),
        ),
        Stage("head", "the head beside its peers", False, 1.0, _head),
    )
}
