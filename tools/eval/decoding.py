"""What every back end of generation takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is drawn from a model."""

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
    """Of this answer alone, so that it does not depend on what else is generated."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    """Without the prompt and without what ended it; special tokens are spelt out."""
    tokens: int | None
    """Generated, the one that ended it included; None where a server does not tell."""
    finish_reason: Literal["stop", "length"]
    """``length``: ``max_new_tokens`` ended it."""


class Unanswered(Exception):
    """A server left some prompts of a batch without an answer; the text says why.

    Args:
        answers: one a prompt, None where there is none.
    """

    def __init__(self, reason: str, answers: Sequence[Answer | None]) -> None:
        super().__init__(reason)
        self.answers = answers


class Backend(Protocol):
    """Continues prompts."""

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
        """One answer a prompt, in their order.

        Raises:
            Unanswered: when a server does not give them all.
        """
