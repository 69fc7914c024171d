"""Prompts come in, answers of a server with OpenAI's protocol go out: vLLM, ``transformers serve`` and others.

Prompts are sent as text, so whether BOS precedes them is the server's affair: vLLM, for one, adds it unless a request's
body says ``{"add_special_tokens": false}`` (``--endpoint-body``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from reflectron.tools.eval.decoding import Answer, Decoding, Prompt, Unanswered
from reflectron.tools.eval.prompts import cut_at_first
from reflectron.tools.llm.arguments import require

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

    def __init__(self, url: str, model: str, *, chat: bool, body: dict[str, Any], first_pause: float = 1.0) -> None:
        require("openai", "tenacity", extra="eval")
        self.url, self.model, self.chat, self.body, self.first_pause = url, model, chat, body, first_pause

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        """One answer a prompt, in their order; all are asked for at once.

        Raises:
            ValueError: when no request can be sent to such an address or with such a key.
            Unanswered: when the server cannot be reached, refuses, or answers with what is no answer.
        """
        return asyncio.run(self._complete(prompts, decoding))

    async def _complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        from reflectron.tools.llm.reply import AttemptFailed
        from reflectron.tools.llm.transport import NO_KEY, Endpoint

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
        answers = [result if isinstance(result, Answer) else None for result in results]
        if failures:
            raise Unanswered(
                f"{len(failures)} of {len(prompts)} requests failed, the last with {failures[-1]}", answers
            )
        return [answer for answer in answers if answer is not None]

    async def _ask(self, endpoint: Any, prompt: Prompt, decoding: Decoding) -> Answer:
        from reflectron.tools.llm.client import Retries, retrying
        from reflectron.tools.llm.reply import RETRIED, AttemptFailed, Reply
        from reflectron.tools.llm.request import Request, Sampling

        # Greedy answers need neither, and not every server takes all fields.
        left_out = {} if decoding.temperature else {"seed": None, "top_p": None}
        sampling = Sampling(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            extra_body=left_out | self.body,
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
        return Answer(text, usage[1] if usage else None, "length" if finish_reason == "length" else "stop")
