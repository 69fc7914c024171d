"""What is asked, and the content hash by which an answer is found again.

The hash covers the problem, the stage, the template, the model, the sampling and the text sent, so that a change of any
of them asks anew and nothing else does: not the endpoint's address, prices, limits or the order of problems.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from string import Template
from typing import Any, Literal


def content_hash(value: object) -> str:
    """SHA-256, in hexadecimal, of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with ``$places``."""

    name: str
    """Of the template and its version, such as ``reflect-system-1``."""
    text: str

    @cached_property
    def fingerprint(self) -> str:
        """``name:hash``; a changed text changes it."""
        return f"{self.name}:{content_hash([self.name, self.text])[:16]}"

    def fill(self, **values: str) -> str:
        """The prompt; values may hold dollar signs.

        Raises:
            KeyError: when a place gets no value.
        """
        return Template(self.text).substitute(values)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048
    """Longest answer in tokens."""
    seed: int = 0
    """Seed of the run; each request gets its own, made from it and the request's hash."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request's body that a server knows, such as vLLM's ``skip_special_tokens``; null leaves
    one out that is sent otherwise."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}, expected above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}, expected at least 1")

    @property
    def most_tokens(self) -> int:
        """Most tokens that an answer may have, under whichever name the server is told."""
        named = [self.extra_body.get(name) for name in ("max_completion_tokens", "max_tokens")]
        return max((n for n in named if isinstance(n, int) and 0 < n < 1 << 30), default=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the model."""

    problem: str
    """What it is about; a content hash, or an id that stands for one content."""
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
    def protocol(self) -> Literal["chat", "completions"]:
        """Which of the two interfaces is asked."""
        return "completions" if isinstance(self.input, str) else "chat"

    def key(self, model: str, sampling: Sampling) -> str:
        """Content hash of all that determines the answer's distribution."""
        return content_hash([asdict(self), model, asdict(sampling)])


def seed_of(key: str, answered: int) -> int:
    """Seed of a request, 31 bits: the same for every retry until an answer had to be thrown away.

    Args:
        answered: answers to this request that were of no use.
    """
    return int(content_hash([key, answered])[:16], 16) % (1 << 31)
