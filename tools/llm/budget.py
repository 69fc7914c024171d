"""Tokens and money: each attempt's usage comes in, what is spent and whether more may be spent goes out.

A server that reports no usage has its tokens counted by a tokenizer, or estimated; where a number came from is kept
with it. An attempt that failed counts with what the model may have written for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_BYTES_PER_TOKEN = 3.5
"""Of an estimate: code and English have about 3 to 4 bytes a token with today's vocabularies."""
_LONGEST_COUNTED = 1_000_000
"""Characters; a tokenizer would hold up all other requests for longer."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one attempt."""

    prompt_tokens: int
    completion_tokens: int
    source: Literal["server", "tokenizer", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may spend, over all its attempts, earlier ones of the same folder included."""

    max_total_tokens: int | None = None
    """Prompt and completion tokens together."""
    max_cost: float | None = None
    """In the currency of the prices."""
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
        """Price of one attempt."""
        return (usage.prompt_tokens * self.price_input + usage.completion_tokens * self.price_output) / 1e6


class Budget:
    """What has been spent of ``limits``."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tokens = 0
        self.cost = 0.0

    def add(self, usage: Usage) -> None:
        """Count an attempt."""
        self.tokens += usage.prompt_tokens + usage.completion_tokens
        self.cost += self.limits.cost(usage)

    def exhausted(self) -> str | None:
        """Which limit has been reached, as a sentence; None while there is room."""
        limits = self.limits
        if limits.max_total_tokens is not None and self.tokens >= limits.max_total_tokens:
            return f"the token budget is spent: {self.tokens:,} of {limits.max_total_tokens:,} (--max-total-tokens)"
        if limits.max_cost is not None and self.cost >= limits.max_cost:
            return f"the money budget is spent: {self.cost:.4g} of {limits.max_cost:.4g} (--max-cost)"
        return None


def count_usage(
    reported: tuple[int, int] | None, prompt: str, completion: str | int, count: Callable[[str], int] | None
) -> Usage:
    """Usage of an attempt.

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
    """Tokens of a text, or of so many bytes of text."""
    return round((text if isinstance(text, int) else len(text.encode(errors="replace"))) / _BYTES_PER_TOKEN)
