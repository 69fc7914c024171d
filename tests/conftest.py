"""What holds for every test: no network, one thread a process, and the folder of recorded numbers."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from reflectron.tools.sandbox.process import SandboxKind, choose_sandbox

# As the command does, for the same reason.
gc.set_threshold(10_000)
# Before any test imports torch or transformers. Tests of ranks start several processes, which must not fight for cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
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
