"""Whatever a server does to an attempt, it is recorded with its class and a finite usage, and the key is nowhere."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import math
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools.llm.client import LlmClient, RequestFailed, Retries, SpendingLimits
from reflectron.tools.llm.reply import AttemptFailed, Received, Reply, Secrets, read_reply
from reflectron.tools.llm.request import Endpoint, Request, Sampling
from reflectron.tools.llm.work import ATTEMPTS, Stop, for_each
from testkit.hostile_server import ANSI, BEHAVIOURS, KEY, RETRY_AFTER, HostileServer, chat, named, spellings, usage

LIMITS = SpendingLimits(price_input=1.0, price_output=2.0)
PATIENT, SHORT = 60.0, 0.3


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer(named).running() as running:
        yield running


def ask(
    folder: Path,
    url: str,
    names: Iterable[str],
    *,
    attempts: int = 1,
    timeout: float = PATIENT,
    limits: SpendingLimits = LIMITS,
) -> tuple[dict[str, str], LlmClient]:
    """Return the answer or failure of each request, as text, and who asked."""
    said: dict[str, str] = {}

    async def run() -> LlmClient:
        stop = Stop()
        retries = Retries(attempts=attempts, first_pause=1e-4, failures_in_a_row=1000, refusals_in_a_row=1000)
        endpoint = Endpoint(url, "tiny", KEY, timeout, 8)

        async def one(name: str) -> None:
            messages = ({"role": "user", "content": name},)
            try:
                said[name] = (await client.ask(Request(problem=name, stage="a", template="t", input=messages))).text
            except RequestFailed as failure:
                said[name] = str(failure)

        async with LlmClient(folder, endpoint, Sampling(), limits=limits, retries=retries, stop=stop) as client:
            await for_each(names, one, at_a_time=8, stop=stop)
        return client

    client = asyncio.run(run())
    return said, client


@dataclass(frozen=True)
class Played:
    """What the client made of all behaviours."""

    said: dict[str, str]
    records: dict[str, list[dict[str, Any]]]
    journals: str
    tokens: int
    seconds_of_pauses: float


@pytest.fixture(scope="module")
def played(server: HostileServer, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("played")
    hanging = [name for name, behaviour in BEHAVIOURS.items() if behaviour.outcome == "timeout"]
    others = [name for name in BEHAVIOURS if name not in hanging and name not in RETRY_AFTER]
    said, first = ask(folder / "hanging", server.url, hanging, timeout=SHORT)
    more, second = ask(folder / "others", server.url, others)
    began = time.monotonic()
    last, third = ask(folder / "again", server.url, RETRY_AFTER, attempts=2)
    seconds = time.monotonic() - began
    found: dict[str, list[dict[str, Any]]] = {}
    for part in ("hanging", "others", "again"):
        for record in records(folder / part):
            found.setdefault(record["problem"], []).append(record)
    text = "".join((folder / part / ATTEMPTS).read_text() for part in ("hanging", "others", "again"))
    tokens = sum(client.budget.tokens for client in (first, second, third))
    return Played(said | more | last, found, text, tokens, seconds)


def records(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / ATTEMPTS).read_text().splitlines()]


def holds_key(text: str) -> bool:
    """In any of the spellings that a server could have chosen."""
    readings = {text, urllib.parse.unquote_plus(text), urllib.parse.unquote(urllib.parse.unquote(text))}
    needles = {KEY.lower(), KEY.lower()[3:-1], KEY.encode().hex(), base64.b64encode(KEY.encode()).decode().lower()[:-4]}
    return any(needle in reading.lower() for reading in readings for needle in needles)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_an_attempt_is_recorded(played: Played, name: str) -> None:
    behaviour, said = BEHAVIOURS[name], played.said[name]
    assert len(played.records[name]) == (2 if name in RETRY_AFTER else 1)
    for record in played.records[name]:
        assert record["outcome"] == behaviour.outcome, record.get("error")
        # Usage is a number of tokens, whatever the server made of it, and is counted for failures too.
        counts = [record["usage"][part] for part in ("prompt_tokens", "completion_tokens")]
        assert all(type(count) is int and 0 <= count <= 2048 for count in counts)
        assert math.isclose(record["cost"], (counts[0] + 2 * counts[1]) / 1e6)
        assert not holds_key(json.dumps(record, ensure_ascii=False))
    if behaviour.outcome == "ok":
        assert record["text"] == said == behaviour.text
    else:
        assert said == record["error"]
        assert said.startswith(f"{behaviour.outcome}: ")
        assert said.isprintable()
        assert len(said) < 600


def test_all_together(played: Played) -> None:
    assert len(BEHAVIOURS) >= 130
    found = [record for name in BEHAVIOURS for record in played.records[name]]
    assert played.tokens == sum(r["usage"]["prompt_tokens"] + r["usage"]["completion_tokens"] for r in found)
    assert not holds_key(played.journals)
    # A ``Retry-After`` of any length is waited for 600 times the first pause at most.
    assert played.seconds_of_pauses < 20


def test_the_next_run_asks_for_nothing_that_it_holds(server: HostileServer, tmp_path: Path) -> None:
    names = [name for name, behaviour in BEHAVIOURS.items() if behaviour.outcome == "ok"]
    said, client = ask(tmp_path, server.url, names)
    again, later = ask(tmp_path, "http://127.0.0.1:1/v1", names)
    assert again == said
    assert later.requests_sent == 0
    assert later.budget.tokens == client.budget.tokens


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v1", "https://127.0.0.1:{port}/v1", "http://no-such-host.invalid/v1"]
)
def test_a_server_that_is_not_there_costs_nothing(server: HostileServer, tmp_path: Path, url: str) -> None:
    said, client = ask(tmp_path, url.format(port=server.port), ["sound"], attempts=2)
    assert said["sound"].startswith("connection: ")
    assert len(records(tmp_path)) == 2
    assert client.budget.tokens == 0


@pytest.mark.parametrize(("name", "written"), [("hangs", 2048), ("reset in the body", 2048), ("504", 2048), ("429", 0)])
def test_what_may_have_been_generated_is_estimated(played: Played, name: str, written: int) -> None:
    prompt = round(len(name) / 3.5) if written else 0
    (record,) = played.records[name]
    assert record["usage"] == {"prompt_tokens": prompt, "completion_tokens": written, "source": "estimate"}


def test_a_server_that_never_answers_ends_with_the_budget(server: HostileServer, tmp_path: Path) -> None:
    limits = SpendingLimits(max_total_tokens=10_000)
    said, client = ask(tmp_path, server.url, ["hangs"], attempts=50, timeout=0.05, limits=limits)
    assert said == {}
    assert str(client.stop.reason).startswith("the token budget is spent: ")
    assert len(records(tmp_path)) == math.ceil(10_000 / 2049)
    assert client.budget.tokens < 10_000 + 2049


def test_no_redirect_is_followed_and_no_cookie_kept(server: HostileServer, tmp_path: Path) -> None:
    names = ["cookies", "a redirect to itself", "sound"]
    server.requests.clear()
    for name in names:
        ask(tmp_path, server.url, [name])
    assert len(server.requests) == len(names)
    assert not any(b"\r\ncookie:" in request.lower() for request in server.requests)


@pytest.mark.parametrize("text", [KEY, f"Bearer {KEY}", f"https://x/?key={urllib.parse.quote(KEY)}", spellings(KEY)])
def test_the_key_is_replaced(text: str) -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "tiny", KEY, 1.0, 1)
    assert not holds_key(endpoint.secrets.hide(text))
    assert "<api key>" in endpoint.secrets.hide(text)


@pytest.mark.parametrize("piece", ["\\", "&amp;", "&#0", "%25", "\\u0073", KEY[:3], "\\" * 64 + "s"])
def test_a_text_made_of_escapes_is_looked_through_like_any_other(piece: str) -> None:
    secrets = Secrets([KEY, "a\\\\b/c-\\d"])

    def seconds(text: str) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            assert secrets.hide(text) == text
            best = min(best, time.perf_counter() - began)
        return best

    size = 1 << 16
    letters = seconds("x" * size)
    assert seconds(piece * (size // len(piece))) < 10 * letters
    # Four times the text may take four times as long, and not sixteen times.
    assert seconds(piece * (4 * size // len(piece))) < 40 * letters


@pytest.mark.parametrize("secret", [KEY, "a\\\\b/c-\\d", "p\\/", "\\" * 9])
def test_backslashes_belong_to_a_secret_or_escape_it(secret: str) -> None:
    secrets = Secrets([secret])
    slashed = secret.replace("/", "\\/")
    escaped = (slashed, json.dumps(secret)[1:-1], repr(secret)[1:-1], urllib.parse.quote(secret, safe=""))
    for spelling in (secret, *escaped):
        assert secrets.hide(f"<{spelling}>") == "<<api key>>"


def test_a_placeholder_may_be_a_word_of_an_answer() -> None:
    for key in ("none", "EMPTY"):
        secrets = Endpoint("http://127.0.0.1:1/v1", "tiny", key, 1.0, 1).secrets
        assert secrets.hide_in_answer("none is EMPTY") == "none is EMPTY"


def test_secrets_of_the_address_are_sent_and_never_shown(server: HostileServer, tmp_path: Path) -> None:
    url = server.url.replace("//", "//user:pass%2Fword1@") + "?api-key=geheimnis9"
    server.requests.clear()
    said, _ = ask(tmp_path, url, ["everything echoed"])
    (request,) = server.requests
    assert b"authorization: basic " + base64.b64encode(b"user:pass/word1").lower() in request.lower()
    assert b"/v1/chat/completions?api-key=geheimnis9 " in request
    for text in (said["everything echoed"], (tmp_path / ATTEMPTS).read_text()):
        assert not [word for word in ("geheimnis9", "pass/word1", "pass%2Fword1", "dXNlcj") if word in text]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://host/v1", "ftp://host/v1"),
        ("localhost:8000/v1", "localhost:8000/v1"),
        ("http:///v1", "http:///v1"),
        ("http://host:99999/v1", "http://host:99999/v1"),
        (f"ftp://u:{KEY.replace('/', '')}@host/v1?key=geheim", "ftp://<api key>@host/v1?key=<api key>"),
        ("http://[::1/v1", "an address that cannot be read"),
        ("http://ho\x1b0;a\x07st/v1", r"http://ho\x1b0;a\x07st/v1"),
        ("http://a..b/v1", "http://a..b/v1"),
        ("", ""),
    ],
)
def test_an_address_that_is_none(url: str, shown: str) -> None:
    with pytest.raises(ValueError, match=r"--endpoint is .*expected http") as caught:
        Endpoint(url, "tiny", KEY, 1.0, 1)
    assert str(caught.value).startswith(f"--endpoint is {shown}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["sk-1\nX-Evil: 1", " sk-1", "sk-\xfc", "sk-\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="the API key holds") as caught:
        Endpoint("http://127.0.0.1:1/v1", "tiny", key, 1.0, 1)
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("usage", [{"prompt_tokens": -5}, {"prompt_tokens": math.nan}, {"source": 3, "x": 1}, 7])
def test_a_journal_that_was_tampered_with_is_named(server: HostileServer, tmp_path: Path, usage: Any) -> None:
    ask(tmp_path, server.url, ["sound"])
    (record,) = records(tmp_path)
    record["usage"] = record["usage"] | usage if isinstance(usage, dict) else usage
    (tmp_path / ATTEMPTS).write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"attempts.jsonl: the line at byte 0 is no attempt"):
        ask(tmp_path, server.url, ["sound"])


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**400, math.inf, -math.inf, math.nan, "", "x", "\ud800", ANSI, "9" * 5000),
    *([], {}, [[]], [{}], [None], ["a"], {"content": 1}, {"0": {}}, {"": {"": []}}),
)


def test_a_field_may_be_anything() -> None:
    """Every value of a sound reply is replaced by every odd one: an answer or a failure with a name comes of it."""
    secrets = Secrets([KEY])
    outcomes: Counter[str] = Counter()
    replies = (("chat", chat()), ("completions", {"choices": [{"text": "a"}], "usage": usage(3, 2)}))
    for protocol, sound in replies:
        for path, odd in itertools.product(paths(sound), ODD):
            body = json.dumps(replaced(sound, path, odd)).encode()
            try:
                read: Reply | AttemptFailed = read_reply(Received(200, {}, body), protocol, 1 << 20, secrets)
            except AttemptFailed as failure:
                read = failure
            outcomes["reply" if isinstance(read, Reply) else read.kind] += 1
            assert read.usage is None or all(type(count) is int and count >= 0 for count in read.usage)
            if isinstance(read, Reply):
                assert isinstance(read.text, str)
                assert isinstance(read.finish_reason, str | None)
            else:
                assert str(read).isprintable()
    assert set(outcomes) == {"reply", "bad json", "empty"}
    assert outcomes.total() > 400


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from paths(item, (*at, name))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy
