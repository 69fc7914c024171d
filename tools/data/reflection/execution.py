"""Run what a generator wrote, in sandboxes: the cells of its sequence, and its answer with the sequence's tests.

What a cell printed is recorded before anyone sees it, because the model's next answer depends on it and a second run
may print something else; a conversation that is resumed gets its interpreter back by running its cells again. Each
verification has a fresh sandbox. It passes when the tests come to their end, not when the process merely exits with 0:
the tests are sent when the code has run, and when they have ended the process is asked for a word that nobody knew
before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from reflectron.engine.files import printable
from reflectron.tools.data.reflection.programs import SequenceTests, mutants, without_bodies
from reflectron.tools.llm.request import content_hash
from reflectron.tools.llm.work import Journal
from reflectron.tools.sandbox import wall
from reflectron.tools.sandbox.home import sandbox_folder
from reflectron.tools.sandbox.interpreter import Interpreter, InterpreterPool
from reflectron.tools.sandbox.process import staged
from reflectron.tools.sandbox.sandboxed import Sandboxed
from reflectron.tools.sandbox.wall import SandboxKind, SandboxLimits

EXECUTIONS = "executions.jsonl"
_LONGEST_OUTPUT = 3000
"""Characters; more would fill the model's context, and a training sample, with one line's repetitions."""
Result = TypeVar("Result")
_FATE_CHARACTERS = 200


@dataclass(frozen=True)
class Executed:
    """The output of a cell, and how it ended."""

    output: str
    status: str
    """``ok``, ``error``, or the limit that was exceeded."""
    lost: bool
    """The interpreter was killed; its variables are gone."""


class Interpreters:
    """A pool of interpreters for asynchronous callers, and the journal of what they printed.

    Args:
        folder: of the journal ``executions.jsonl``.
        size: interpreters in use at a time.
    """

    def __init__(self, folder: Path, kind: SandboxKind, limits: SandboxLimits, size: int) -> None:
        self.journal = Journal(folder / EXECUTIONS)
        self._offsets = {record["key"]: offset for offset, record in self.journal.records()}
        self._sandbox = [kind, asdict(limits)]
        self._pool = InterpreterPool(kind, limits, size)
        # A thread for each session, so that none waits for a thread that another session's cell needs.
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="interpreter")
        self._room = asyncio.Semaphore(size)

    def key(self, identity: str, cells: Sequence[str]) -> str:
        """Return the hash of all that an output depends on: the conversation, its cells up to this one, the sandbox."""
        return content_hash([identity, list(cells), self._sandbox])

    def recorded(self, key: str) -> Executed | None:
        """Return an execution of this or an earlier run, None where there is none."""
        if key not in self._offsets:
            return None
        record = self.journal.read(self._offsets[key])
        return Executed(record["output"], record["status"], record["lost"])

    async def record(self, key: str, executed: Executed, more: dict[str, Any]) -> None:
        """Keep an execution."""
        self._offsets[key] = await self.journal.append({"key": key, **vars(executed), **more})

    async def acquire(self, resources: contextlib.AsyncExitStack) -> Interpreter:
        """Take a fresh interpreter, which is given back when ``resources`` are closed."""
        await resources.enter_async_context(self._room)
        session = self._pool.session()
        interpreter = await self.call(session.__enter__)
        resources.push_async_callback(self.call, lambda: session.__exit__(None, None, None))
        return interpreter

    async def call(self, function: Callable[[], Result]) -> Result:
        """Call what blocks in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def verify(self, function: Callable[[], Result]) -> Result:
        """Call what runs programs, when there is room for one more."""
        async with self._room:
            return await self.call(function)

    def __enter__(self) -> Interpreters:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        self._pool.close()
        self.journal.close()


class Session:
    """The interpreter of one conversation; it is taken from the pool when the first cell must really run.

    Args:
        identity: what tells this conversation's executions from others'.
    """

    def __init__(self, interpreters: Interpreters, identity: str) -> None:
        self._interpreters, self._identity = interpreters, identity
        self._cells: list[str] = []
        self._alive_from = 0
        self._interpreter: Interpreter | None = None
        self._resources = contextlib.AsyncExitStack()

    async def execute(self, code: str) -> Executed:
        """Run the next cell of the conversation.

        Raises:
            OSError: when no interpreter starts.
        """
        self._cells.append(code)
        key = self._interpreters.key(self._identity, self._cells)
        executed = self._interpreters.recorded(key)
        if executed is None:
            executed = await self._run(code)
            more = {"problem": self._identity, "round": len(self._cells)}
            await self._interpreters.record(key, executed, more)
        if executed.lost:
            self._alive_from = len(self._cells)
        return executed

    async def _run(self, code: str) -> Executed:
        if self._interpreter is None:
            self._interpreter = await self._interpreters.acquire(self._resources)
            for cell in self._cells[self._alive_from : -1]:
                await self._interpreters.call(partial(self._interpreter.execute, cell))
        execution = await self._interpreters.call(partial(self._interpreter.execute, code))
        return Executed(_shortened(execution.text), execution.status, execution.fresh_kernel)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resources.aclose()


def _shortened(output: str) -> str:
    if len(output) <= _LONGEST_OUTPUT:
        return output
    half = _LONGEST_OUTPUT // 2
    return f"{output[:half]}\n... {len(output) - 2 * half} characters omitted ...\n{output[-half:]}"


@dataclass(frozen=True)
class Fate:
    """Tells how a run of a program ended."""

    passed: bool
    """Whether it came to the end of its last part."""
    reason: str = ""
    """What ended it otherwise: an exception's name, or the limit that was exceeded."""


Runner = Callable[[str, str], Fate]
"""Runs code and then its tests."""


@dataclass(frozen=True)
class AnswerVerdict:
    """Says whether an answer passes its sequence's tests, and whether these would notice a wrong one."""

    reason: str | None
    """Why the answer is no good: ``<kind>: <detail>``; None when it is."""
    mutants_tried: int = 0
    killed_by: str | None = None
    """The change that made an assertion fail."""


def verify(answer: str, tests: SequenceTests, most_mutants: int, run: Runner) -> AnswerVerdict:
    """Run an answer with its tests, then changed answers until an assertion fails.

    A change that makes the program crash proves only that it was called; an assertion has to notice a wrong result.

    Args:
        answer: code that parses.
    """
    if not tests.targets:
        return AnswerVerdict("other names: the answer defines no function or class that the sequence tested")
    fate = run(answer, tests.code)
    if not fate.passed:
        return AnswerVerdict(f"tests fail on the answer: {fate.reason}")
    tried = 0
    for tried, mutant in enumerate(itertools.islice(mutants(answer), most_mutants), 1):
        if run(mutant.code, tests.code).reason == "AssertionError":
            return AnswerVerdict(None, tried, mutant.change)
    if run(without_bodies(answer, tests.targets), tests.code).passed:
        return AnswerVerdict(
            f"tests call nothing: {', '.join(sorted(tests.targets))} may raise and they still pass", tried
        )
    return AnswerVerdict(f"vacuous tests: no assertion fails for any of {tried} mutants", tried)


def sandbox_runner(kind: SandboxKind, limits: SandboxLimits) -> Runner:
    """Return a runner that runs each program in a fresh sandbox and a new folder, without input."""

    def run(code: str, tests: str) -> Fate:
        deadline = time.monotonic() + limits.wall_seconds
        with _started(kind, limits) as (running, ours):
            for name, part in (("program.py", code), ("tests.py", tests)):
                fate = _fate(_said(running, ours, {"name": name, "code": part}, deadline))
                if fate is None:
                    return _ended(running, deadline)
                if not fate.passed:
                    return fate
            word = secrets.token_hex(16)
            said = _said(running, ours, {"word": word}, deadline)
            return Fate(passed=True) if said == word else _ended(running, deadline)

    return run


@contextlib.contextmanager
def _started(kind: SandboxKind, limits: SandboxLimits) -> Iterator[tuple[Sandboxed, int]]:
    """Start ``trial.py`` in a sandbox; yield it with our end of the pipe that is its stdin."""
    with sandbox_folder() as folder, contextlib.ExitStack() as pipes:
        argv = staged(folder, "data.reflection.trial")
        theirs, ours = os.pipe()
        pipes.callback(os.close, ours)
        os.set_blocking(ours, False)
        try:
            running = Sandboxed(kind, argv, writable={wall.FOLDER: folder}, limits=limits, environment={}, stdin=theirs)
        finally:
            os.close(theirs)
        with running:
            yield running, ours


def _said(running: Sandboxed, stdin_fd: int, part: dict[str, str], deadline: float) -> object:
    """Send a part and return what the script says of it; None when it says nothing, or what is no JSON."""
    line = running.ask(stdin_fd, json.dumps(part).encode() + b"\n", deadline)
    try:
        return json.loads(line or b"")
    # Nesting beyond the parser's stack, a number of too many digits, no UTF-8.
    except (ValueError, RecursionError):
        return None


def _fate(said: object) -> Fate | None:
    """Read a fate; None for what is none, which a program may have written."""
    if not isinstance(said, dict) or not isinstance(said.get("reason"), str):
        return None
    return Fate(said.get("passed") is True, printable(said["reason"], _FATE_CHARACTERS))


def _ended(running: Sandboxed, deadline: float) -> Fate:
    """Return why nothing more was said."""
    if running.process.breach is None and time.monotonic() >= deadline:
        running.process.stop("wall_time")
    # What it printed is of no interest; what ended it is.
    outcome = running.outcome("", "", 0.0)
    return Fate(passed=False, reason="ended before its tests" if outcome.ended == "exited" else outcome.ended)
