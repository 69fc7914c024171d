"""``reflectron bench head``: exact gradients, what becomes a row, the verdicts, and the run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from reflectron.kernels import reference
from reflectron.tools import cli
from reflectron.tools.bench import head, head_providers
from reflectron.tools.bench.harness import BenchRows, new_rows_file
from reflectron.tools.bench.head import SHAPES, all_cases, quick_cases, tiny_cases
from reflectron.tools.bench.head_providers import (
    HeadCase,
    Provider,
    ProviderGradients,
    ProviderInputs,
    Terms,
    errors,
    exact,
    make_inputs,
)
from reflectron.tools.bench.report import head_goals

CPU = torch.device("cpu")
# A power of two: float32 holds its inverse, by which every row is weighed, exactly.
CASE = HeadCase(16, 40, 8, timed=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command sets it; this takes it back at the end


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- the truth ----


@pytest.mark.parametrize("chunk_rows", [2, 100])
@pytest.mark.parametrize("terms", ["full", "ce", "kl"])
def test_truth_is_autograd_in_fp64(terms: Terms, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", chunk_rows * CASE.columns)
    x = make_inputs(CASE, CPU)
    h_t, h_s, weight = (t.detach().double().requires_grad_() for t in (x.teacher, x.student, x.weight))
    z_t, z_s = h_t @ weight.T, h_s @ weight.T
    ce = functional.cross_entropy(z_t, x.labels) + functional.cross_entropy(z_s, x.labels)
    kl = functional.kl_div(z_s.log_softmax(1), z_t.detach().log_softmax(1), log_target=True, reduction="batchmean")
    loss = {"full": ce + kl, "ce": ce, "kl": kl}[terms]
    d_t, d_s, d_w = torch.autograd.grad(loss, (h_t, h_s, weight), allow_unused=True)

    found = errors(ProviderGradients(loss.detach(), d_t, d_s, d_w), exact(x), terms)
    assert found.keys() == {"loss", "grad_student", "grad_weight"} | ({"grad_teacher"} if terms != "kl" else set())
    assert max(found.values()) < 1e-12


def test_errors_are_relative() -> None:
    x = make_inputs(CASE, CPU)
    truth = exact(x)
    good = head_providers.eager().step(x, "full")
    assert good.student is not None
    wrong = replace(good, student=good.student * 1.5, weight=good.weight * 0)
    found = errors(wrong, truth, "full")
    assert found["grad_student"] == pytest.approx(0.5, abs=0.01)
    assert found["grad_weight"] == 1
    assert found["grad_teacher"] < 0.005


def test_near_and_far_teachers_are_what_they_are_called() -> None:
    near, far = (exact(make_inputs(replace(CASE, d=64, vocab=3000, pairs=64, teacher=t), CPU)) for t in ("near", "far"))
    assert near.terms["kl"].loss < 0.02
    assert far.terms["kl"].loss > 1


# ---- cases ----


def test_cases_cover_the_table() -> None:
    cases = all_cases()
    assert len(set(cases)) == len(cases)
    assert {(c.d, c.vocab) for c in cases} == set(SHAPES)
    for shape in SHAPES:
        own = [c for c in cases if (c.d, c.vocab) == shape]
        assert {(c.pairs, c.tp) for c in own} >= {(pairs, tp) for pairs in (1024, 4096, 16384) for tp in (1, 4, 8)}
        assert {c.teacher for c in own} == {"near", "far"}
    assert all(c.vocab % c.tp == 0 for c in cases + quick_cases() + tiny_cases())


def test_flop_counts_three_products() -> None:
    assert HeadCase(8, 20, 3).flop("full") == 6 * 6 * 20 * 8
    assert HeadCase(8, 20, 3, tp=4).flop("forward") == 2 * 6 * 5 * 8


# ---- providers ----


@pytest.mark.parametrize("build", [head_providers.eager, lambda: head_providers.head("reference")])
def test_torch_providers_are_exact_to_bf16(build: Callable[[], Provider]) -> None:
    x = make_inputs(CASE, CPU)
    truth = exact(x)
    for terms in ("full", "kl"):
        x.main_grad.zero_()
        assert max(errors(build().step(x, terms), truth, terms).values()) < 0.004
    forward = build().forward
    assert forward is not None
    assert float(forward(x)) == pytest.approx(truth.terms["full"].loss.item(), rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.slow
def test_unimportable_peers_and_failures_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: ProviderInputs, terms: Terms) -> ProviderGradients:
        raise RuntimeError("no such shape\nand more")

    monkeypatch.setitem(sys.modules, "orda_kernel", None)
    monkeypatch.setitem(head.BUILDERS, "liger", lambda: Provider("liger", fail, note="cannot do it"))
    words = ["bench", "head", "--out", str(tmp_path), "--providers", "orda,liger,eager"]
    assert cli.main(words) == 0
    rows = read(tmp_path)
    (orda,) = (row for row in rows if row["provider"] == "orda")
    assert "orda_kernel" in orda["reason"]
    assert "reflectron[bench]" in orda["reason"]
    liger = [row for row in rows if row["provider"] == "liger"]
    assert {(row["reason"], row["note"]) for row in liger} == {("RuntimeError: no such shape", "cannot do it")}
    assert any(row["provider"] == "eager" and row["metric"] == "error_grad_weight" for row in rows)
    assert "RuntimeError: no such shape" in capsys.readouterr().out


# ---- rows and verdicts ----


def test_a_row_holds_quantiles_and_reads_alone(tmp_path: Path) -> None:
    rows = BenchRows("head", {"device": "here"}, new_rows_file(tmp_path / "new"))
    rows.add("time", "ms", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], provider="eager", **asdict(CASE))
    rows.add("error_loss", "relative", [float("nan")], provider="eager", **asdict(CASE))
    first, second = read(tmp_path / "new")
    assert (first["p20"], first["p50"], first["p80"], first["rounds"]) == (2.0, 3.5, 5.0, 6)
    assert (first["d"], first["tp"], first["teacher"], first["device"]) == (16, 1, "near", "here")
    assert (second["p50"], second["reason"]) == (None, "not finite")
    with pytest.raises(ValueError, match=r"rows\.jsonl exists"):
        new_rows_file(tmp_path / "new")


@pytest.mark.parametrize(("device", "met"), [("NVIDIA H200", [True, False]), ("NVIDIA A100", [None, None])])
def test_goals_are_judged_by_the_worst_case_on_the_devices_they_were_set_for(
    device: str, met: list[bool | None]
) -> None:
    rows = BenchRows("head", {"device": device}, None)
    for pairs, ratio, orda in ((1024, 1.09, 1.3), (4096, 1.05, 1.1)):
        case = HeadCase(8192, 32016, pairs)
        about = asdict(case) | {"mode": "full"}
        rows.add("time_over_cublas", "ratio", [ratio], provider="triton", **about)
        rows.add("time_over_triton", "ratio", [orda], provider="orda", **about)
        rows.add("error_grad_weight", "relative", [3e-3], provider="triton", **about)
        rows.add("error_grad_weight", "relative", [2e-3], provider="eager", **about)
    found = {goal.text.split(" at d")[0]: goal for goal in head_goals(rows.rows)}
    floor = found["time at most 1.10x the three matrix products"]
    orda_goal = found["at least 1.15x as fast as orda"]
    assert [floor.met, orda_goal.met] == met
    if met[0]:
        assert floor.figure.startswith("1.09x")
        assert orda_goal.figure == "1.1x (d 8192, V 32016, 4096 pairs, near teacher)"
    assert found["gradient errors at most 1.2x those of torch on fp32 logits"].met is False
    assert found["at least 2.5x as fast as liger"].met is None


# ---- the command ----


@pytest.mark.slow
def test_without_a_gpu_errors_are_kept_and_times_are_not(
    tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "head", "--out", str(tmp_path), "--providers", "cublas,reference,eager"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("times mean nothing") == 2
    rows = read(tmp_path)
    times = [row for row in rows if row["metric"] == "time"]
    assert {row["provider"] for row in times} == {"cublas", "reference", "eager"}
    assert {(row["p20"], row["p50"], row["p80"], row["reason"]) for row in times} == {(None,) * 3 + ("no CUDA device",)}
    assert all(row["p50"] < 0.005 for row in rows if "error" in row["metric"])
    assert {"versions", "commit", "configuration", "device"} <= rows[0].keys()
    assert "d 72, V 132/4, 9 pairs" in (tmp_path / "head.md").read_text(encoding="utf-8")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")

    assert cli.main(words) == 2
    assert "rows are never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--providers", "orca"], "--providers names orca, expected some of cublas, triton"),
        (["--profile"], "--profile needs a CUDA device"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "head", *words]) == 2
    assert line in capsys.readouterr().err


def test_profile_shows_where_the_time_goes() -> None:
    x = make_inputs(CASE, CPU)
    table = head.profile_call(lambda: head_providers.eager().step(x, "full"), CPU)
    assert "aten::mm" in table
    assert "log_softmax" in table


@needs_gpu
def test_rounds_and_memory_on_a_gpu() -> None:
    x = make_inputs(HeadCase(256, 4000, 128), torch.device("cuda"))
    eager = head_providers.eager()
    calls: dict[head.CallKey, Callable[[], object]] = {("eager", "full"): lambda: eager.step(x, "full")}
    rounds = head.time_rounds(calls, time.monotonic() + 60)
    assert rounds is not None
    assert len(rounds.time_ms["eager", "full"]) >= head.MIN_ROUNDS
    assert head.time_rounds(calls, time.monotonic()) is None
    logits_bytes = 2 * 128 * 4000 * 4
    assert head.extra_memory_bytes(lambda: eager.step(x, "full")) >= logits_bytes


@pytest.mark.slow
def test_the_kernels_and_compiled_torch_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    words = [sys.executable, "-m", "reflectron.tools.cli", "bench", "head", "--out", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "--providers", "triton,eager,compile"], check=True, env=environment, capture_output=True)
    rows = read(tmp_path)
    measured = {
        (row["provider"], row["teacher"], row["tp"]) for row in rows if row["metric"] == "kl_error_grad_student"
    }
    assert measured >= {("triton", "near", 1), ("triton", "far", 1), ("triton", "near", 4), ("compile", "near", 1)}
    (verdict,) = (goal for goal in head_goals(rows) if goal.text.startswith("gradient errors"))
    assert verdict.met, verdict.figure
