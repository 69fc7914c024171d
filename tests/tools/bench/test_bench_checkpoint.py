"""``reflectron bench checkpoint`` on a small model: every metric is a row that can be read alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reflectron.tools import cli

METRICS = ["save", "asynchronous_stall", "asynchronous_complete", "bytes", "check", "load"]


@pytest.mark.slow
def test_every_metric_is_a_row(tmp_path: Path) -> None:
    words = ["bench", "checkpoint", "--out", str(tmp_path), "--layers", "1", "--rounds", "2"]
    assert cli.main(words) == 0
    rows = {row["metric"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert list(rows) == METRICS
    for row in rows.values():
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert (row["processes"], row["model"]["num_layers"]) == (2, 1)
    # bfloat16 weights, and three numbers of four bytes for AdamW.
    assert rows["bytes"]["p50"] == pytest.approx(14 * rows["bytes"]["parameters"], rel=0.01)
    assert rows["asynchronous_stall"]["p50"] < rows["asynchronous_complete"]["p50"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert cli.main(words) == 2


def test_sizes_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "checkpoint", "--out", str(tmp_path), "--layers", "2,x"]) == 2
    assert "--layers is '2,x', expected numbers such as 1,4,8" in capsys.readouterr().err
