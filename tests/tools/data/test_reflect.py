"""``reflectron data reflect`` against a scripted model, with true executions in the sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.data.sources import parse_record
from reflectron.tools import cli
from reflectron.tools.llm.scripted_server import Scripted, ScriptedServer
from testkit.scripted_generator import ANSWER, ATTEMPTS, RIGHT, SAID, TESTS, number_of, problem, speak, turn

pytestmark = pytest.mark.slow


def reflect(server: ScriptedServer, folder: Path, problems: list[dict[str, Any]], *more: str) -> int:
    folder.mkdir(exist_ok=True)
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in problems))
    words = ["data", "reflect", str(file), "--out", str(folder), "--endpoint", server.url, "--model", "tiny"]
    return cli.main([*words, "--concurrency", "2", "--retry-pause", "0.001", *more])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_wrong_code_is_repaired_in_two_rounds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(speak) as server:
        assert reflect(server, tmp_path, [problem(1)]) == 0
    [sample] = rows(tmp_path / "reflection.jsonl")
    assert parse_record(sample).kind == "reflection"
    first, sequence, second, answer = (message["content"] for message in sample["messages"])
    assert first[0]["content"].endswith(f"\n\n{problem(1)['instruction']}")
    assert second == [{"type": "text", "content": problem(1)["instruction"]}]
    assert answer == [{"type": "text", "content": ANSWER}]
    # Blocks as they happened: what the model said and wrote, and what the interpreter really printed.
    assert [block["type"] for block in sequence] == ["text", "code", "execution"] * 3
    assert [block["content"] for block in sequence[0::3]] == list(SAID)
    assert [block["content"] for block in sequence[1::3]] == [f"{code}\n\n{TESTS}" for code in ATTEMPTS]
    outputs = [block["content"] for block in sequence[2::3]]
    assert "NameError: name 'hihg' is not defined" in outputs[0]
    assert "AssertionError" in outputs[1]
    assert outputs[2] == ""
    # The model was shown the same.
    assert outputs[0].strip() in server.requests[1]["messages"][-1]["content"]
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["accepted"], stats["rounds"], stats["failed_runs_repaired"]) == (1, {"3": 1}, 2)
    assert stats["attempts"] == {"answer: ok": 1, "reflect: ok": 3}
    assert "accepted   1, 1 of them with a repaired failure" in capfd.readouterr().err


def fixed(*, tests: str = TESTS, answer: str = ANSWER, code: str = RIGHT) -> Callable[[dict[str, Any]], Scripted]:
    """Right at once, but for what is given."""

    def script(body: dict[str, Any]) -> Scripted:
        final = body["messages"][-1]["content"].startswith("All tests pass.")
        return Scripted(text=answer if final else turn("So.", code, tests))

    return script


def answer_of(code: str) -> str:
    return f"```python\n{code}\n```"


FAULTS = {
    "no code": lambda body: Scripted(text="I would rather not."),
    "tests never passed": lambda body: Scripted(text=turn("Hm.", ATTEMPTS[0])),
    "tests never passed: untested": fixed(tests="print(clamp(1, 2, 3))"),
    "truncated": lambda body: Scripted(text=turn("Cut", RIGHT)[:60], finish_reason="length"),
    "no final code": fixed(answer="The solution is max(low, min(x, high))."),
    "syntax error": fixed(answer=answer_of("def clamp(x:")),
    "leftover": fixed(answer=f"Here is the corrected version:\n\n{answer_of(RIGHT)}"),
    "tests fail on the answer": fixed(answer=answer_of(ATTEMPTS[1])),
    "other names": fixed(answer=answer_of(RIGHT.replace("clamp", "bound"))),
    "vacuous tests": fixed(tests="assert clamp(1, 0, 3) is None or True"),
    "tests call nothing": fixed(tests="assert callable(clamp)"),
    "tests fail on the answer: early exit": fixed(answer=answer_of(f"{RIGHT}\nraise SystemExit(0)")),
    "tests fail on the answer: endless": fixed(answer=answer_of(f"{RIGHT}\nwhile True: pass")),
    "tag in content": fixed(answer=f"{ANSWER}<|endofblock|>"),
    "request failed: bad request": lambda body: Scripted(status=400),
    "request failed: server error": lambda body: Scripted(status=500),
}


def test_each_fault_rejects_its_problem_and_is_named(tmp_path: Path) -> None:
    names = list(FAULTS)
    problems = [problem(number) for number in range(len(names))]
    with ScriptedServer(lambda body: FAULTS[names[number_of(body)]](body)) as server:
        more = ("--attempts", "2", "--rounds", "2", "--run-seconds", "2")
        assert reflect(server, tmp_path, [*problems, problem(0), {"text": "?"}], *more) == 1
    rejects = {int(row["source"].split(":")[-1]): row["reason"] for row in rows(tmp_path / "rejects.jsonl")}
    assert len(rejects) == len(names) + 2
    for number, name in enumerate(names):
        assert rejects[number + 1].startswith(name.split(":")[0]), name
    assert "ended before its tests" in rejects[1 + names.index("tests fail on the answer: early exit")]
    assert rejects[1 + names.index("tests fail on the answer: endless")].endswith(("wall_time", "cpu_time"))
    assert rejects[len(names) + 1].startswith("duplicate: the same problem as ")
    assert rejects[len(names) + 2].startswith("no problem: found columns text")
    assert not (tmp_path / "reflection.jsonl").read_text()
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["accepted"] == 0
    assert sum(stats["rejected"].values()) == len(names) + 2
    assert stats["attempts"]["reflect: server error"] == 2
    asked = len(server.requests)
    # What failed for the server's sake is tried again, and nothing else.
    with ScriptedServer(fixed()) as server:
        assert reflect(server, tmp_path, [*problems, problem(0), {"text": "?"}], *more) == 0
        assert {number_of(body) for body in server.requests} == {len(names) - 1}
    assert len(rows(tmp_path / "reflection.jsonl")) == 1
    assert asked > len(names)


def test_a_bad_answer_is_drawn_again(tmp_path: Path) -> None:
    answers = iter([f"I fixed the bug.\n\n{answer_of(RIGHT)}", ANSWER])

    def script(body: dict[str, Any]) -> Scripted:
        final = body["messages"][-1]["content"].startswith("All tests pass.")
        return Scripted(text=next(answers)) if final else speak(body, first_attempt=2)

    with ScriptedServer(script) as server:
        assert reflect(server, tmp_path, [problem(1)]) == 0
    assert len(rows(tmp_path / "reflection.jsonl")) == 1
    assert json.loads((tmp_path / "stats.json").read_text())["answers_thrown_away"] == {"leftover": 1}


def test_a_spent_budget_ends_the_run_and_a_larger_one_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(speak) as server:
        assert reflect(server, tmp_path, [problem(1)], "--max-total-tokens", "1") == 1
        assert "stopped: the token budget is spent: " in capfd.readouterr().err
        assert len(server.requests) == 1
        assert not rows(tmp_path / "reflection.jsonl")
        assert reflect(server, tmp_path, [problem(1)], "--max-total-tokens", "100000") == 0
        assert len(server.requests) == 4
    assert len(rows(tmp_path / "reflection.jsonl")) == 1


@pytest.mark.parametrize(
    ("script", "last"),
    [
        (None, "stopped: the server failed requests, see attempts.jsonl; 2 problems left."),
        (lambda body: Scripted(status=401), "stopped: the server failed requests, see attempts.jsonl; 2"),
        (lambda body: Scripted(text="I do not know."), "nothing was made: all problems were tried and none gave a"),
        (lambda body: Scripted(text="```python\nassert '\ud800'\n```"), "nothing was made: all problems were tried"),
    ],
)
def test_a_run_that_made_nothing_or_not_all_ends_with_1(
    tmp_path: Path, script: Callable[[dict[str, Any]], Scripted] | None, last: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(script or speak) as server:
        if script is None:
            server.url = "http://127.0.0.1:1/v1"
        assert reflect(server, tmp_path, [problem(1), problem(2)], "--attempts", "1", "--interpreters", "1") == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith(last)
    assert len(rows(tmp_path / "attempts.jsonl")) >= 2
    with ScriptedServer(speak) as server:
        code = reflect(server, tmp_path, [problem(1), problem(2)], "--interpreters", "1")
    # What failed for the server's sake is made up for; what the model answered stays.
    assert code == (0 if last.startswith("stopped") else 1)


def test_an_input_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "attempts.jsonl"
    file.write_text('{"problem": "x"}\n')
    words = [
        "data",
        "reflect",
        str(file),
        "--out",
        str(tmp_path),
        "--endpoint",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
    ]
    assert cli.main(words) == 2
    assert "is a file that this command writes" in capsys.readouterr().err
    assert file.read_text() == '{"problem": "x"}\n'


def test_the_bench_writes_a_row_for_each_pool_size(tmp_path: Path) -> None:
    words = ["bench", "data", "--out", str(tmp_path / "bench"), "--problems", "2", "--rounds", "1"]
    assert cli.main([*words, "--interpreters", "1,2"]) == 0
    found = rows(tmp_path / "bench" / "rows.jsonl")
    assert [row["interpreters"] for row in found] == [1, 2]
    assert all(row["p50"] > 0 and row["cpu"] and row["problems"] == 2 for row in found)
