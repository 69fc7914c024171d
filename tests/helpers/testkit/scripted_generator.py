"""A generator for the scripted server: what a chat model says to each problem, by the state of its conversation."""

from __future__ import annotations

import re
from typing import Any

from reflectron.tools.llm.scripted_server import Scripted

TESTS = "assert clamp(5, 0, 3) == 3\nassert clamp(-1, 0, 3) == 0\nassert clamp(2, 0, 3) == 2"
RIGHT = "def clamp(x, low, high):\n    return max(low, min(x, high))"
ATTEMPTS = (
    "def clamp(x, low, high):\n    return min(x, hihg)",
    "def clamp(x, low, high):\n    return min(x, high)",
    RIGHT,
)
"""A name that does not exist, a lower bound that is forgotten, and the solution."""
SAID = (
    "Cut at both ends.",
    "The name `hihg` does not exist: a typing mistake.",
    "`clamp(-1, 0, 3)` must be 0, but nothing holds the lower bound.",
)
ANSWER = f"```python\n{RIGHT}\n```\n\nThe inner `min` bounds `x` from above, `max` from below."


def turn(said: str, code: str, tests: str = TESTS) -> str:
    """A turn of the first stage."""
    return f"{said}\n\n```python\n{code}\n\n{tests}\n```\nThis prints nothing."


def number_of(body: dict[str, Any]) -> int:
    """Return the number of the problem ``Problem <number>: ...`` that a conversation is about."""
    found = re.search(r"Problem (\d+):", body["messages"][1]["content"])
    assert found
    return int(found[1])


def problem(number: int) -> dict[str, str]:
    """A record to solve."""
    return {"instruction": f"Problem {number}: write clamp(x, low, high), which bounds x."}


def speak(body: dict[str, Any], *, first_attempt: int = 0) -> Scripted:
    """Wrong twice, then right; the last of the user's turns tells which turn it is."""
    messages = body["messages"]
    if messages[-1]["content"].startswith("All tests pass."):
        return Scripted(text=ANSWER)
    attempt = min(first_attempt + len(messages) // 2 - 1, len(ATTEMPTS) - 1)
    return Scripted(text=turn(SAID[attempt], ATTEMPTS[attempt]))
