"""Requests to a model, the content hash by which an answer is found again, and one attempt to ask over HTTP.

The hash covers the problem, the stage, the template, the model, the sampling and the text sent, so that a change of any
of them asks anew and nothing else does: not the endpoint's address, prices, limits or the order of problems. Whatever
the server does is classified as an ``AttemptFailed``. Only the exchange itself, which is the library's work, stands
behind a boundary that catches every exception: a fault of ours before or behind it surfaces.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.cookiejar
import json
import math
import urllib.parse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from string import Template
from typing import Any

from typing_extensions import assert_never

from reflectron.engine.files import one_line, printable
from reflectron.tools.llm.reply import HIDDEN, AttemptFailed, Protocol, Received, Reply, Secrets, read_reply

NO_KEY = "none"
"""The key that is sent to servers that ask for none."""
MOST_BYTES = 16 << 20
"""Longest body of a reply, both as it travels and decompressed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the model."""

    problem: str
    """The problem asked about: a content hash, or an id that stands for one content."""
    stage: str
    """Part of the pipeline, such as ``reflect`` or ``answer``; statistics are kept by it."""
    template: str
    """``PromptTemplate.fingerprint`` of all templates that the prompt is made from."""
    input: tuple[Mapping[str, str], ...] | str
    """Messages (role, content) for ``/chat/completions``, or a raw prompt for ``/completions``."""
    sample: int = 0
    """Number of the answer where several are drawn for the same question."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends."""

    @property
    def protocol(self) -> Protocol:
        """The interface that is asked."""
        return "completions" if isinstance(self.input, str) else "chat"

    def key(self, model: str, sampling: Sampling) -> str:
        """Return the content hash of all that determines the answer's distribution."""
        return content_hash([asdict(self), model, asdict(sampling)])


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters of an answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048
    """Longest answer in tokens."""
    seed: int = 0
    """Seed of the run; each request gets its own, made from it and the request's hash."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request's body that a server knows, such as vLLM's ``skip_special_tokens``; null removes
    one that is sent otherwise."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}, expected above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}, expected at least 1")

    @property
    def most_tokens(self) -> int:
        """The most tokens that an answer may have, under whichever name the server is told."""
        named = [self.extra_body.get(name) for name in ("max_completion_tokens", "max_tokens")]
        return max((n for n in named if isinstance(n, int) and 0 < n < 1 << 30), default=self.max_tokens)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with ``$places``."""

    name: str
    """Name and version of the template, such as ``reflect-system-1``."""
    text: str

    @cached_property
    def fingerprint(self) -> str:
        """``name:hash``; a changed text changes it."""
        return f"{self.name}:{content_hash([self.name, self.text])[:16]}"

    def fill(self, **values: str) -> str:
        """Return the prompt; values may hold dollar signs.

        Raises:
            KeyError: when a place gets no value.
        """
        return Template(self.text).substitute(values)


def content_hash(value: object) -> str:
    """Return the SHA-256, in hexadecimal, of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seed_of(key: str, answered: int) -> int:
    """Return the seed of a request, 31 bits: the same for every retry until an answer had to be thrown away.

    Args:
        answered: answers to this request that were of no use.
    """
    return int(content_hash([key, answered])[:16], 16) % (1 << 31)


class Endpoint:
    """A server with the interface of OpenAI's.

    Args:
        base_url: up to and with ``/v1``.
        api_key: ``NO_KEY`` where there is none.
        timeout: longest attempt in seconds, from sending to the last byte.
        connections: most requests at a time.

    Raises:
        ValueError: when no request could be sent with these.
    """

    def __init__(self, base_url: str, model: str, api_key: str, timeout: float, connections: int) -> None:
        import openai

        self.model, self.timeout = model, timeout
        self._base = _checked_url(base_url)
        self.secrets = Secrets([*([] if api_key == NO_KEY else [api_key]), *secrets_of_url(base_url)])
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        # A connection serves one request: an idle one may be closed just when the next leaves, which nobody could tell
        # from a request that was lost after it was paid for. Only what decompresses within a limit is asked for.
        self._headers |= {"Accept-Encoding": "gzip, deflate", "Authorization": _authorization(self._base, api_key)}
        # openai's own class: the HTTP library beneath is httpx in some of its versions and httpx2 in others. Redirects
        # are not followed, because the key and the prompt would follow; a server's cookies are not kept.
        self._http: Any = openai.DefaultAsyncHttpxClient(
            follow_redirects=False,
            timeout=None,
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        )
        self._room = asyncio.Semaphore(connections)

    async def attempt(self, request: Request, sampling: Sampling, seed: int) -> Reply:
        """Ask once.

        Raises:
            AttemptFailed: when there is no answer.
        """
        body = json.dumps(_arguments(request, sampling, seed) | {"model": self.model}).encode()
        sent = _Sent()
        message = self._http.build_request(
            "POST",
            self._url(_path(request.protocol)),
            content=body,
            headers=self._headers,
            extensions={"trace": sent.note},
        )
        async with self._room:
            received = await self._exchange(message, sent)
        return read_reply(received, request.protocol, MOST_BYTES, self.secrets)

    def _url(self, path: str) -> str:
        base = self._base
        host = base.netloc.rpartition("@")[2]
        return urllib.parse.urlunsplit((base.scheme, host, base.path.rstrip("/") + path, base.query, ""))

    async def _exchange(self, message: Any, sent: _Sent) -> Received:
        """Turn whatever the library raises between the first byte and the last into the server's failure."""
        try:
            return await asyncio.wait_for(self._receive(message), self.timeout)
        except asyncio.TimeoutError:
            raise AttemptFailed("timeout", f"no answer within {self.timeout:g} s", reached=sent.begun) from None
        except Exception as error:
            text = printable(self.secrets.hide(one_line(error.__cause__ or error)))
            raise AttemptFailed("connection", text, reached=sent.begun) from None

    async def _receive(self, message: Any) -> Received:
        response = await self._http.send(message, stream=True)
        try:
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MOST_BYTES:
                    break
            return Received(response.status_code, dict(response.headers), bytes(body))
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def shown_url(url: str) -> str:
    """Return an address as it may be shown: with ``<api key>`` for user, password and values of the query."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "an address that cannot be read"
    userinfo, at, host = parts.netloc.rpartition("@")
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={HIDDEN}" if equals else HIDDEN for name, equals, _ in pairs)
    return urllib.parse.urlunsplit((parts.scheme, f"{HIDDEN if userinfo else ''}{at}{host}", parts.path, query, ""))


def secrets_of_url(url: str) -> list[str]:
    """Return what an address says to its server alone: user, password and the values of its query."""
    parts = urllib.parse.urlsplit(url)
    userinfo, _, _ = parts.netloc.rpartition("@")
    found = [*userinfo.split(":", 1), *(pair.partition("=")[2] for pair in parts.query.split("&"))]
    return [word for raw in found for word in (raw, urllib.parse.unquote(raw)) if word]


@dataclass
class _Sent:
    """Notes how far an exchange came."""

    begun: bool = False
    """The request, or a part of it, has left: the model may have written something."""

    async def note(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by the library before and after each of its steps."""
        self.begun = self.begun or "send_request_headers" in event


def _path(protocol: Protocol) -> str:
    if protocol == "chat":
        return "/chat/completions"
    if protocol == "completions":
        return "/completions"
    assert_never(protocol)


def _checked_url(url: str) -> urllib.parse.SplitResult:
    expected = "expected http:// or https:// and a host, up to and with /v1"
    try:
        parts = urllib.parse.urlsplit(url)
        # The port is read when asked for.
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        sound = sound and url.isprintable() and " " not in url and (parts.hostname or "").encode("idna") != b""
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"--endpoint is {printable(shown_url(url))}, {expected}")
    return parts


def _authorization(base: urllib.parse.SplitResult, api_key: str) -> str:
    """Return the header's value; a user in the address wins over the key."""
    if not (api_key.isascii() and api_key.isprintable()) or api_key != api_key.strip():
        raise ValueError("the API key holds a blank, a line break or a letter beyond ASCII, expected none of them")
    userinfo = base.netloc.rpartition("@")[0]
    if not userinfo:
        return f"Bearer {api_key}"
    return "Basic " + base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()


def _arguments(request: Request, sampling: Sampling, seed: int) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": seed,
    }
    if request.stop:
        asked["stop"] = list(request.stop)
    if isinstance(request.input, str):
        asked["prompt"] = request.input
    else:
        asked["messages"] = [dict(message) for message in request.input]
    extra = sampling.extra_body
    kept = {name: value for name, value in asked.items() if name not in extra}
    return kept | {name: value for name, value in extra.items() if value is not None}
