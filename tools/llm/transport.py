"""One attempt over HTTP: a request goes out, a reply comes back or a failure that has a name.

Whatever the server does is classified, never raised as something unforeseen. Only the exchange itself, which is the
library's work, stands behind a boundary that catches every exception: a fault of ours before or behind it surfaces.
"""

from __future__ import annotations

import asyncio
import base64
import http.cookiejar
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reflectron.engine.text import one_line, printable
from reflectron.tools.llm.reply import AttemptFailed, Received, Reply, read_reply
from reflectron.tools.llm.request import Request, Sampling
from reflectron.tools.llm.secrets import Secrets, secrets_of_url, shown_url

NO_KEY = "none"
"""Sent as the key to servers that ask for none."""
MOST_BYTES = 16 << 20
"""Of a reply's body, both as it travels and decompressed."""


@dataclass
class _Sent:
    """How far an exchange came."""

    begun: bool = False
    """The request, or a part of it, has left: the model may have written something."""

    async def note(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by the library before and after each of its steps."""
        self.begun = self.begun or "send_request_headers" in event


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
        path = "/chat/completions" if request.protocol == "chat" else "/completions"
        message = self._http.build_request(
            "POST", self._url(path), content=body, headers=self._headers, extensions={"trace": sent.note}
        )
        async with self._room:
            received = await self._exchange(message, sent)
        return read_reply(received, request.protocol, MOST_BYTES, self.secrets)

    def _url(self, path: str) -> str:
        base = self._base
        host = base.netloc.rpartition("@")[2]
        return urllib.parse.urlunsplit((base.scheme, host, base.path.rstrip("/") + path, base.query, ""))

    async def _exchange(self, message: Any, sent: _Sent) -> Received:
        """The boundary: whatever the library raises between the first byte and the last is the server's failure."""
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
    """Who the address names comes before the key."""
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
