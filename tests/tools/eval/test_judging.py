"""Judging many samples: one that cannot be judged fails alone, and nothing is judged twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from reflectron.tools.benchmarks.benchmark import ProgramSample, SuiteVerdict, Verdicts
from reflectron.tools.benchmarks.judging import MOST_SOURCE_BYTES, VerdictFile, in_threads, judge_samples
from reflectron.tools.sandbox.wall import SandboxKind

PASS = SuiteVerdict("pass")


def samples(*codes: str) -> list[ProgramSample]:
    return [ProgramSample("t", number, code) for number, code in enumerate(codes)]


def run(given: list[ProgramSample], judge: object, path: Path, sandbox: SandboxKind, suites: int = 1) -> list[Verdicts]:
    with VerdictFile(path, suites) as kept:
        keys = [sample.code for sample in given]
        return judge_samples(given, keys, judge, kept, workers=2, kind=sandbox)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        OSError("bubblewrap made no sandbox"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        RecursionError("\x1b[2J deep\nand more"),
        MemoryError(),
        type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})(),
    ],
)
def test_a_sample_that_cannot_be_judged_fails_alone(
    tmp_path: Path, sandbox: SandboxKind, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(sample: ProgramSample) -> Verdicts:
        if sample.code == "hostile":
            raise error
        return PASS, PASS

    found = run(samples("a", "hostile", "b"), judge, tmp_path / "v", sandbox, suites=2)
    assert [verdicts[0].status for verdicts in found] == ["pass", "fail", "pass"]
    assert [verdicts[1].status for verdicts in found] == ["pass", "fail", "pass"]
    assert found[1][0].got.startswith(f"could not be judged: {type(error).__name__}")
    assert found[1][0].got.isprintable()
    assert "1 samples could not be judged and count as failed" in capsys.readouterr().err
    judged = []
    # It is tried again, the others are not.

    def again(sample: ProgramSample) -> Verdicts:
        judged.append(sample.code)
        return PASS, PASS

    run(samples("a", "hostile", "b"), again, tmp_path / "v", sandbox, suites=2)
    assert judged == ["hostile"]


def test_where_nothing_can_be_run_any_longer_no_sample_is_blamed(
    tmp_path: Path, sandbox: SandboxKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(sample: ProgramSample) -> Verdicts:
        if sample.code == "b":
            # As if it had been removed meanwhile.
            monkeypatch.setenv("PATH", str(tmp_path))
            raise OSError("no bwrap")
        return (PASS,)

    with VerdictFile(tmp_path / "v", 1) as kept:
        given = samples("a", "b", "c")
        with pytest.raises(OSError, match="no bwrap"):
            judge_samples(given, ["a", "b", "c"], judge, kept, workers=1, kind=sandbox)
        assert list(kept.verdicts) == ["a"]


def test_a_fault_of_ours_is_no_score(tmp_path: Path, sandbox: SandboxKind) -> None:
    def judge(sample: ProgramSample) -> Verdicts:
        raise AttributeError("a judge that is broken")

    with pytest.raises(AttributeError, match="broken"):
        run(samples("a", "b"), judge, tmp_path / "v", sandbox)


def test_what_is_no_program_is_not_run(tmp_path: Path, sandbox: SandboxKind) -> None:
    given = samples("a\ud800", "x" * (MOST_SOURCE_BYTES + 1), "nul \0 is for the interpreter to refuse")
    judged = []
    found = run(given, lambda sample: judged.append(sample.number) or (PASS,), tmp_path / "v", sandbox)
    assert judged == [2]
    assert found[0][0] == SuiteVerdict("fail", got="the program is no valid Unicode: '\\ud800' at character 1")
    assert found[1][0] == SuiteVerdict("fail", got="the program has 16777217 bytes, more than 16777216")


def test_an_error_ends_what_has_not_begun() -> None:
    begun = []
    wait = threading.Event()

    def call(item: int) -> int:
        begun.append(item)
        if item == 0:
            raise ValueError("broken")
        wait.wait(0.5)
        return item

    with pytest.raises(ValueError, match="broken"):
        list(in_threads(call, range(100), 2))
    assert len(begun) < 10
