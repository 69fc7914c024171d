"""What continues prompts: the form of every backend of generation, and the one that asks an OpenAI-compatible server.

Such servers are vLLM, ``transformers serve`` and others. Prompts are sent as text, so whether BOS precedes them is the
server's affair: vLLM, for one, adds it unless a request's body says ``{"add_special_tokens": false}``
(``--endpoint-body``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from reflectron.engine.files import require
from reflectron.tools.benchmarks.extraction import cut_at_first


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The way text is drawn from a model."""

    max_new_tokens: int = 1024
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of probability that is drawn from."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not ok:
                raise ValueError(f"--{name} is {getattr(self, name.replace('-', '_'))}, expected {expected}")


@dataclass(frozen=True)
class Prompt:
    """One answer that is wanted."""

    text: str
    """To be continued; for an endpoint's chat the user's turn."""
    seed: int
    """The seed of this answer alone, so that it does not depend on what else is generated."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer as a model wrote it."""

    text: str
    """Without the prompt and without what ended it; special tokens are spelt out."""
    tokens: int | None
    """Generated, the one that ended it included; None where a server does not tell."""
    finish_reason: Literal["stop", "length"]
    """``length``: ``max_new_tokens`` ended it."""


def known_finish(reason: str | None) -> Literal["stop", "length"]:
    """Return the finish reason of an answer; servers have further words, all for an answer that ended by itself."""
    return "length" if reason == "length" else "stop"


class Unanswered(Exception):
    """A server left some prompts of a batch without an answer; the text says why.

    Args:
        answers: one a prompt, None where there is none.
    """

    def __init__(self, reason: str, answers: Sequence[GeneratedAnswer | None]) -> None:
        super().__init__(reason)
        self.answers = answers


class GenerationBackend(Protocol):
    """Continues prompts."""

    tokenizer: Any
    """A tokenizer of transformers, which renders chats; None where a server renders them itself."""

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[GeneratedAnswer]:
        """Return one answer a prompt, in their order.

        Raises:
            Unanswered: when a server does not give them all.
        """


# A request waits for its turn behind those of a whole batch.
_TIMEOUT_SECONDS = 3600.0


class EndpointBackend:
    """A server and the name of a model there; the key, if it wants one, is in ``OPENAI_API_KEY``.

    Args:
        url: up to and with ``/v1``.
        model: as the server calls it.
        chat: send user's turns to ``/chat/completions``, else texts to ``/completions``.
        body: further fields of every request.
        first_pause: seconds before an attempt that failed is made again, doubled each time.
    """

    tokenizer = None

    def __init__(self, url: str, model: str, *, chat: bool, body: dict[str, Any], first_pause: float = 1.0) -> None:
        require("openai", "tenacity", extra="eval")
        self.url, self.model, self.chat, self.body, self.first_pause = url, model, chat, body, first_pause

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[GeneratedAnswer]:
        """Return one answer a prompt, in their order; all are asked for at once.

        Raises:
            ValueError: when no request can be sent to such an address or with such a key.
            Unanswered: when the server cannot be reached, refuses, or answers with what is no answer.
        """
        return asyncio.run(self._complete(prompts, decoding))

    async def _complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[GeneratedAnswer]:
        from reflectron.tools.llm.reply import AttemptFailed
        from reflectron.tools.llm.request import NO_KEY, Endpoint

        key = os.environ.get("OPENAI_API_KEY") or NO_KEY
        endpoint = Endpoint(self.url, self.model, key, _TIMEOUT_SECONDS, len(prompts))
        try:
            asked = [self._ask(endpoint, prompt, decoding) for prompt in prompts]
            results = await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await endpoint.close()
        failures = [result for result in results if isinstance(result, BaseException)]
        for failure in failures:
            if not isinstance(failure, AttemptFailed):
                raise failure
        answers = [result if isinstance(result, GeneratedAnswer) else None for result in results]
        if failures:
            raise Unanswered(
                f"{len(failures)} of {len(prompts)} requests failed, the last with {failures[-1]}", answers
            )
        return [answer for answer in answers if answer is not None]

    async def _ask(self, endpoint: Any, prompt: Prompt, decoding: Decoding) -> GeneratedAnswer:
        from reflectron.tools.llm.client import Retries, retrying
        from reflectron.tools.llm.reply import RETRIED, AttemptFailed, Reply
        from reflectron.tools.llm.request import Request, Sampling

        # Greedy answers need neither, and not every server takes all fields.
        omitted = {} if decoding.temperature else {"seed": None, "top_p": None}
        sampling = Sampling(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            extra_body=omitted | self.body,
        )
        content = ({"role": "user", "content": prompt.text},) if self.chat else prompt.text
        request = Request(problem="", stage="eval", template="", input=content, stop=decoding.stop)
        retries = Retries(attempts=6, first_pause=self.first_pause)
        try:
            again = retrying(retries, RETRIED - {"empty"}, asyncio.sleep)
            reply: Reply = await again(endpoint.attempt, request, sampling, prompt.seed)
            text, usage, finish_reason = reply.text, reply.usage, reply.finish_reason
        except AttemptFailed as failure:
            if failure.kind != "empty":
                raise
            # A model that says nothing has answered: wrongly.
            text, usage, finish_reason = "", failure.usage, failure.finish_reason
        # Some servers leave the stop string in.
        text = cut_at_first(text, decoding.stop)
        return GeneratedAnswer(text, usage[1] if usage else None, known_finish(finish_reason))
