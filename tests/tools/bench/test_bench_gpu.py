"""``reflectron bench gpu``: stages that fail, hang or find no time left, the checks' verdicts, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectron.tools import cli
from reflectron.tools.bench import checks
from reflectron.tools.bench.checks import head_problem
from reflectron.tools.bench.gpu import STAGES, GpuStage, run_stage, slug, write_page
from reflectron.tools.bench.harness import BenchRows, Row

COMMON = {"device": "NVIDIA H200", "cuda": "12.9", "versions": {"torch": "2.13.0"}, "commit": "abc"}


def stage(*words: str, name: str = "kernels", checks: bool = True) -> GpuStage:
    return GpuStage(name, "a test", checks, 1.0, lambda out, cuda, minutes: list(words))


def run(one: GpuStage, folder: Path, limit_s: float) -> Row:
    return run_stage(one, folder, False, limit_s, BenchRows("gpu", {}, None))


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    row = run(stage("timeit", "-n1", "-r1", "import time; time.sleep(600)"), tmp_path, 1.0)
    assert (row["outcome"], row["exit_code"]) == ("took too long", None)
    assert row["p50"] < 60


def test_a_stage_that_fails_says_why(tmp_path: Path) -> None:
    row = run(stage("json.tool", "/missing.json"), tmp_path, 60.0)
    assert row["outcome"] == "failed"
    assert "/missing.json" in row["reason"]
    assert "/missing.json" in (tmp_path / "logs" / "kernels.log").read_text()
    assert run(stage("json.tool"), tmp_path, 0.5)["outcome"] == "not run"


def test_all_stages_fit_nine_minutes() -> None:
    assert sum(one.minutes for one in STAGES.values()) <= 9.001
    assert [name for name, one in STAGES.items() if one.checks] == list(STAGES)[
        : sum(s.checks for s in STAGES.values())
    ]


@pytest.mark.parametrize("cuda", [False, True])
def test_commands_of_the_stages_are_known(cuda: bool, tmp_path: Path) -> None:
    """Every word that a stage hands to the command line is parsed by it."""
    for one in STAGES.values():
        module, *words = one.words(tmp_path, cuda, 1.0)
        if module == "reflectron.tools.cli":
            args = cli._parse(words)
            assert args.out.is_relative_to(tmp_path)
        else:
            assert module == "reflectron.tools.bench.checks"
            assert words[0] == one.name


def test_a_check_fails_with_one_wrong_number_and_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"case": "c", "backend": "b", "dtype": "d", "tensor": "t", "error": 0.0, "passed": True}
    rows = {"good": [good], "bad": [good, good | {"passed": False, "error": 0.5}], "none": [{"reason": "needs CUDA"}]}
    monkeypatch.setattr(checks, "check_rows", lambda name, device: map(dict, rows[name]))
    codes = {name: checks.run_check(name, tmp_path / name, "cpu") for name in rows}  # type: ignore[arg-type]
    assert codes == {"good": 0, "bad": 1, "none": 1}
    assert "c, b, d, t: error 0.5" in capsys.readouterr().out
    assert len((tmp_path / "bad" / "rows.jsonl").read_text().splitlines()) == 2


def test_the_kernels_truth_has_every_gradient() -> None:
    problem = head_problem(16, 40, 6, 3, dtype=torch.float64, device=torch.device("cpu"))
    found = problem.solve("reference", {"divergence": "jsd", "jsd_beta": 0.3})
    assert found["loss"].item() == pytest.approx(
        sum(found[name].item() for name in ("ce_teacher", "ce_student", "ce_rows", "kl"))
    )
    assert {name: tuple(t.shape) for name, t in found.items() if t.dim()} == {
        "grad teacher": (6, 16),
        "grad student": (6, 16),
        "grad rows": (3, 16),
        "grad matrix": (40, 16),
    }


def test_the_page_is_made_from_rows(tmp_path: Path) -> None:
    def write(path: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    outcome = {"stage": "kernels", "checks": True, "outcome": "failed", "p50": 3.0, "reason": "2 wrong"}
    write("stages.jsonl", [outcome | COMMON])
    compared = {"part": "distillation head", "backend": "triton", "dtype": "bfloat16", "case": "V 40", "tensor": "kl"}
    compared |= {"reason": None}
    write("kernels/rows.jsonl", [compared | {"p50": 0.1, "passed": False}, compared | {"p50": 0.01, "passed": True}])
    memory = {"shape": "codellama-7b", "layers": 4, "variant": "engine", "mask_rate": 0.5, "reason": None}
    memory |= {"peak_memory_gib": 40.0, "predicted_memory_gib": 44.0, "dtype": "bfloat16", "build": []}
    memory |= {"tokens_per_microbatch": 8192, "p50": 10.0, "mfu": 0.6}
    write("memory/rows.jsonl", [memory | COMMON])
    page = write_page(tmp_path)
    assert "| kernels | the head's kernels against float64 | failed | 3 | 2 wrong |" in page
    assert "| distillation head | triton | bfloat16 | 2 | 1 | 0.1 (V 40, kl) |  |" in page
    assert "| codellama-7b x4, engine, mask rate 0.50 | 40.00 | 44.00 | +10.0% | yes |" in page
    assert "codellama-7b at 8192 tokens | met | 0.6 (codellama-7b) |" in page
    assert page == (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no CUDA device is visible; --device cpu runs the stages"),
        (["--device", "cpu", "--stages", "speed"], "--stages names speed, expected some of kernels, "),
        (["--device", "cpu", "--minutes", "0"], "--minutes is 0.0, expected a number above 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "gpu", "--out", str(tmp_path / "new"), *words]) == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_folders_are_named_by_the_device() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
