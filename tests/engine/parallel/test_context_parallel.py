"""Context parallelism changes nothing but the ranks: gradients, updates, training and checkpoints stay the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.parallel.launch import spawn_local
from testkit.checkpoint_cases import EXACT, FLOAT32, SAVE, Case, assert_follows, run_cases
from testkit.layouts import FULL, OVERLAP, REFERENCE, TE_VARLEN, VARLEN, Layouts, parallel
from testkit.places import program_path
from testkit.recorded_run import ACCUMULATED, RUN

CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
TWO_SAMPLES = {"samples": 2, "divisible_by": 64, "backend": "triton"}

# Layouts by number of processes, for each kind of model.
LAYOUTS: dict[str, dict[int, dict[str, dict[str, Any]]]] = {
    "llama": {
        1: {"reference": REFERENCE},
        2: {
            # A budget that two ranks cannot share out.
            "cp2": parallel(**CP2) | {"tokens_per_microbatch": 385},
            "cp2_recompute_full": parallel(**CP2, **FULL),
            "cp2_varlen": parallel(**CP2) | VARLEN | {"tokens_per_microbatch": 385},
            "cp2_te_varlen": parallel(**CP2) | TE_VARLEN | {"tokens_per_microbatch": 385},
        },
        4: {
            "cp4": parallel(**CP4),
            "tp2_cp2": parallel(2, **CP2),
            "tp2_sp_cp2": parallel(2, sp=True, **CP2),
            "pp2_cp2": parallel(1, 2, **CP2),
            "pp2_vpp2_cp2": parallel(1, 2, 2, **CP2),
            "dp2_cp2": parallel(**CP2),
            "dp2_cp2_overlap": parallel(**CP2, **OVERLAP),
        },
        8: {
            "tp2_sp_pp2_cp2": parallel(2, 2, sp=True, **CP2),
            "tp2_sp_pp2_vpp2_cp2_overlap": parallel(2, 2, 2, sp=True, **CP2, **OVERLAP),
            "pp2_cp4_recompute_full": parallel(1, 2, **CP4, **FULL),
        },
    },
    "qwen2_tied": {1: {"reference": REFERENCE}, 4: {"pp2_cp2": parallel(1, 2, **CP2)}},
    # Four queries share two keys.
    "qwen3": {
        1: {"reference": REFERENCE},
        4: {
            "tp2_sp_cp2": parallel(2, sp=True, **CP2),
            "tp2_sp_cp2_varlen": parallel(2, sp=True, recompute="selective", **CP2) | VARLEN,
        },
    },
    "llama_8_heads": {
        1: {"reference": REFERENCE | TWO_SAMPLES | {"backend": "reference"}},
        2: {"cp2_triton": parallel(**CP2) | TWO_SAMPLES},
        # Half of the replicas have no sample, and their ranks no row to send.
        8: {"dp4_cp2_triton": parallel(**CP2) | TWO_SAMPLES},
    },
}


@pytest.mark.slow
def test_layouts_have_the_same_gradient(tmp_path: Path) -> None:
    layouts = Layouts(tmp_path)
    for kind, by_processes in LAYOUTS.items():
        layouts.add(kind, by_processes)
    layouts.run()


@pytest.mark.slow
def test_recorded_training_run(tmp_path: Path) -> None:
    def steps(processes: int) -> list[list[float]]:
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, "-W", "ignore", program_path("recorded_run_ranks"), str(out)]
        assert spawn_local(command, processes, threads_per_process=1, log_dir=tmp_path / "logs") == 0
        return json.loads(out.read_text(encoding="utf-8"))

    alone, split = steps(1), steps(2)
    for mine, expected in zip(split, alone, strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    samples = [one["loss"] for one in RUN["micro"]]
    means = [sum(samples[i : i + ACCUMULATED]) / ACCUMULATED for i in range(0, len(samples), ACCUMULATED)]
    assert [loss for loss, _ in split] == pytest.approx(means, abs=1e-4)
    assert [norm for _, norm in split] == pytest.approx([one["logged_grad_norm"] for one in RUN["steps"]], rel=1e-3)


@pytest.mark.slow
def test_checkpoints_move_to_and_from_context_parallel_layouts(tmp_path: Path) -> None:
    cp2, tp2 = {"parallel": CP2}, {"parallel": {"tensor_model_parallel_size": 2}}
    jobs = {"saved": SAVE | cp2, "cp2": cp2, "tp2": tp2, "dp2": {}}
    results = run_cases(
        tmp_path, {name: Case("llama", [(2, jobs)], {"optimizer": name}) for name in ("adamw", "adafactor")}
    )
    for found in results.values():
        assert_follows(found["cp2"], found["saved"], EXACT)
        for name in ("tp2", "dp2"):
            assert_follows(found[name], found["saved"], FLOAT32)
