"""OSS-Instruct against a scripted server: seeds, quotas, parsing, cleaning, and resuming after a spent budget."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import DataFile
from reflectron.engine.data.sources import parse_record
from reflectron.tools import cli
from reflectron.tools.data.oss_instruct import (
    OssInstructCleaner,
    OssInstructRow,
    Seed,
    SeedFile,
    UnusableAnswer,
    draw_seeds,
    parse_answer,
)
from reflectron.tools.llm.scripted_server import Body, Scripted, ScriptedServer
from testkit.hostile_server import BEHAVIOURS, KEY, Behaviour, HostileServer, chat, response, sends


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def document(number: int, lines: int = 40) -> str:
    return "".join(f"value_{number}_{line} = {line}\n" for line in range(lines))


def draw(rows: Sequence[object], quotas: dict[str, int], folder: Path, seed: int = 0) -> dict[str, list[Seed]]:
    path = write_rows(folder / "source.jsonl", rows)
    seeds, _ = draw_seeds([SeedFile(DataFile(path=str(path)), None)], quotas, seed, "content", "lang")
    return seeds


def test_seeds_are_consecutive_lines_and_depend_on_contents_only(tmp_path: Path) -> None:
    rows = [{"content": document(n), "lang": "Python" if n % 2 else "C++"} for n in range(200)]
    drawn = draw(rows, {"python": 40, "cpp": 30}, tmp_path)
    assert {language: len(seeds) for language, seeds in drawn.items()} == {"python": 40, "cpp": 30}
    counts = set()
    for seeds in drawn.values():
        for seed in seeds:
            assert seed.text in rows[seed.raw_index]["content"]
            counts.add(seed.text.count("\n"))
    assert counts == set(range(1, 16))
    backwards = draw(rows[::-1], {"python": 40, "cpp": 30}, tmp_path)
    texts = {language: [seed.text for seed in seeds] for language, seeds in drawn.items()}
    assert {language: [seed.text for seed in seeds] for language, seeds in backwards.items()} == texts
    more = draw(rows, {"python": 60}, tmp_path)["python"]
    assert [seed.text for seed in more[:40]] == texts["python"]
    assert [seed.text for seed in draw(rows, {"python": 40}, tmp_path, seed=1)["python"]] != texts["python"]


def test_a_document_gives_one_seed_however_often_it_is_there(tmp_path: Path) -> None:
    rows = [{"content": document(1), "lang": "python"}] * 5 + [{"content": "}\n{\n", "lang": "python"}]
    assert len(draw(rows, {"python": 10}, tmp_path)["python"]) == 1


def test_no_document_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'lang'"):
        draw([{"content": "x = 1"}], {"python": 1}, tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        "[Problem Description]\nSort it.\n\n[Solution]\n```\nsorted(x)\n```",
        "Sure!\n\n## Problem Description:\nSort it.\n**[Solution]**\n```\nsorted(x)\n```\n",
    ],
)
def test_headings_in_any_markup(answer: str) -> None:
    assert parse_answer(answer) == ("Sort it.", "```\nsorted(x)\n```")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I cannot do that.", "no headings"),
        ("[Solution]\nx\n[Problem Description]\ny", "no headings"),
        ("[Problem Description]\n[Solution]\nx", "empty problem"),
        ("[Problem Description]\nx\n[Solution]\n", "empty solution"),
    ],
)
def test_unusable_answers_have_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(UnusableAnswer, match=f"^{reason}$"):
        parse_answer(answer)


@pytest.mark.parametrize(
    ("problem", "solution", "reason"),
    [
        ("Add\n two numbers.", "```\nx - y\n```", "duplicate problem"),
        ("Subtract.", "```\nx  +  y\n```", "duplicate solution"),
        ("Complete\n```py\nz = 1\n```", "Here:\n```\nz  = 1\n```", "solution copies the problem"),
        ("Multiply as in x*y.", "x * y", "solution copies the problem"),
        ("Multiply <|user|>.", "x * y", "tag in content"),
    ],
)
def test_cleaning_names_its_reason(problem: str, solution: str, reason: str) -> None:
    cleaner = OssInstructCleaner()
    cleaner.check(OssInstructRow("python", 0, 0, "s", "Add two numbers.", "```\nx + y\n```"))
    with pytest.raises(UnusableAnswer, match=f"^{reason}$"):
        cleaner.check(OssInstructRow("python", 1, 1, "t", problem, solution))


def scripted(body: Body) -> Scripted:
    """A function of the lines shown: most answers are good, some truncated, some repeat an earlier one."""
    (lines,) = re.findall(r"Lines:\n```\n(.*?)\n```", body["messages"][1]["content"], re.DOTALL)
    mark = int(hashlib.sha256(lines.encode()).hexdigest(), 16)
    text = f"[Problem Description]\nReturn {mark}.\n[Solution]\n```python\nprint({mark} + 0)\n```"
    if mark % 7 == 0:
        return Scripted(text=text[:60], finish_reason="length")
    if mark % 7 == 1:
        return Scripted(text="[Problem Description]\nAgain.\n[Solution]\nIt stays as it is.")
    return Scripted(text=text)


@pytest.mark.slow
def test_a_spent_budget_ends_cleanly_and_the_same_command_finishes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "source.jsonl", [{"content": document(n)} for n in range(60)])
    command = ["data", "oss-instruct", f"Python={source}", "--quota", "python=40", "--model", "tiny"]

    def run(folder: str, *more: str) -> int:
        return cli.main([*command, "--out", str(tmp_path / folder), "--endpoint", server.url, *more])

    with ScriptedServer(scripted) as server:
        assert run("whole") == 0
        assert len(server.requests) == 40
        assert run("parts", "--max-total-tokens", "2000", "--concurrency", "1") == 1
        assert re.search(r"stopped: the token budget is spent: .*; \d+ seeds left\.", capsys.readouterr().out)
        assert 0 < len(read_rows(tmp_path / "parts" / "oss_instruct.jsonl")) < 20
        assert run("parts") == 0
        assert len(server.requests) == 80
        assert run("parts") == 0
        assert len(server.requests) == 80
    for name in ("oss_instruct.jsonl", "rejected.jsonl", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    rows, rejected = (read_rows(tmp_path / "whole" / f"{name}.jsonl") for name in ("oss_instruct", "rejected"))
    assert len(rows) + len(rejected) == 40
    assert {row["reason"] for row in rejected} == {"answer truncated", "duplicate problem"}
    assert all(row.keys() == {"lang", "raw_index", "index", "seed", "problem", "solution"} for row in rows)
    assert {parse_record(row).kind for row in rows} == {"generation"}
    report = json.loads((tmp_path / "whole" / "report.json").read_bytes())
    assert report["python"]["kept"] == len(rows)
    assert sum(report["python"].values()) == 40


def ended(folder: Path, url: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """Exit code and last line of a run over five documents."""
    source = write_rows(folder / "source.jsonl", [{"content": document(n)} for n in range(5)])
    words = ["data", "oss-instruct", f"python={source}", "--quota", "python=5", "--model", "tiny", "--endpoint", url]
    code = cli.main([*words, "--out", str(folder / "out"), "--attempts", "1", "--retry-pause", "0", *more])
    return code, capsys.readouterr().out.splitlines()[-1]


def test_a_run_that_made_nothing_or_not_all_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ended(tmp_path, "http://127.0.0.1:1/v1", capsys)
    assert (code, "5 seeds left. All that was begun is saved; the same command resumes." in line) == (1, True)
    with ScriptedServer(lambda body: Scripted(text="no headings")) as server:
        code, line = ended(tmp_path, server.url, capsys)
        assert (code, line) == (1, "nothing was made: all seeds were tried and none gave a sample")
    with ScriptedServer(lambda body: Scripted(text="half \ud800 of a pair")) as server:
        code, line = ended(tmp_path, server.url, capsys, "--seed", "1")
    assert code == 1
    assert "not Unicode" in (tmp_path / "out" / "report.json").read_text()
    with ScriptedServer(lambda body: Scripted(text="") if "value_1_" in str(body) else scripted(body)) as server:
        # A model that says nothing about a seed has had its say.
        assert ended(tmp_path, server.url, capsys, "--seed", "2")[0] == 0
    assert "request failed: empty" in (tmp_path / "out" / "report.json").read_text()


@pytest.mark.slow
def test_a_hostile_server_ends_a_run_with_1_and_a_sound_one_finishes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt is in the journal, and neither files nor output hold the key or a control character."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    names = [name for name, behaviour in BEHAVIOURS.items() if behaviour.outcome != "timeout"]
    rows = [{"content": f"behaviour = {number}\n"} for number in range(len(names))]
    source = write_rows(tmp_path / "source.jsonl", rows)
    sound = False

    def behaviour(body: Body) -> Behaviour:
        (number,) = re.findall(r"behaviour = (\d+)\n", body["messages"][1]["content"])
        answer = f"[Problem Description]\nReturn {number}.\n[Solution]\nprint({number} + 0)"
        return Behaviour("ok", sends(response(chat(answer)))) if sound else BEHAVIOURS[names[int(number)]]

    with HostileServer(behaviour).running() as server:
        words = ["data", "oss-instruct", f"python={source}", "--quota", "python=999", "--model", "tiny"]
        words += ["--out", str(tmp_path / "out"), "--endpoint", server.url, "--attempts", "1", "--retry-pause", "0"]
        codes = [cli.main(words)]
        # A run ends early when many in a row fail; the same command resumes with those that are left.
        codes += [cli.main(words) for _ in range(4)]
        sound = True
        codes.append(cli.main(words))
    shown = capsys.readouterr()
    assert set(codes[:-1]) <= {1, 2}
    assert codes[-1] == 0
    attempts = read_rows(tmp_path / "out" / "attempts.jsonl")
    assert len(attempts) == len(server.requests)
    assert len({attempt["outcome"] for attempt in attempts}) >= 5
    assert all(attempt["usage"]["completion_tokens"] >= 0 for attempt in attempts)
    texts = [shown.out, shown.err, *(path.read_text() for path in (tmp_path / "out").iterdir())]
    assert not [text for text in texts if KEY in text or KEY.replace('"', '\\"') in text]
    assert all(char.isprintable() or char == "\n" for char in shown.out + shown.err)
    assert "Traceback" not in shown.err
