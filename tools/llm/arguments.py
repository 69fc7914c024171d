"""The arguments of every command that asks a model, the client they describe, and the progress that a person sees."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from reflectron.engine.files import one_line, printable, require
from reflectron.engine.terminal import console

if TYPE_CHECKING:
    from reflectron.tools.llm.client import LlmClient
    from reflectron.tools.llm.work import Stop

_SECONDS_BETWEEN_LINES = 30.0


def add_client_arguments(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """Declare endpoint, sampling, retries and budget."""
    group = parser.add_argument_group("model")
    group.add_argument("--endpoint", required=True, metavar="URL", help="OpenAI-compatible server, up to and with /v1")
    group.add_argument("--model", required=True, help="name by which the server knows the model")
    group.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=temperature, help="(default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument("--max-tokens", type=int, default=2048, help="longest answer (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="each request's seed comes from it (default: %(default)s)")
    group.add_argument(
        "--extra-body", default="{}", metavar="JSON", help="further fields of each request; null removes one"
    )
    group.add_argument("--concurrency", type=int, default=16, help="requests at a time (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=300.0, help="seconds of an attempt (default: %(default)s)")
    group.add_argument("--attempts", type=int, default=5, help="of a request (default: %(default)s)")
    group.add_argument("--retry-pause", type=float, default=1.0, help="seconds, doubled each time (default: 1)")
    budget = parser.add_argument_group(
        "budget", "of all runs with the same --out; requests under way when it is spent still finish"
    )
    budget.add_argument("--max-total-tokens", type=int, help="prompt and completion tokens")
    budget.add_argument("--max-cost", type=float, help="in the currency of the prices")
    budget.add_argument("--price-input", type=float, default=0.0, help="of a million prompt tokens")
    budget.add_argument("--price-output", type=float, default=0.0, help="of a million completion tokens")
    budget.add_argument("--tokenizer", metavar="PATH", help="counts tokens where the server does not; else estimated")


def make_client(args: argparse.Namespace, folder: Path, stop: Stop) -> LlmClient:
    """Make the client that the arguments describe; call it in a running event loop.

    Raises:
        ValueError: naming the argument.
    """
    require("openai", "tenacity")
    from reflectron.tools.llm.client import LlmClient, Retries, SpendingLimits
    from reflectron.tools.llm.request import NO_KEY, Endpoint, Sampling

    if not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout is {args.timeout}, expected more than 0 seconds")
    if args.concurrency < 1:
        raise ValueError(f"--concurrency is {args.concurrency}, expected at least 1")
    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        max_tokens=args.max_tokens,
        seed=args.seed,
        extra_body=json_object("--extra-body", args.extra_body),
    )
    limits = SpendingLimits(
        max_total_tokens=args.max_total_tokens,
        max_cost=args.max_cost,
        price_input=args.price_input,
        price_output=args.price_output,
    )
    retries = Retries(attempts=args.attempts, first_pause=args.retry_pause)
    count = None
    if args.tokenizer is not None:
        from reflectron.engine.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(args.tokenizer, "reflection")
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    key = os.environ.get(args.api_key_env) or NO_KEY
    endpoint = Endpoint(args.endpoint, args.model, key, args.timeout, args.concurrency)
    return LlmClient(folder, endpoint, sampling, limits=limits, retries=retries, stop=stop, count=count)


def json_object(name: str, text: str) -> dict[str, Any]:
    """Return the value of an argument that is a JSON object.

    Raises:
        ValueError: naming the argument.
    """
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {printable(text)}, expected a JSON object ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {printable(text)}, expected a JSON object")
    return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


class ProblemProgress:
    """Shows problems done, rate, tokens, cost and time left: as a bar on a terminal, else as lines.

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
        """Count one more problem as done, with a result such as ``accepted``."""
        self.done += 1
        self.results[result] += 1
        now = time.monotonic()
        self.bar.update(self.task, completed=self.done, description=self.describe())
        if self.bar.disable and (now - self.last_line >= _SECONDS_BETWEEN_LINES or self.done == self.total):
            self.last_line = now
            self.line(f"{self.done}/{self.total or '?'}  {self.describe()}  eta {self._left()}")

    def describe(self) -> str:
        """Return results, rate, tokens and cost in one line."""
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

    def __enter__(self) -> ProblemProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
