"""Answers of a server: what is sent, what is kept when it fails, and how the command says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools.cli import main
from reflectron.tools.eval.backends import Decoding, EndpointBackend, GeneratedAnswer, Prompt, Unanswered
from reflectron.tools.llm.scripted_server import Body, Scripted, ScriptedServer
from reflectron.tools.sandbox.wall import SandboxKind
from testkit.hostile_server import BEHAVIOURS, KEY, HostileServer, named

TASK = {"entry_point": "f", "canonical_solution": "", "base_input": [], "plus_input": [], "atol": 0}
GREEDY = Decoding(max_new_tokens=12, stop=("end",))


def complete(
    url: str, prompts: Sequence[str], decoding: Decoding = GREEDY, *, chat: bool = True
) -> list[GeneratedAnswer]:
    backend = EndpointBackend(url, "tiny", chat=chat, body={"top_k": 3}, first_pause=1e-4)
    return backend.complete([Prompt(text, 7) for text in prompts], decoding)


@pytest.mark.parametrize("chat", [True, False])
def test_what_is_sent_and_read(chat: bool) -> None:
    with ScriptedServer(lambda body: Scripted(text="a b end c", finish_reason="length")) as server:
        assert complete(server.url, ["x"], chat=chat) == [GeneratedAnswer("a b ", 4, "length")]
        assert complete(server.url, ["x"], Decoding(temperature=0.5), chat=chat) == [
            GeneratedAnswer("a b end c", 4, "length")
        ]
    greedy, sampled = server.requests
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    assert greedy == {"model": "tiny", "temperature": 0.0, "max_tokens": 12, "stop": ["end"], "top_k": 3, **asked}
    assert (sampled["seed"], sampled["top_p"], sampled["temperature"]) == (7, 1.0, 0.5)


def test_an_empty_answer_is_an_answer() -> None:
    with ScriptedServer(lambda body: Scripted(text=None)) as server:
        assert complete(server.url, ["x"]) == [GeneratedAnswer("", 0, "stop")]
    assert len(server.requests) == 1


def test_answers_beside_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    names = ["sound", "400", "everything echoed", "gzip", "usage negative"]
    with HostileServer(named).running() as server, pytest.raises(Unanswered) as caught:
        complete(server.url, names)
    sound = [name for name in names if BEHAVIOURS[name].outcome == "ok"]
    assert [answer is not None for answer in caught.value.answers] == [name in sound for name in names]
    assert str(caught.value).startswith("2 of 5 requests failed, the last with bad request: HTTP 400")
    assert KEY not in str(caught.value)


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], list[str]]:
    problems = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", **TASK} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    words = f"--dataset humaneval --data {tmp_path / 'problems.jsonl'} --model tiny --prompt chat --batch-size 2"
    return lambda url: [*words.split(), "--backend", "endpoint", "--endpoint", url]


def test_a_server_that_fails_ends_with_1_and_the_same_command_resumes(
    command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    well = 3

    def script(body: Body) -> Scripted:
        nonlocal well
        well -= 1
        return Scripted(text="pass") if well >= 0 else Scripted(status=403)

    out = tmp_path / "out.jsonl"
    with ScriptedServer(script) as server:
        words = ["eval", "generate", "--out", str(out), *command(server.url)]
        assert main(words) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("stopped: 1 of 2 requests failed, the last with not authorised: HTTP 403")
        assert shown.endswith("the same command resumes.\n")
        assert len(out.read_text().splitlines()) == 3
        well = 1
        assert main(words) == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["task_id"] for row in rows) == [f"HumanEval/{i}" for i in range(4)]


def test_eval_run_ends_with_1_too(
    sandbox: SandboxKind, command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(lambda body: Scripted(status=401)) as server:
        assert main(["eval", "run", "--out", str(tmp_path / "run"), *command(server.url)]) == 1
    assert "stopped: 2 of 2 requests failed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "score.json").exists()


def test_the_secrets_of_an_address_are_not_recorded(
    command: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedServer(lambda body: Scripted(status=400)) as server:
        url = server.url.replace("//", "//user:geheimnis@") + "?api-key=verborgen"
        assert main(["eval", "generate", "--out", str(tmp_path / "out.jsonl"), *command(url)]) == 1
    shown = capsys.readouterr()
    texts = [shown.out, shown.err, *(path.read_text() for path in tmp_path.iterdir())]
    assert not [text for text in texts if "geheimnis" in text or "verborgen" in text]


def test_an_answer_comes_back_as_it_was_written(command: Callable[[str], list[str]], tmp_path: Path) -> None:
    answer = "half \ud800 a pair\x00\x1b[2J\u2028\x85end"
    with ScriptedServer(lambda body: Scripted(text=answer)) as server:
        assert main(["eval", "generate", "--out", str(tmp_path / "out.jsonl"), *command(server.url)]) == 0
        asked = len(server.requests)
        assert main(["eval", "generate", "--out", str(tmp_path / "out.jsonl"), *command(server.url)]) == 0
        assert len(server.requests) == asked == 4
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n") if line]
    assert [row["raw"] for row in rows] == [answer] * 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--endpoint-body", "[1]"], "--endpoint-body is [1], expected a JSON object"),
        (["--endpoint-body", '{"x": NaN}'], "expected a JSON object (ValueError: NaN is not JSON)"),
        (["--endpoint", "localhost:8000"], "--endpoint is localhost:8000, expected http"),
    ],
)
def test_mistakes(
    command: Callable[[str], list[str]], tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "generate", "--out", str(tmp_path / "o.jsonl"), *command("http://x/v1"), *words]) == 2
    assert said in capsys.readouterr().err
