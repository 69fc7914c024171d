"""The engine against numbers recorded from the reference: rows of logits, and a whole training run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from testkit.places import program_path
from testkit.recorded_run import ACCUMULATION, LOGITS, RUN


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("golden") / "computed.json"
    subprocess.run([sys.executable, program_path("recorded_run"), str(out)], check=True, capture_output=True, text=True)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("view", ["teacher", "student"])
def test_logits(computed: dict[str, Any], view: str) -> None:
    for row, expected in LOGITS[f"{view}_first8"].items():
        found = computed["logits"][view][row]
        assert found["first8"] == pytest.approx(expected, abs=1e-4)
        assert found["logsumexp"] == pytest.approx(LOGITS[f"{view}_logsumexp"][row], abs=1e-4)


@pytest.mark.slow
def test_gradient_accumulation(computed: dict[str, Any]) -> None:
    found = computed["accumulation"]
    assert found["losses"] == pytest.approx(ACCUMULATION["micro_losses"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(ACCUMULATION["global_grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_training_run(computed: dict[str, Any]) -> None:
    assert computed["losses"] == pytest.approx([one["loss"] for one in RUN["micro"]], abs=1e-4)
    assert computed["grad_norms"] == pytest.approx([one["logged_grad_norm"] for one in RUN["steps"]], rel=1e-3)


@pytest.mark.slow
def test_state_after_the_run(computed: dict[str, Any]) -> None:
    assert computed["final_loss"] == pytest.approx(RUN["final_loss"], abs=1e-4)
    assert computed["parameters"].keys() == RUN["final_param"].keys()
    for name, expected in RUN["final_param"].items():
        found = computed["parameters"][name]
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5), name
        # Of up to 46,528 entries, each of which may be off by a rounding.
        assert found["sum"] == pytest.approx(expected["sum"], abs=1e-3), name
        assert found["first4"] == pytest.approx(expected["first4"], abs=1e-5), name
