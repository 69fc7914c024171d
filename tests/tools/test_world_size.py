"""How many processes a layout needs, and what is said when the job has others."""

from __future__ import annotations

import re

import pytest

from reflectron.engine.config import ParallelConfig
from reflectron.engine.parallel.process_groups import check_world_size
from reflectron.tools.ranks import local_processes

LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "context_parallel_size": 4}


def test_replicas_fill_the_job() -> None:
    assert check_world_size(ParallelConfig(**LAYOUT), 48) == 2
    assert check_world_size(ParallelConfig(**LAYOUT, data_parallel_size=2), 48) == 2


@pytest.mark.parametrize(
    ("replicas", "processes", "expected"), [(None, 36, "a multiple of 24"), (2, 24, "48"), (1, 23, "24")]
)
def test_another_number_of_processes_is_refused(replicas: int | None, processes: int, expected: str) -> None:
    message = (
        f"the job has {processes} processes, expected {expected}: parallel.tensor_model_parallel_size (2) x "
        "parallel.pipeline_model_parallel_size (3) x parallel.context_parallel_size (4) x "
        f"parallel.data_parallel_size ({replicas})"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_world_size(ParallelConfig(**LAYOUT, data_parallel_size=replicas), processes)


def test_ranks_that_are_started_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert local_processes(ParallelConfig(**LAYOUT, data_parallel_size=2)) == 48
    assert local_processes(ParallelConfig(device="cpu", **LAYOUT)) == 24


def test_a_size_below_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"parallel\.context_parallel_size is 0, expected at least 1"):
        ParallelConfig(context_parallel_size=0)
