"""The CUDA path on a machine without a GPU: the real commands on tensors that say they are on ``cuda:0``.

What this shows: no operator meets tensors of two devices, every type and layout is one that the kernels of torch and
of ours take, the host waits where it should, kernels compile for sm_90 as they are launched, and the numbers are those
of the CPU. What it cannot show: anything of speed, of a GPU's own rounding, of orders between streams, of NCCL, or that
a kernel of torch's exists for CUDA where one for the CPU does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectron.tools.bench.checks import TOLERANCES
from reflectron.tools.bench.harness import write_tiny_run
from testkit.places import TESTS_DIR
from testkit.pretended_cuda import build, environment

# Triton's interpreter computes a row of a layer in milliseconds; Liger's kernels have tests of their own.
PLAIN_LAYERS = "backends.layers=torch"
ON_CUDA = ("parallel.device=cuda", "model.dtype=bfloat16", PLAIN_LAYERS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch has kernels of its own"),
    pytest.mark.skipif(torch.__version__ < "2.11", reason="the extension is written against torch 2.13"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def pretending(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of processes with an H100 that is not there."""
    return environment(build(tmp_path_factory.mktemp("extension")))


def run(words: list[str], env: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout


class Run:
    """``reflectron train`` in a folder of its own."""

    def __init__(self, folder: Path, env: dict[str, str], *overrides: str) -> None:
        self.folder, self.env = folder, env
        folder.mkdir()
        data = f"data.validation=[{{path: {folder / 'samples.jsonl'}}}]"
        self.words = ["-m", "reflectron.tools.cli", "train", str(write_tiny_run(folder)), "train.steps=4", data]
        self.words += ["optimizer.learning_rate=1e-3", "train.validate_every=4", *overrides]
        self.shown = run(self.words, env)

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "run" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def resume(self) -> str:
        """As if it had been lost behind the checkpoint before its last."""
        (self.folder / "run" / "finished.json").unlink()
        checkpoints = self.folder / "run" / "checkpoints"
        before, last = sorted(checkpoints.glob("step_*"))[-2:]
        shutil.rmtree(last)
        (checkpoints / "latest").write_text(f"{before.name}\n", encoding="utf-8")
        return run(self.words, self.env)


@pytest.fixture(scope="module")
def truth(pretending: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on the CPU, in float32."""
    env = pretending | {"CUDA_VISIBLE_DEVICES": ""}
    return Run(tmp_path_factory.mktemp("truth") / "run", env, "parallel.data_parallel_size=1")


def check(found: Run, truth: Run) -> None:
    for name, keys in (("metrics", ("loss", "grad_norm")), ("validation", ("loss",))):
        for mine, theirs in zip(found.rows(name), truth.rows(name), strict=True):
            for key in keys:
                assert mine[key] == pytest.approx(theirs[key], rel=TOLERANCES["bfloat16"][key]), (mine["step"], key)


def test_a_run_and_its_resumption_compute_what_the_cpu_does(
    pretending: dict[str, str], truth: Run, tmp_path: Path
) -> None:
    """In bfloat16, with what a plain installation takes on an H100."""
    found = Run(tmp_path / "run", pretending, *ON_CUDA, "parallel.data_parallel_size=1")
    for choice in ("attention torch_varlen", "weight_gradient addmm", "adamw torch_fused"):
        assert f"backends: {choice}" in found.shown
    check(found, truth)
    assert "resuming after step 3" in found.resume()
    check(found, truth)


@pytest.mark.parametrize("sizes", [("data",), ("pipeline_model",), ("tensor_model", "sequence"), ("context",)])
def test_two_ranks_compute_what_one_does(
    sizes: tuple[str, ...], pretending: dict[str, str], truth: Run, tmp_path: Path
) -> None:
    """With the overlaps and the freed outputs that there are on CUDA only; both ranks are on the one device."""
    words = [f"parallel.{sizes[0]}_parallel_size=2", *(f"parallel.{name}_parallel=true" for name in sizes[1:])]
    if sizes != ("data",):
        words.append("parallel.data_parallel_size=1")
    check(Run(tmp_path / "run", pretending, *ON_CUDA, *words), truth)


def test_a_step_waits_for_the_device_once(pretending: dict[str, str], tmp_path: Path) -> None:
    run([str(TESTS_DIR / "engine/training/test_host_waits.py"), str(tmp_path), PLAIN_LAYERS], pretending)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert len(found["synchronisations"]) == 1, found["synchronisations"]
    assert len(found["bad_synchronisations"]) == 5


HEAD = """
import json, sys, torch
from reflectron.tools.bench import checks

checks.SIZES["cuda"], checks.DTYPES = ((72, 132, 9, 5),), (torch.bfloat16,)
json.dump(list(checks.kernel_rows(torch.device("cuda"))), sys.stdout)
"""


def test_the_head_launches_what_compiles_and_computes(pretending: dict[str, str]) -> None:
    pytest.importorskip("triton", minversion="3.7")
    compared = json.loads(run(["-c", HEAD], pretending))
    assert len(compared) == 40
    assert not [row for row in compared if not row["passed"]]


def test_tensors_of_two_devices_are_refused(pretending: dict[str, str]) -> None:
    """The pretence itself."""
    mixed = ("a + b", "torch.cat([a, b])", "a[:, 0].copy_(b[:, 0]) @ b", "torch.nn.functional.embedding(b.long(), a)")
    code = "import torch\na, b = torch.ones(2, 2, device='cuda'), torch.ones(2, 2)\n"
    for expression in mixed:
        code += f"try:\n    {expression}\nexcept RuntimeError as error:\n    print('refused', error)\n"
    assert run(["-c", code], pretending).count("refused") == len(mixed)
