"""Learning rate: the reference's recorded rates and transformers' schedules after the warm-up, ours during it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import optimization

from reflectron.engine.config import LrScheduleConfig
from reflectron.engine.optim.optimizer import learning_rate, warmup_steps
from testkit.places import TESTS_DIR

GOLDEN = json.loads((TESTS_DIR / "golden" / "golden.json").read_text())["lr_schedule"]


@pytest.mark.parametrize("run", GOLDEN, ids=lambda run: f"{run['total_steps']} steps")
def test_equals_the_reference_after_the_warmup(run: dict) -> None:
    schedule = LrScheduleConfig(warmup_ratio=run["warmup_ratio"])
    warmup, total = run["warmup_steps"], run["total_steps"]
    rates = [learning_rate(step, total, run["peak_lr"], schedule) for step in range(total)]
    assert warmup_steps(total, schedule) == warmup
    assert rates[warmup:] == pytest.approx(run["lr_of_update"][warmup:], rel=1e-12)
    # The reference warms up one update later, from a first update of rate 0.
    assert rates[:warmup] == pytest.approx(run["lr_of_update"][1 : warmup + 1], rel=1e-12)
    assert rates[0] > 0


@pytest.mark.parametrize(
    ("shape", "builder", "arguments", "lowest"),
    [
        ("cosine", "get_cosine_schedule_with_warmup", {"num_training_steps": 50}, 0.0),
        ("cosine", "get_cosine_with_min_lr_schedule_with_warmup", {"num_training_steps": 50, "min_lr": 1e-4}, 1e-4),
        ("linear", "get_linear_schedule_with_warmup", {"num_training_steps": 50}, 0.0),
        ("constant", "get_constant_schedule_with_warmup", {}, 0.0),
    ],
)
@pytest.mark.parametrize("warmup", [0, 15])
def test_equals_transformers_after_the_warmup(
    shape: str, builder: str, arguments: dict, lowest: float, warmup: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = getattr(optimization, builder)(optimizer, num_warmup_steps=warmup, **arguments)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = LrScheduleConfig(shape=shape, warmup_steps=warmup, min_learning_rate=lowest)
    rates = [learning_rate(step, 50, 1e-3, schedule) for step in range(50)]
    assert rates[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    schedule = LrScheduleConfig(shape="linear", warmup_steps=4)
    assert [learning_rate(step, 8, 1.0, schedule) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_a_warmup_longer_than_the_run_never_decays() -> None:
    schedule = LrScheduleConfig(warmup_steps=10)
    assert [learning_rate(step, 3, 1.0, schedule) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
