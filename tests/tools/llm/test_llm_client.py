"""The client against a scripted server: what is retried, recorded, resumed, and what ends a run."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.files import require
from reflectron.tools.llm.client import LlmClient, ModelAnswer, RequestFailed, Retries, SpendingLimits
from reflectron.tools.llm.request import Endpoint, PromptTemplate, Request, Sampling
from reflectron.tools.llm.scripted_server import Scripted, ScriptedServer
from reflectron.tools.llm.work import ATTEMPTS, Journal, RunStopped, Stop, for_each

OK = Scripted(text="forty-two")


def question(text: str = "What is it?", **more: Any) -> Request:
    return Request(problem=text, stage="ask", template="t", input=({"role": "user", "content": text},), **more)


def in_order(*replies: Scripted) -> Callable[[dict[str, Any]], Scripted]:
    """Each request gets the next reply; the last one stays."""
    left = list(replies)
    lock = threading.Lock()

    def script(body: dict[str, Any]) -> Scripted:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return script


def ask(
    folder: Path,
    server: ScriptedServer,
    requests: Sequence[Request],
    *,
    sampling: Sampling | None = None,
    limits: SpendingLimits | None = None,
    retries: Retries | None = None,
    timeout: float = 30.0,
    at_a_time: int = 1,
    count: Callable[[str], int] | None = None,
) -> tuple[list[ModelAnswer | str], LlmClient, Stop]:
    """Answers, or the failure's kind; in the order of ``requests``, as far as the run came."""
    answers: dict[int, ModelAnswer | str] = {}

    async def run() -> tuple[LlmClient, Stop]:
        stop = Stop()
        client = LlmClient(
            folder,
            Endpoint(server.url, "tiny", "none", timeout, 8),
            sampling or Sampling(),
            limits=limits or SpendingLimits(),
            retries=retries or Retries(first_pause=0.001),
            stop=stop,
            count=count,
        )

        async def one(item: tuple[int, Request]) -> None:
            try:
                answers[item[0]] = await client.ask(item[1])
            except RequestFailed as failure:
                answers[item[0]] = failure.kind

        async with client:
            await for_each(enumerate(requests), one, at_a_time=at_a_time, stop=stop)
        return client, stop

    client, stop = asyncio.run(run())
    return [answers[i] for i in sorted(answers)], client, stop


def attempts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ATTEMPTS).read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Scripted(status=500), "server error"),
        (Scripted(status=429, headers={"Retry-After": "0"}), "rate limited"),
        (Scripted(raw=b'{"choices": [{"mess'), "bad json"),
        (Scripted(raw=b"<html>busy</html>", headers={"Content-Type": "text/html"}), "bad json"),
        (Scripted(raw=b"\xff\xfe"), "bad json"),
        (Scripted(raw=b'{"choices": []}'), "bad json"),
        (Scripted(raw=b"null"), "bad json"),
        (Scripted(text="x" * 1000, cut=True), "connection"),
        (Scripted(text=None, finish_reason="tool_calls"), "empty"),
        (Scripted(text=" \n"), "empty"),
    ],
)
def test_a_fault_is_recorded_and_asked_again(tmp_path: Path, fault: Scripted, outcome: str) -> None:
    with ScriptedServer(in_order(fault, fault, OK)) as server:
        answers, client, stop = ask(tmp_path, server, [question()])
    assert answers == [ModelAnswer("forty-two", "stop", "ok")]
    assert [record["outcome"] for record in attempts(tmp_path)] == [outcome, outcome, "ok"]
    assert [record["attempt"] for record in attempts(tmp_path)] == [1, 2, 3]
    assert client.outcomes == {("ask", outcome): 2, ("ask", "ok"): 1}
    assert stop.reason is None
    # A retry asks the same, unless the answer itself was of no use.
    seeds = [body["seed"] for body in server.requests]
    assert len(set(seeds)) == (3 if outcome == "empty" else 1)


def test_a_hanging_server_is_a_timeout(tmp_path: Path) -> None:
    with ScriptedServer(in_order(Scripted(hang=True), OK)) as server:
        answers, _, _ = ask(
            tmp_path, server, [question()], timeout=0.3, retries=Retries(attempts=50, first_pause=0.001)
        )
    assert answers == [ModelAnswer("forty-two", "stop", "ok")]
    *failed, last = [record["outcome"] for record in attempts(tmp_path)]
    # More than one on a machine that is too busy to answer in time.
    assert set(failed) == {"timeout"}
    assert last == "ok"


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    limited = Scripted(status=429, headers={"Retry-After": "0.3"})
    with ScriptedServer(in_order(limited, OK)) as server:
        ask(tmp_path, server, [question()])
    first, second = attempts(tmp_path)
    assert second["started"] - first["started"] >= 0.3


def test_a_bad_request_is_not_asked_again(tmp_path: Path) -> None:
    with ScriptedServer(in_order(Scripted(status=400), OK)) as server:
        answers, _, _ = ask(tmp_path, server, [question("a"), question("b")])
    assert answers == ["bad request", ModelAnswer("forty-two", "stop", "ok")]
    assert "scripted 400" in attempts(tmp_path)[0]["error"]


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refused_key_or_model_ends_the_run(tmp_path: Path, status: int) -> None:
    with (
        ScriptedServer(in_order(Scripted(status=status))) as server,
        pytest.raises(ValueError, match=f"refused 3 requests in a row, .*HTTP {status}"),
    ):
        ask(tmp_path, server, [question(str(i)) for i in range(9)])
    outcome = "not found" if status == 404 else "not authorised"
    assert [record["outcome"] for record in attempts(tmp_path)] == [outcome] * 3


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_one_refusal_fails_its_request_only(tmp_path: Path, status: int) -> None:
    refused = Scripted(status=status)
    with ScriptedServer(in_order(refused, refused, OK, refused, refused, OK)) as server:
        answers, _, stop = ask(tmp_path, server, [question(str(i)) for i in range(6)])
    outcome = "not found" if status in (404, 307) else "not authorised"
    assert [answer if isinstance(answer, str) else answer.text for answer in answers] == 2 * [outcome, outcome, OK.text]
    assert stop.reason is None


def test_requests_that_are_all_bad_stop_the_run(tmp_path: Path) -> None:
    with ScriptedServer(in_order(Scripted(status=400))) as server:
        answers, _, stop = ask(tmp_path, server, [question(str(i)) for i in range(30)])
    assert answers == ["bad request"] * 10
    assert str(stop.reason).startswith("10 requests failed in a row, the last with bad request: HTTP 400")
    # Behind an answer they are each the fault of their own prompt.
    with ScriptedServer(in_order(OK, Scripted(status=400))) as server:
        answers, _, stop = ask(tmp_path / "more", server, [question(str(i)) for i in range(30)])
    assert (len(answers), stop.reason) == (30, None)


def test_no_quota_ends_the_run(tmp_path: Path) -> None:
    spent = Scripted(status=429, raw=b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    with ScriptedServer(in_order(spent)) as server, pytest.raises(ValueError, match="insufficient_quota"):
        ask(tmp_path, server, [question(str(i)) for i in range(3)])


def test_a_server_that_is_down_stops_the_run(tmp_path: Path) -> None:
    retries = Retries(attempts=2, first_pause=0.001, failures_in_a_row=3)
    with ScriptedServer(in_order(Scripted(status=503))) as server:
        answers, _, stop = ask(tmp_path, server, [question(str(i)) for i in range(9)], retries=retries)
    assert answers == ["server error"] * 3
    assert stop.reason is not None
    assert stop.reason.startswith("3 requests failed in a row, the last with server error: HTTP 503")
    assert len(attempts(tmp_path)) == 6


def test_truncated_and_filtered_answers_are_named(tmp_path: Path) -> None:
    cut, withheld = Scripted(text="forty", finish_reason="length"), Scripted(text="f", finish_reason="content_filter")
    with ScriptedServer(in_order(cut, withheld)) as server:
        answers, _, _ = ask(tmp_path, server, [question("a"), question("b")])
    assert [answer.outcome for answer in answers if isinstance(answer, ModelAnswer)] == ["truncated", "filtered"]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    requests = [question(str(i % 3)) for i in range(6)]
    with ScriptedServer(in_order(OK)) as server:
        first, _, _ = ask(tmp_path, server, requests)
        second, client, _ = ask(tmp_path, server, requests, at_a_time=3)
        assert len(server.requests) == 3
        assert client.requests_sent == 0
        assert first == second
        # Whatever the answer depends on asks anew.
        ask(tmp_path, server, requests[:1], sampling=Sampling(temperature=0.5))
        ask(tmp_path, server, [question("0", sample=1)])
    assert len(server.requests) == 5


def test_what_is_sent(tmp_path: Path) -> None:
    extra = {"max_tokens": None, "max_completion_tokens": 7, "top_k": 5}
    raw = Request(problem="p", stage="ask", template="t", input="once upon", stop=("end",))
    with ScriptedServer(in_order(OK)) as server:
        ask(tmp_path, server, [question(), raw], sampling=Sampling(temperature=0.5, extra_body=extra))
    chat, completion = server.requests
    assert chat["messages"] == [{"role": "user", "content": "What is it?"}]
    assert (completion["prompt"], completion["stop"]) == ("once upon", ["end"])
    sent = {"model": "tiny", "temperature": 0.5, "top_p": 1.0, "max_completion_tokens": 7, "top_k": 5}
    for body in (chat, completion):
        assert {name: body[name] for name in sent} == sent
        assert "max_tokens" not in body


def test_missing_usage_is_counted_or_estimated(tmp_path: Path) -> None:
    silent = Scripted(text="one two three", usage=False)
    with ScriptedServer(in_order(silent)) as server:
        _, client, _ = ask(tmp_path, server, [question("a b")])
        _, counted, _ = ask(tmp_path, server, [question("a b c")], count=lambda text: len(text.split()))
    sources = [record["usage"]["source"] for record in attempts(tmp_path)]
    assert sources == ["estimate", "tokenizer"]
    assert client.budget.tokens == round(3 / 3.5) + round(13 / 3.5)
    assert counted.budget.tokens == client.budget.tokens + 6


def test_a_real_tokenizer_counts_any_answer(tmp_path: Path, golden_dir: Path) -> None:
    tokenizer = load_tokenizer(str(golden_dir / "llama_after"), "reflection")
    for number, text in enumerate(("half \ud800", "\x00\x1b[2J", "<|user|></s>", "\udcff" * 100)):
        with ScriptedServer(in_order(Scripted(text=text, usage=False))) as server:
            answers, client, _ = ask(
                tmp_path / str(number), server, [question()], count=lambda text: len(tokenizer.encode(text))
            )
        assert answers == [ModelAnswer(text, "stop", "ok")]
        assert client.budget.tokens > 0


def test_a_spent_budget_stops_cleanly_and_holds_over_runs(tmp_path: Path) -> None:
    limits = SpendingLimits(max_cost=5e-5, price_input=1.0, price_output=10.0)
    requests = [question(f"question {i}") for i in range(9)]
    with ScriptedServer(in_order(Scripted(text="an answer"))) as server:
        answers, client, stop = ask(tmp_path, server, requests, limits=limits)
        # An answer costs 2 + 20 millionths: the third request is begun with 44 of 50 spent.
        assert len(answers) == 3
        assert client.budget.cost == pytest.approx(66e-6)
        assert stop.reason == "the money budget is spent: 6.6e-05 of 5e-05 (--max-cost)"
        again, _, _ = ask(tmp_path, server, requests, limits=limits)
    assert again == answers
    assert len(server.requests) == 3


def test_what_is_under_way_finishes(tmp_path: Path) -> None:
    arrived = threading.Barrier(4)

    def script(body: dict[str, Any]) -> Scripted:
        arrived.wait(30)
        return OK

    with ScriptedServer(script) as server:
        answers, client, stop = ask(
            tmp_path,
            server,
            [question(str(i)) for i in range(40)],
            limits=SpendingLimits(max_total_tokens=1),
            at_a_time=4,
        )
    assert len(answers) == len(attempts(tmp_path)) == 4
    assert client.budget.tokens == 8
    assert str(stop.reason).startswith("the token budget is spent: ")


def test_stop_wakes_a_pause() -> None:
    async def run() -> None:
        stop = Stop()
        waiting = asyncio.create_task(stop.sleep(3600))
        await asyncio.sleep(0)
        stop.request("enough")
        with pytest.raises(RunStopped):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops(signum: signal.Signals) -> None:
    async def run() -> None:
        stop = Stop()
        with stop.on_signals():
            os.kill(os.getpid(), signum)
            with pytest.raises(RunStopped):
                await stop.sleep(60)
        assert stop.reason == f"{signum.name} received"

    asyncio.run(run())


def test_an_error_of_the_work_ends_the_run() -> None:
    async def work(item: int) -> None:
        if item == 2:
            raise ValueError("two")
        done.append(item)

    done: list[int] = []
    with pytest.raises(ValueError, match="two"):
        asyncio.run(_for_each(range(9), work))
    assert done == [0, 1]


async def _for_each(items: range, work: Any) -> None:
    await for_each(items, work, at_a_time=1, stop=Stop())


@pytest.mark.parametrize("torn", [b'{"key": 3, "te', b"x" * 200_000, b""])
def test_a_torn_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": 1}\n{"key": 2}\n' + torn)
    with Journal(path) as journal:
        assert journal.cut_bytes == len(torn)
        assert [record["key"] for _, record in journal.records()] == [1, 2]
        offset = asyncio.run(journal.append({"key": "\ud800"}))
        assert journal.read(offset) == {"key": "\ud800"}
    assert len(path.read_bytes().splitlines()) == 3


def test_a_record_that_finds_no_room_leaves_no_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        asyncio.run(journal.append({"key": 1}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.size + 100, limits[1]))
        try:
            with pytest.raises(OSError, match=r"journal\.jsonl"):
                asyncio.run(journal.append({"key": "x" * 1000}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        offset = asyncio.run(journal.append({"key": 2}))
        assert journal.read(offset) == {"key": 2}
        assert [record["key"] for _, record in journal.records()] == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": 1}\n{"ke\n{"key": 3}\n')
    with Journal(path) as journal, pytest.raises(ValueError, match="line 2 is not a JSON object"):
        list(journal.records())


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl"), pytest.raises(ValueError, match="is in use by process"):
        Journal(tmp_path / "a.jsonl")


def test_a_template_has_a_fingerprint() -> None:
    template = PromptTemplate("greeting-1", "Hello $name!")
    assert template.fill(name="$x") == "Hello $x!"
    assert template.fingerprint != PromptTemplate("greeting-1", "Hello $name.").fingerprint
    with pytest.raises(KeyError):
        template.fill()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match=r"no_such_package is not installed: pip install 'reflectron\[data\]'"):
        require("json", "no_such_package")
