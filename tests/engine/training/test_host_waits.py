"""A training step waits for its device once: counted by CUDA where there is one, elsewhere by the calls that would.

The tests start this file as the one rank of a job: ``test_host_waits.py FOLDER [key=value ...]`` writes what it found
there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

# Operations that read a number from the device or have an outcome whose size depends on one, as torch's profiler names
# them, and the copies to the host that it knows as calls from Python only.
READS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::bincount",
    "<built-in method tolist of Tensor",
    "<built-in method numpy of Tensor",
    "<built-in method cpu of Tensor",
)
# A tensor made of Python numbers on a device is a copy from ordinary memory, for which the host waits.
UPLOADS = ("<built-in method tensor of type",)
# What does not touch the device: AdamW's counters of steps are on the host, labels are only looked at on the CPU.
ON_THE_HOST = ("Optimizer.step#", ": _check_labels")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("waits")
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    content: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return content


@pytest.mark.slow
def test_the_host_reads_once_between_backward_and_update(found: dict[str, Any]) -> None:
    assert [place.rpartition(": ")[2] for place in found["reads"]] == ["_outcome"], found["reads"]


@pytest.mark.slow
def test_nothing_is_uploaded_but_the_batch(found: dict[str, Any]) -> None:
    assert found["uploads"] == []


@pytest.mark.slow
def test_the_counter_sees_what_it_is_for(found: dict[str, Any]) -> None:
    """The same count over an action that does all of it."""
    assert len(found["bad_reads"]) == 4
    assert len(found["bad_uploads"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_one_synchronisation(found: dict[str, Any]) -> None:
    assert len(found["synchronisations"]) == 1, found["synchronisations"]


def count(action: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Reads and uploads of an action, each by the function of this project that it is in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True) as recorded:
        action()
    reads, uploads = [], []
    for event in recorded.events():
        around = [event.name]
        while (event := event.cpu_parent) is not None:
            around.append(event.name)
        if any(mark in name for mark in ON_THE_HOST for name in around):
            continue
        if around[0].startswith(READS) and not any(name.startswith(READS) for name in around[1:]):
            reads.append(_own_function(around))
        # megatron-core's own tensors of numbers are on the host.
        if around[0].startswith(UPLOADS) and "megatron/" not in _caller(around):
            uploads.append(_own_function(around))
    return reads, uploads


def _caller(around: list[str]) -> str:
    """The Python function that called a built-in, past the redirection of CUDA to the CPU."""
    functions = [name for name in around if ".py(" in name and "cpu_backend.py" not in name]
    return functions[0] if functions else ""


def _own_function(around: list[str]) -> str:
    return next((name for name in around if "engine/" in name or "kernels/" in name or __file__ in name), around[0])


def synchronisations(action: Callable[[], object]) -> list[str]:
    """What CUDA says of every wait of the host during an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]


def bad(x: torch.Tensor) -> None:
    """Four reads and an upload."""
    x.sum().item()
    x[x > 0].sum()
    x.tolist()
    bool(x.max() > 1)
    torch.tensor([1.0, 2.0], device=x.device)


def main(folder: Path, overrides: list[str]) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    from reflectron.engine.parallel.launch import free_port
    from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
    from reflectron.engine.training.run import prepare
    from reflectron.tools.bench.harness import write_tiny_run
    from reflectron.tools.load_config import load_config

    os.environ["MASTER_PORT"] = str(free_port())
    words = ["parallel.data_parallel_size=1", "train.steps=3", *overrides]
    words += ["model.dtype=bfloat16"] if torch.cuda.is_available() else []
    config = load_config(str(write_tiny_run(folder)), words)
    inputs = prepare(config, progress=False)
    groups = start_process_groups(config.parallel, config.seed)

    from reflectron.engine.training.step import train_step
    from reflectron.engine.training.trainer import Trainer

    trainer = Trainer(config, inputs, groups)
    batches = trainer.batches.from_step(0, groups.device)
    batch = next(batches)

    def step() -> None:
        assert not train_step(trainer.model.wrapped, trainer.model.optimizer, groups, batch, 1e-3).skipped

    step()  # compiles and makes the optimizer's state
    content: dict[str, Any] = {}
    if torch.cuda.is_available():
        content["synchronisations"] = synchronisations(step)
    content["reads"], content["uploads"] = count(step)
    x = torch.ones(3, device=groups.device)
    if torch.cuda.is_available():
        content["bad_synchronisations"] = synchronisations(lambda: bad(x))
    content["bad_reads"], content["bad_uploads"] = count(lambda: bad(x))
    (folder / "found.json").write_text(json.dumps(content))
    list(batches)
    stop_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
