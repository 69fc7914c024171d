"""Verdicts on disk: they are found again by what determines them, and survive what can become of a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reflectron.tools.benchmarks.benchmark import BenchmarkProblem, ProgramSample, SuiteVerdict
from reflectron.tools.benchmarks.judging import VerdictFile, as_row, from_row, verdict_keys

SAMPLE = ProgramSample("own/0", 0, "def f(): pass")
FAIL = (SuiteVerdict("fail", "1", "2", "3"),)


def problem(test: str) -> BenchmarkProblem:
    return BenchmarkProblem("own/0", "", "f", {"test": test})


def test_a_verdict_is_found_by_all_that_determines_it() -> None:
    def key(sample: ProgramSample = SAMPLE, test: str = "a", dataset: str = "functions", limit: float = 1.0) -> str:
        return verdict_keys(dataset, [problem(test)], [sample], limit)[0]

    changed = [
        key(ProgramSample("own/0", 0, "def f(): return 1")),
        key(ProgramSample("own/0", 1, SAMPLE.code)),
        key(ProgramSample("own/0", 0, SAMPLE.code + "\ud800")),
        key(test="b"),
        key(dataset="humaneval"),
        key(limit=2.0),
    ]
    assert key() == key()
    assert len({key(), *changed}) == 1 + len(changed)


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "v.jsonl"
    with VerdictFile(path, 1) as kept:
        kept.write("k", SAMPLE, FAIL)
        assert json.loads(path.read_text())["task_id"] == "own/0"
    with VerdictFile(path, 1) as again:
        assert again.verdicts == {"k": FAIL}


@pytest.mark.parametrize(
    "damage",
    [
        '{"key": "cut", "verdicts": [{"sta',
        "null\n",
        "\0\0\0\0\n",
        "[" * 100_000 + "\n",
        '{"key": "x", "verdicts": []}\n',
        '{"key": "x", "verdicts": [{"status": "pass"}]}\n',
        json.dumps({"key": "x", "verdicts": [as_row(FAIL)[0] | {"status": "passed"}]}) + "\n",
        json.dumps({"key": "x", "verdicts": [as_row(FAIL)[0] | {"got": 3}]}) + "\n",
        json.dumps({"key": ["x"], "verdicts": as_row(FAIL)}) + "\n",
        json.dumps({"key": "x", "verdicts": 2 * as_row(FAIL)}) + "\n",
    ],
)
def test_what_is_no_row_counts_as_not_written(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "v.jsonl"
    with VerdictFile(path, 1) as kept:
        kept.write("a", SAMPLE, FAIL)
    with path.open("a") as file:
        file.write(damage)
    with VerdictFile(path, 1) as kept:
        assert kept.verdicts == {"a": FAIL}
        kept.write("b", SAMPLE, FAIL)
    with VerdictFile(path, 1) as kept:
        assert kept.verdicts == {"a": FAIL, "b": FAIL}


def test_two_scorers_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with VerdictFile(path, 1), pytest.raises(ValueError, match="being written by another scorer"):
        VerdictFile(path, 1)
    VerdictFile(path, 1).__exit__()
    with pytest.raises(ValueError, match="Is a directory; --json FILE puts them beside FILE"):
        VerdictFile(tmp_path, 1)


def test_a_pipe_keeps_no_verdicts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: it is no file; --json FILE puts them beside FILE"):
        VerdictFile(tmp_path / "pipe", 1)


def test_a_verdict_is_bounded_printable_text() -> None:
    verdict = SuiteVerdict("fail", "\x1b]0;owned\x07", "a\nb", "\ud800" + "x" * 10_000)
    (back,) = from_row(json.loads(json.dumps(as_row((verdict,)))))
    assert back == verdict
    for text in (verdict.input, verdict.expected, verdict.got):
        assert text.isprintable()
        assert len(text) <= 300
        text.encode()
