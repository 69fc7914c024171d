"""A client that asks a model durably: each attempt is a line of ``attempts.jsonl`` before its answer is used.

An answer that the journal holds is never asked for again. Failed attempts are retried with growing pauses while another
attempt may help, and are recorded and paid for like the others: their tokens count in the budget as the server reports
them, a tokenizer counts them, or they are estimated, and where a number came from is kept with it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tenacity

from reflectron.engine.files import one_line
from reflectron.tools.llm.reply import FINAL, REFUSED, RETRIED, AttemptFailed, FailureKind, Reply, believable
from reflectron.tools.llm.request import Endpoint, Request, Sampling, seed_of
from reflectron.tools.llm.work import ATTEMPTS, Journal, Stop

_AnswerOutcome = Literal["ok", "truncated", "filtered"]
_OUTCOMES: dict[str | None, _AnswerOutcome] = {"length": "truncated", "content_filter": "filtered"}
"""Outcome by finish reason; any other reason means ``ok``."""
_LONGEST_PAUSE = 60.0
_LONGEST_RETRY_AFTER = 600.0
"""Both are multiples of the first pause."""
_BYTES_PER_TOKEN = 3.5
"""An estimate: code and English have about 3 to 4 bytes a token with today's vocabularies."""
_LONGEST_COUNTED = 1_000_000
"""Characters; counting a longer text would hold up all other requests."""


@dataclass(frozen=True)
class ModelAnswer:
    """An answer of the model."""

    text: str
    finish_reason: str | None
    outcome: _AnswerOutcome
    """``truncated`` when ``max_tokens`` or the context ended it; ``filtered`` when the server removed a part."""


class RequestFailed(Exception):
    """Raised for a request whose attempts are used up, or that the server rejects; ``kind`` is the last attempt's."""

    def __init__(self, failure: AttemptFailed) -> None:
        super().__init__(str(failure))
        self.kind = failure.kind
        self.final = failure.kind in FINAL
        """Whether another run would fail the same way."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Tells when a failed request is asked again, and when to give up."""

    attempts: int = 5
    """Most attempts to send one request in a run."""
    first_pause: float = 1.0
    """Seconds before the second attempt; doubled each time, with jitter, up to 60 times this. A server's
    ``Retry-After`` is waited for up to 600 times this."""
    failures_in_a_row: int = 10
    """Requests that fail one after the other before the run stops: the server is down."""
    refusals_in_a_row: int = 3
    """Requests that are rejected one after the other before the run ends: the key or the address is wrong."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"--attempts is {self.attempts}, expected at least 1")
        if not 0 <= self.first_pause < math.inf:
            raise ValueError(f"--retry-pause is {self.first_pause}, expected 0 or more seconds")


@dataclass(frozen=True, kw_only=True)
class SpendingLimits:
    """Limits what a run may spend over all its attempts, earlier ones of the same folder included."""

    max_total_tokens: int | None = None
    """Most prompt and completion tokens together."""
    max_cost: float | None = None
    """Most money, in the currency of the prices."""
    price_input: float = 0.0
    """Per million prompt tokens."""
    price_output: float = 0.0
    """Per million completion tokens."""

    def __post_init__(self) -> None:
        for name, value in (("--price-input", self.price_input), ("--price-output", self.price_output)):
            if not 0 <= value < 1e9:
                raise ValueError(f"{name} is {value}, expected 0 or more, in a currency of a million tokens' price")
        for name, limit in (("--max-total-tokens", self.max_total_tokens), ("--max-cost", self.max_cost)):
            if limit is not None and not 0 <= limit < math.inf:
                raise ValueError(f"{name} is {limit}, expected 0 or more")
        if self.max_cost is not None and not (self.price_input or self.price_output):
            raise ValueError("--max-cost needs --price-input and --price-output, per million tokens")

    def cost(self, usage: Usage) -> float:
        """Return the price of one attempt."""
        return (usage.prompt_tokens * self.price_input + usage.completion_tokens * self.price_output) / 1e6


class LlmClient:
    """Asks a model, durably. One process uses a folder at a time, one caller a request.

    Args:
        folder: of the journal ``attempts.jsonl``; what it holds is not asked again and counts in the budget.
        stop: shared with whoever else may end the run.
        count: tokens of a text, for servers that report none.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: Endpoint,
        sampling: Sampling,
        *,
        limits: SpendingLimits,
        retries: Retries,
        stop: Stop,
        count: Callable[[str], int] | None = None,
    ) -> None:
        self.endpoint, self.sampling, self.retries, self.stop = endpoint, sampling, retries, stop
        self.journal = Journal(folder / ATTEMPTS)
        self.budget = Budget(limits)
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Attempts by (stage, outcome), earlier runs included."""
        self.usage_sources: Counter[str] = Counter()
        self.requests_sent = 0
        """Attempts of this run."""
        self.count = count
        self._answers: dict[str, int] = {}
        self._failed_attempts: Counter[str] = Counter()
        self._useless_answers: Counter[str] = Counter()
        self._failures_in_a_row = self._refusals_in_a_row = 0
        self._answered_now = False
        for offset, record in self.journal.records():
            try:
                self._take_note(record, offset)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.journal.path}: the line at byte {offset} is no attempt ({one_line(error)}), expected a "
                    "file that this command wrote; restore it or choose another --out"
                ) from None

    async def ask(self, request: Request) -> ModelAnswer:
        """Return the answer to a request, from the journal or from the model.

        Raises:
            RequestFailed: when there is none.
            RunStopped: when it is not in the journal and the run is to end.
            ValueError: when the endpoint has refused one request after the other.
        """
        key = request.key(self.endpoint.model, self.sampling)
        if key in self._answers:
            return _answer(self.journal.read(self._answers[key]))
        try:
            answer: ModelAnswer = await retrying(self.retries, RETRIED, self.stop.sleep)(self._attempt, key, request)
        except AttemptFailed as failure:
            self._give_up(failure)
            raise RequestFailed(failure) from failure
        self._failures_in_a_row = self._refusals_in_a_row = 0
        self._answered_now = True
        return answer

    def _give_up(self, failure: AttemptFailed) -> None:
        """Count a failed request; end the run where the server seems to fail all of them."""
        if failure.kind in REFUSED:
            self._refusals_in_a_row += 1
            if self._refusals_in_a_row >= self.retries.refusals_in_a_row:
                raise ValueError(
                    f"the endpoint refused {self._refusals_in_a_row} requests in a row, expected --endpoint, --model "
                    f"and a key (--api-key-env) that it accepts; the last with {failure}"
                ) from None
            return
        # A problem may be too long for a model that answers the others.
        if failure.kind == "bad request" and self._answered_now:
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= self.retries.failures_in_a_row:
            self.stop.request(f"{self._failures_in_a_row} requests failed in a row, the last with {failure}")

    async def _attempt(self, key: str, request: Request) -> ModelAnswer:
        if (reason := self.budget.exhausted()) is not None:
            self.stop.request(reason)
        self.stop.check()
        number = self._failed_attempts[key] + 1
        seed = seed_of(key, self._useless_answers[key])
        record: dict[str, Any] = {
            "key": key,
            "problem": request.problem,
            "stage": request.stage,
            "sample": request.sample,
            "template": request.template,
            "model": self.endpoint.model,
            "sampling": asdict(self.sampling),
            "seed": seed,
            "attempt": number,
            "started": time.time(),
        }
        began = time.monotonic()
        self.requests_sent += 1
        try:
            reply = await self.endpoint.attempt(request, self.sampling, seed)
        except AttemptFailed as failure:
            record |= {"seconds": _since(began), "outcome": failure.kind, "error": str(failure)}
            await self._record(record | self._spent(request, failure.usage, self._may_have_written(failure)))
            raise
        record |= {"seconds": _since(began), **self._answered(request, reply)}
        await self._record(record)
        return _answer(record)

    def _answered(self, request: Request, reply: Reply) -> dict[str, Any]:
        return {
            "outcome": _OUTCOMES.get(reply.finish_reason, "ok"),
            "finish_reason": reply.finish_reason,
            "text": reply.text,
            "fingerprint": reply.fingerprint,
            **self._spent(request, reply.usage, reply.text),
        }

    def _spent(self, request: Request, reported: tuple[int, int] | None, written: str | int | None) -> dict[str, Any]:
        """Return usage and cost of an attempt.

        Args:
            written: the answer, or how many tokens it may have had; None when the model was not reached.
        """
        prompt = request.input if isinstance(request.input, str) else "\n".join(m["content"] for m in request.input)
        if reported is None and written is None:
            usage = Usage(0, 0, "estimate")
        else:
            usage = count_usage(reported, prompt, written or 0, self.count)
        return {"usage": asdict(usage), "cost": self.budget.limits.cost(usage)}

    def _may_have_written(self, failure: AttemptFailed) -> int | None:
        """Return the tokens that a failed attempt may be billed for; None when the model was not reached."""
        most = self.sampling.most_tokens
        if not failure.reached:
            return None
        return most if failure.received is None else min(estimated_tokens(failure.received), most)

    async def _record(self, record: dict[str, Any]) -> None:
        self._take_note(record, await self.journal.append(record))

    def _take_note(self, record: dict[str, Any], offset: int) -> None:
        key = record["key"]
        self.outcomes[record["stage"], record["outcome"]] += 1
        # Attempts that failed had no usage in files of earlier versions.
        if (found := record.get("usage")) is not None:
            usage = Usage(**found)
            if believable(usage.prompt_tokens) is None or believable(usage.completion_tokens) is None:
                raise ValueError(f"usage is {found}")
            self.usage_sources[usage.source] += 1
            self.budget.add(usage)
        if "text" not in record:
            self._failed_attempts[key] += 1
            self._useless_answers[key] += record["outcome"] == "empty"
            return
        self._answers[key] = offset

    async def close(self) -> None:
        """Close the connections and the journal."""
        await self.endpoint.close()
        await asyncio.to_thread(self.journal.close)

    async def __aenter__(self) -> LlmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def retrying(
    retries: Retries, kinds: Collection[FailureKind], sleep: Callable[[float], Awaitable[None]]
) -> tenacity.AsyncRetrying:
    """Call a function again while it fails with one of ``kinds``, after growing pauses or those the server asks for."""
    first = retries.first_pause
    growing = tenacity.wait_random_exponential(first, _LONGEST_PAUSE * first)

    def pause(state: tenacity.RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.retry_after if isinstance(failure, AttemptFailed) else None
        return growing(state) + (0.0 if asked is None else min(asked, _LONGEST_RETRY_AFTER * first))

    return tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(retries.attempts),
        wait=pause,
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, AttemptFailed) and e.kind in kinds),
        sleep=sleep,
        reraise=True,
    )


def _answer(record: dict[str, Any]) -> ModelAnswer:
    return ModelAnswer(record["text"], record["finish_reason"], record["outcome"])


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)


@dataclass(frozen=True)
class Usage:
    """Tokens of one attempt."""

    prompt_tokens: int
    completion_tokens: int
    source: Literal["server", "tokenizer", "estimate"]


class Budget:
    """Counts what has been spent of ``limits``."""

    def __init__(self, limits: SpendingLimits) -> None:
        self.limits = limits
        self.tokens = 0
        self.cost = 0.0

    def add(self, usage: Usage) -> None:
        """Count an attempt."""
        self.tokens += usage.prompt_tokens + usage.completion_tokens
        self.cost += self.limits.cost(usage)

    def exhausted(self) -> str | None:
        """Return the limit that has been reached, as a sentence; None while there is room."""
        limits = self.limits
        if limits.max_total_tokens is not None and self.tokens >= limits.max_total_tokens:
            return f"the token budget is spent: {self.tokens:,} of {limits.max_total_tokens:,} (--max-total-tokens)"
        if limits.max_cost is not None and self.cost >= limits.max_cost:
            return f"the money budget is spent: {self.cost:.4g} of {limits.max_cost:.4g} (--max-cost)"
        return None


def count_usage(
    reported: tuple[int, int] | None, prompt: str, completion: str | int, count: Callable[[str], int] | None
) -> Usage:
    """Count the tokens of an attempt.

    Args:
        reported: prompt and completion tokens as the server says.
        completion: what was written, or the number of tokens that may have been.
        count: tokens of a text, where a tokenizer is at hand.
    """
    if reported is not None:
        return Usage(*reported, "server")
    if isinstance(completion, int):
        return Usage(count(prompt) if count is not None else estimated_tokens(prompt), completion, "estimate")
    if count is not None and len(completion) <= _LONGEST_COUNTED:
        # No tokenizer takes half of a surrogate pair.
        return Usage(count(prompt), count(completion.encode(errors="replace").decode()), "tokenizer")
    return Usage(estimated_tokens(prompt), estimated_tokens(completion), "estimate")


def estimated_tokens(text: str | int) -> int:
    """Estimate the tokens of a text, or of so many bytes of text."""
    return round((text if isinstance(text, int) else len(text.encode(errors="replace"))) / _BYTES_PER_TOKEN)
