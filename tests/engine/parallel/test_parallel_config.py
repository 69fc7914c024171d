"""Layouts and optimizer placements that cannot work are refused by key, with the reason, before anything starts."""

from __future__ import annotations

import re
from typing import Any

import pytest
from packaging.version import Version

from reflectron.engine.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from reflectron.engine.parallel.machine import check_machine

PARALLEL: list[tuple[dict[str, Any], str]] = [
    (
        {"virtual_pipeline_model_parallel_size": 2},
        "virtual_pipeline_model_parallel_size is 2, expected 1 when parallel.pipeline_model_parallel_size is 1",
    ),
    ({"virtual_pipeline_model_parallel_size": 0}, "virtual_pipeline_model_parallel_size is 0, expected at least 1"),
    (
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "layers_per_stage": (4, 4),
        },
        "layers_per_stage is [4, 4], expected 4 positive numbers, one a chunk",
    ),
    (
        {"overlap_param_gather": True, "distributed_optimizer": False},
        "overlap_param_gather is True, expected false when parallel.distributed_optimizer is false",
    ),
    (
        {"overlap_param_gather": True, "overlap_grad_reduce": False},
        "overlap_param_gather is True, expected false when parallel.overlap_grad_reduce is false",
    ),
    ({"bucket_size": 0}, "bucket_size is 0, expected at least 1"),
    (
        {"recompute": "selective", "recompute_modules": ("layernorm",)},
        "recompute_modules is ['layernorm'], expected core_attn, mlp or both",
    ),
    (
        {"recompute": "selective", "recompute_modules": ()},
        "recompute_modules is [], expected core_attn, mlp or both",
    ),
]

OPTIMIZER: list[tuple[dict[str, Any], str]] = [
    ({"cpu_offload_fraction": 1.5}, "cpu_offload_fraction is 1.5, expected 0 to 1"),
    (
        {"exp_avg_sq_dtype": "bfloat16"},
        "exp_avg_sq_dtype is 'bfloat16', expected 'float32' with optimizer.beta2 0.999",
    ),
    (
        {"exp_avg_dtype": "bfloat16", "name": "adafactor"},
        "exp_avg_dtype is 'bfloat16', expected the default with optimizer.name adafactor",
    ),
    (
        {"exp_avg_dtype": "bfloat16", "cpu_offload_fraction": 0.5},
        "exp_avg_dtype is 'bfloat16', expected 'float32' when optimizer.cpu_offload_fraction is above 0",
    ),
]


@pytest.mark.parametrize(("keys", "message"), PARALLEL)
def test_parallel_keys_that_exclude_each_other(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"parallel.{message}")):
        ParallelConfig(**keys)


@pytest.mark.parametrize(("keys", "message"), OPTIMIZER)
def test_optimizer_keys_that_exclude_each_other(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"optimizer.{message}")):
        OptimizerConfig(**keys)


def test_a_second_moment_in_bfloat16_follows_a_shorter_memory() -> None:
    assert OptimizerConfig(exp_avg_sq_dtype="bfloat16", beta2=0.95).needs_cuda == ("exp_avg_sq_dtype",)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "parallel": ParallelConfig(overlap_param_gather=True),
                "optimizer": OptimizerConfig(name="adafactor"),
            },
            "parallel.overlap_param_gather is True, expected false or null: optimizer.name adafactor",
        ),
        (
            {
                "parallel": ParallelConfig(distributed_optimizer=False),
                "optimizer": OptimizerConfig(cpu_offload_fraction=1.0),
            },
            "optimizer.cpu_offload_fraction is 1.0, expected parallel.distributed_optimizer true",
        ),
        (
            {"model": ModelConfig(dtype="float32"), "optimizer": OptimizerConfig(exp_avg_dtype="bfloat16")},
            "optimizer.exp_avg_dtype is 'bfloat16', expected model.dtype bfloat16",
        ),
    ],
)
def test_sections_that_exclude_each_other(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Config(**sections)


@pytest.mark.parametrize("key", [{"cpu_offload_fraction": 0.5}, {"exp_avg_dtype": "bfloat16"}])
@pytest.mark.parametrize(
    ("device", "found", "reason"),
    [
        ("cpu", None, "expected the default: it needs CUDA, and ranks run on the CPU"),
        ("cuda", None, "expected the default: it needs transformer-engine 2.3 or newer, and none is installed"),
        # Its FusedAdam raises for moments in bfloat16.
        (
            "cuda",
            Version("2.2"),
            "expected the default: it needs transformer-engine 2.3 or newer, and 2.2 is installed",
        ),
    ],
)
def test_what_a_machine_lacks(
    key: dict[str, Any], device: str, found: Version | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reflectron.engine.parallel.process_groups.device_type", lambda _: device)
    monkeypatch.setattr("reflectron.engine.parallel.machine._transformer_engine", lambda: found)
    (name, value) = next(iter(key.items()))
    with pytest.raises(ValueError, match="^" + re.escape(f"optimizer.{name} is {value!r}, {reason}")):
        check_machine(Config(optimizer=OptimizerConfig(**key)))
