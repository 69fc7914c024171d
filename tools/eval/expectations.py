"""Expected answers of HumanEval+ and MBPP+: what the canonical solutions answer, made in the sandbox, and kept.

They are kept by the content of the task, a file a suite: gzipped messages of plain data, first what all inputs have in
common, then for each input its arguments and the expected answer.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS, MBPP_OUTPUT_SET_EQ_TASKS

from reflectron.engine.files import sha256_of, whole_file, write_text
from reflectron.engine.text import printable
from reflectron.tools.eval.answers import AnswerPipes, Program
from reflectron.tools.eval.verdict_file import package_version
from reflectron.tools.sandbox.plain_data import (
    FORMAT_VERSION,
    DataLimits,
    NotData,
    PlainDataError,
    encode,
    read_message,
    write_message,
)
from reflectron.tools.sandbox.process import SandboxKind, sandbox_folder

# A canonical solution may use this for a suite.
_TRUSTED_SUITE_SECONDS = 600
_TRUSTED_MEMORY_BYTES = 4 << 30
_TRUSTED_LIMITS = DataLimits(message_bytes=1 << 30, nodes=1 << 27)
_CACHE_VERSION = 1


@dataclass(frozen=True, eq=False)
class Task:
    """A task of HumanEval+ or MBPP+ with its inputs as they are passed to the function."""

    dataset: Literal["humaneval", "mbpp"]
    task_id: str
    entry_point: str
    canonical: str
    """The whole program: prompt and solution."""
    atol: float
    inputs: tuple[list[Any], list[Any]]
    """Of base and plus; argument lists."""

    @property
    def as_set(self) -> bool:
        """Whether answers are compared as sets."""
        return self.dataset == "mbpp" and self.entry_point in MBPP_OUTPUT_SET_EQ_TASKS

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 of all that determines its expected answers."""
        digest = hashlib.sha256()
        versions = [_CACHE_VERSION, FORMAT_VERSION, platform.python_version(), package_version("numpy")]
        state = [self.dataset, self.entry_point, self.canonical, self.atol, *versions]
        for part in (json.dumps(state).encode(), *encoded_inputs(self)):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Expectation:
    """Where a task's expected answers are, a file a suite, and the CPU seconds that each took."""

    files: tuple[Path, Path]
    seconds: tuple[list[float], list[float]]


@functools.lru_cache(maxsize=32)
def encoded_inputs(task: Task) -> tuple[bytes, bytes]:
    """Inputs of base and plus as plain data; samples of one task mostly come one after the other."""
    base, plus = (encode(inputs, _TRUSTED_LIMITS) for inputs in task.inputs)
    return base, plus


class Expectations:
    """Expected answers by task, from any thread; each is looked at once.

    Args:
        cache: the folder where they are kept.
    """

    def __init__(self, cache: Path, kind: SandboxKind) -> None:
        self._cache, self._kind = cache, kind
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._known: dict[str, Expectation] = {}

    def of(self, task: Task) -> Expectation:
        """Expected answers of a task, made now if the cache lacks them or holds damaged ones.

        Raises:
            ValueError: when the canonical solution fails, or the cache cannot be written.
        """
        with self._lock:
            lock = self._locks.setdefault(task.key, threading.Lock())
        with lock:
            if task.key not in self._known:
                try:
                    self._known[task.key] = self._kept(task) or self._made(task)
                except OSError as error:
                    raise ValueError(f"expected answers cannot be kept in {self._cache}: {error}") from error
            return self._known[task.key]

    def _paths(self, task: Task) -> tuple[tuple[Path, Path], Path]:
        base, plus, times = (self._cache / f"{task.key}.{name}" for name in ("base.gz", "plus.gz", "json"))
        return (base, plus), times

    def _kept(self, task: Task) -> Expectation | None:
        files, times = self._paths(task)
        try:
            kept = json.loads(times.read_text(encoding="utf-8"))
            if kept["sha256"] == [sha256_of(path) for path in files]:
                base, plus = kept["seconds"]
                return Expectation(files, (base, plus))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _made(self, task: Task) -> Expectation:
        files, times = self._paths(task)
        self._cache.mkdir(parents=True, exist_ok=True)
        seconds = _make(task, files, self._kind)
        # Written last: where it is, the answers are whole.
        write_text(times, json.dumps({"seconds": seconds, "sha256": [sha256_of(path) for path in files]}))
        return Expectation(files, seconds)


def _make(task: Task, files: tuple[Path, Path], kind: SandboxKind) -> tuple[list[float], list[float]]:
    """Write a task's files; returns the CPU seconds of its inputs."""
    as_presence = task.dataset == "mbpp" and task.entry_point in MBPP_OUTPUT_NOT_NONE_TASKS
    program = Program(
        code=task.canonical,
        entry_point=task.entry_point,
        suites=encoded_inputs(task),
        seconds=[[float(_TRUSTED_SUITE_SECONDS)] * len(inputs) for inputs in task.inputs],
        suite_seconds=_TRUSTED_SUITE_SECONDS,
        memory_bytes=_TRUSTED_MEMORY_BYTES,
        form="presence" if as_presence else "set" if task.as_set else "whole",
    )
    with sandbox_folder() as folder, AnswerPipes(program, folder, stored=True) as stored:
        why = stored.run(kind)
        base, plus = (
            _write_suite(task, inputs, os.dup(answers), file, why)
            for inputs, answers, file in zip(task.inputs, stored.answers, files, strict=True)
        )
    return base, plus


def _write_suite(task: Task, inputs: Sequence[Any], answers: int, path: Path, why: str) -> list[float]:
    common = {"dataset": task.dataset, "entry_point": task.entry_point, "atol": task.atol, "count": len(inputs)}
    seconds: list[float] = []
    with (
        open(answers, "rb") as stream,
        whole_file(path) as whole,
        gzip.open(whole, "wb", compresslevel=1) as file,
    ):
        write_message(file, common)  # type: ignore[arg-type]
        for arguments in inputs:
            took, answer = _expected(task, stream, len(seconds), why)
            seconds.append(took)
            write_message(file, (arguments, answer), _TRUSTED_LIMITS)  # type: ignore[arg-type]
    return seconds


def _expected(task: Task, stream: Any, number: int, why: str) -> tuple[float, Any]:
    try:
        outcome, took, answer = read_message(stream, _TRUSTED_LIMITS)
    except (EOFError, PlainDataError) as error:
        raise ValueError(
            f"the canonical solution of {task.task_id} stopped after {number} inputs: {why or error}"
        ) from None
    if outcome == "unsaid":
        # As in evalplus, no sample passes an input whose answer takes that much.
        return took, NotData(answer)
    if outcome != "answer":
        raise ValueError(f"the canonical solution of {task.task_id} ends with {outcome}: {printable(answer)}")
    return took, answer
