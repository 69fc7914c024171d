"""What holds for every test: no network, one thread a process, and the folder of recorded numbers."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from reflectron.tools.sandbox.process import choose_sandbox
from reflectron.tools.sandbox.wall import SandboxKind

# As the command does, for the same reason.
gc.set_threshold(10_000)
# Before any test imports torch or transformers. Tests of ranks start several processes, which must not fight for cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs of the helpers' package import from it as the tests do, which have it from pytest's ``pythonpath``.
HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HELPERS, os.environ.get("PYTHONPATH"))))
if not Path("/dev/nvidiactl").exists():
    # Read when triton is first imported, which megatron-core does: kernels then run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Numbers recorded from the reference implementation."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def sandbox() -> SandboxKind:
    """The wall around model-written code; where it cannot be had the test is skipped, but never in CI."""
    try:
        return choose_sandbox("bubblewrap", i_understand=False)
    except ValueError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


# The longest files of the slow tests: first those that compute, each beside one that mostly waits (for limits of time,
# for ranks that stand still, for a cluster), so that the cores have work and no worker ends alone with a long file.
COMPUTING = (
    "examples/test_quickstart",
    "engine/parallel/test_layouts",
    "engine/parallel/test_context_parallel",
    "engine/checkpoint/test_checkpoint",
    "tools/bench/test_bench_gpu_command",
    "tools/commands/test_resume",
    "tools/commands/test_train_cli",
    "engine/training/test_nonfinite_steps",
)
WAITING = (
    "drills/test_sandbox_drill",
    "tools/eval/test_eval_score_command",
    "examples/test_slurm",
    "engine/parallel/test_watchdog",
    "drills/test_freezes",
    "drills/test_faults",
    "tools/eval/test_eval_ablate",
    "tools/data/test_reflect_killed",
)
LONGEST = [name for pair in zip(COMPUTING, WAITING, strict=True) for name in pair]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, for workers that each take the next file; the order within a file stays."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).with_suffix("").as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
