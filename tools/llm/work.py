"""Many problems at a time, until they are done or the run is told to stop.

To stop is to begin nothing new: requests under way finish and are recorded, then the run ends.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

ATTEMPTS = "attempts.jsonl"
"""The journal of every attempt, in a run's folder."""
Item = TypeVar("Item")


class Stopped(Exception):
    """Nothing new may begin; the reason is in ``Stop.reason``."""


class Stop:
    """Whether and why a run ends early."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._event = asyncio.Event()

    def request(self, reason: str) -> None:
        """End the run; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._event.set()

    def check(self) -> None:
        """Raise ``Stopped`` once the run is to end."""
        if self.reason is not None:
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Wait, or raise ``Stopped`` as soon as the run is to end."""
        self.check()
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Stopped

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the run; a second SIGINT interrupts it at once."""
        loop = asyncio.get_running_loop()

        def stop(signum: signal.Signals) -> None:
            self.request(f"{signum.name} received")
            loop.remove_signal_handler(signum)

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop, signum)
        try:
            yield
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)


@dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code, and one line that says why it is not 0."""

    code: Literal[0, 1]
    line: str | None


def ending(stop: Stop, *, made: int, left: int, unit: str) -> Ending:
    """Exit code 0 where everything is done and something was made, else 1.

    Args:
        made: samples that the folder holds now.
        left: problems or the like that the same command would take up again.
        unit: what ``left`` counts, in the plural.
    """
    if left:
        why = stop.reason or f"requests failed for the server's sake, see {ATTEMPTS}"
        return Ending(1, f"stopped: {why}; {left} {unit} left. All that was begun is saved; the same command goes on.")
    if not made:
        return Ending(1, f"nothing was made: all {unit} were tried and none gave a sample")
    return Ending(0, None)


async def for_each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, at_a_time: int, stop: Stop
) -> None:
    """Call ``work`` on every item, in order of their start, until ``stop``.

    Raises:
        Exception: the first that ``work`` raised, after what was under way has finished.
    """
    queue = iter(items)

    async def worker() -> None:
        # The workers take turns at one iterator: there is no await between two of its items.
        for item in queue:
            try:
                stop.check()
                await work(item)
            except Stopped:
                return
            except Exception as error:
                stop.request(f"failed: {error}")
                raise

    results = await asyncio.gather(*(worker() for _ in range(at_a_time)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
