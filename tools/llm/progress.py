"""What a person sees of a run: problems done, rate, tokens, cost and time left; a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

from reflectron.engine.terminal import console

if TYPE_CHECKING:
    from reflectron.tools.llm.client import LlmClient

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows problems as they are done.

    Args:
        total: problems to do, those done before included; None when their number is not known.
        done: problems done before, in an earlier run.
    """

    def __init__(self, client: LlmClient, total: int | None, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.client, self.total, self.before, self.done = client, total, done, done
        self.results: Counter[str] = Counter()
        self.console = console(stderr=True)
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            # What others print meanwhile must not be read for escape sequences.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("", total=total, completed=done)
        self.began = self.last_line = time.monotonic()

    def step(self, result: str) -> None:
        """One more problem is done, with a result such as ``accepted``."""
        self.done += 1
        self.results[result] += 1
        now = time.monotonic()
        self.bar.update(self.task, completed=self.done, description=self.describe())
        if self.bar.disable and (now - self.last_line >= _SECONDS_BETWEEN_LINES or self.done == self.total):
            self.last_line = now
            self.line(f"{self.done}/{self.total or '?'}  {self.describe()}  eta {self._left()}")

    def describe(self) -> str:
        """Results, rate, tokens and cost, in one line."""
        budget = self.client.budget
        results = " ".join(f"{name} {count}" for name, count in sorted(self.results.items()))
        cost = f"  cost {budget.cost:.2f}" if budget.limits.price_input or budget.limits.price_output else ""
        return f"{results}  {self._rate():.2f} problems/s  {budget.tokens:,} tokens{cost}"

    def line(self, text: str) -> None:
        """Show something beside the progress."""
        self.console.print(text, soft_wrap=True)

    def _rate(self) -> float:
        return (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)

    def _left(self) -> str:
        if self.total is None or self.done == self.before:
            return "?"
        return str(timedelta(seconds=round((self.total - self.done) / self._rate())))

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
