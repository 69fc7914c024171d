"""The arguments of every command that asks a model, and the client they describe."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from reflectron.engine.text import one_line, printable

if TYPE_CHECKING:
    from reflectron.tools.llm.client import LlmClient
    from reflectron.tools.llm.work import Stop


def add_client_arguments(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """Endpoint, sampling, retries and budget."""
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
        "--extra-body", default="{}", metavar="JSON", help="further fields of each request; null leaves one out"
    )
    group.add_argument("--concurrency", type=int, default=16, help="requests at a time (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=300.0, help="seconds of an attempt (default: %(default)s)")
    group.add_argument("--attempts", type=int, default=5, help="of a request (default: %(default)s)")
    group.add_argument("--retry-pause", type=float, default=1.0, help="seconds, doubled each time (default: 1)")
    budget = parser.add_argument_group(
        "budget", "of all runs with the same --out; what is under way when it is spent ends"
    )
    budget.add_argument("--max-total-tokens", type=int, help="prompt and completion tokens")
    budget.add_argument("--max-cost", type=float, help="in the currency of the prices")
    budget.add_argument("--price-input", type=float, default=0.0, help="of a million prompt tokens")
    budget.add_argument("--price-output", type=float, default=0.0, help="of a million completion tokens")
    budget.add_argument("--tokenizer", metavar="PATH", help="counts tokens where the server does not; else estimated")


def require(*modules: str, extra: str = "data") -> None:
    """Find out that a package is missing before anything is read or written.

    Raises:
        ValueError: naming the package and the extra that brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the package {module} is not installed: pip install 'reflectron[{extra}]'")


def make_client(args: argparse.Namespace, folder: Path, stop: Stop) -> LlmClient:
    """The client that the arguments describe; call it in a running event loop.

    Raises:
        ValueError: naming the argument.
    """
    require("openai", "tenacity")
    from reflectron.tools.llm.budget import Limits
    from reflectron.tools.llm.client import LlmClient, Retries
    from reflectron.tools.llm.request import Sampling
    from reflectron.tools.llm.transport import NO_KEY, Endpoint

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
    limits = Limits(
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
    """The value of an argument that is a JSON object.

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
