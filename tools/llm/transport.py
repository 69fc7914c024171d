"""One attempt over HTTP: a request goes out, a reply comes back or a failure that has a name.

The body is read here and not by the library's models: a server may leave out any field, and whatever it sends is
classified, never raised as something unforeseen.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reflectron.engine.text import one_line, printable
from reflectron.tools.llm.request import Request, Sampling

FailureKind = Literal[
    "timeout", "connection", "rate limited", "server error", "bad json", "empty", "bad request", "not authorised"
]

RETRIED: frozenset[FailureKind] = frozenset(
    {"timeout", "connection", "rate limited", "server error", "bad json", "empty"}
)
"""The next attempt may go well. ``bad request`` fails its problem, ``not authorised`` ends the run."""


@dataclass(frozen=True)
class Reply:
    """What the server answered; None for what it left out."""

    text: str
    finish_reason: str | None
    usage: tuple[int, int] | None
    """Prompt and completion tokens."""
    fingerprint: str | None


class AttemptFailed(Exception):
    """An attempt that gave no answer."""

    def __init__(self, kind: FailureKind, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind: FailureKind = kind
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class Endpoint:
    """A server with the interface of OpenAI's.

    Args:
        base_url: up to and with ``/v1``.
        timeout: longest attempt in seconds, from sending to the last byte.
        connections: most requests at a time.
    """

    def __init__(self, base_url: str, model: str, api_key: str, timeout: float, connections: int) -> None:
        import openai

        self.model, self.timeout = model, timeout
        # Retries are the client's, which records each attempt; the limit below holds for the attempt as a whole.
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout)
        self._room = asyncio.Semaphore(connections)

    async def attempt(self, request: Request, sampling: Sampling, seed: int) -> Reply:
        """Ask once.

        Raises:
            AttemptFailed: when there is no answer.
        """
        async with self._room:
            body = await self._body(_arguments(request, sampling, seed) | {"model": self.model}, request.protocol)
        return _reply(body, request.protocol)

    async def _body(self, arguments: dict[str, Any], protocol: str) -> str:
        import openai

        interface = self._client.chat.completions if protocol == "chat" else self._client.completions
        # The library's own time limit is between two bytes.
        try:
            response = await asyncio.wait_for(interface.with_raw_response.create(**arguments), self.timeout)
            return response.text
        except (asyncio.TimeoutError, openai.APITimeoutError):
            raise AttemptFailed("timeout", f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise AttemptFailed("connection", one_line(error.__cause__ or error)) from None
        except openai.APIStatusError as error:
            raise _refused(error.status_code, error.response.headers, error.response.text) from None
        except UnicodeDecodeError as error:
            raise AttemptFailed("bad json", one_line(error)) from None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


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
    return kept | {"extra_body": {name: value for name, value in extra.items() if value is not None}}


def _reply(body: str, protocol: str) -> Reply:
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        text = choice["message"].get("content") if protocol == "chat" else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError(f"the answer is {type(text).__name__}, expected a string")
    # Whatever a broken or cut body meets first.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise AttemptFailed("bad json", f"{one_line(error)} in {printable(body, 200)!r}") from None
    finish_reason = choice.get("finish_reason")
    # A turn that the model ends at once is an answer for who continues a raw prompt.
    if not (text or "").strip() and (protocol == "chat" or finish_reason != "stop"):
        raise AttemptFailed("empty", f"no text, finish_reason is {finish_reason!r}")
    return Reply(text or "", finish_reason, _usage(content.get("usage")), content.get("system_fingerprint"))


def _usage(reported: object) -> tuple[int, int] | None:
    if not isinstance(reported, dict):
        return None
    counts = (reported.get("prompt_tokens"), reported.get("completion_tokens"))
    return counts if all(isinstance(count, int) for count in counts) else None  # type: ignore[return-value]


def _refused(status: int, headers: Mapping[str, str], message: str) -> AttemptFailed:
    text = f"HTTP {status}: {printable(message, 200)}"
    if status in (401, 403, 404) or "insufficient_quota" in message:
        return AttemptFailed("not authorised", text)
    if status == 429:
        return AttemptFailed("rate limited", text, _retry_after(headers))
    if status >= 500 or status in (408, 409):
        return AttemptFailed("server error", text, _retry_after(headers))
    return AttemptFailed("bad request", text)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)
