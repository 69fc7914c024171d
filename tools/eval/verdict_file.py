"""Verdicts on disk: each is a row that is written when it is made, so that a stopped scoring resumes after it.

A row is found again by a hash of all that determines it: the sample, its problem, the limits, versions and the judging
code itself. So a row of anything else is never taken for this sample's, and several scorings may share a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflectron.engine.files import append_whole, is_stream
from reflectron.tools.eval.problems import Problem
from reflectron.tools.eval.samples import Sample
from reflectron.tools.eval.verdict import Verdicts, as_row, from_row


class VerdictFile:
    """A file of verdicts, locked against other scorers until it is closed.

    Args:
        suites: how many verdicts a sample has; rows with another number count as not written.

    Raises:
        ValueError: when another scorer has it, or it cannot be written.
    """

    def __init__(self, path: Path, suites: int) -> None:
        self.path, self.suites = path, suites
        if is_stream(path):
            raise ValueError(f"verdicts cannot be kept in {path}: it is no file; --json FILE puts them beside FILE")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(
                f"verdicts cannot be kept in {path}: {error.strerror}; --json FILE puts them beside FILE"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(
                f"{path} is being written by another scorer: wait for its end, or give --json another FILE"
            ) from None
        except OSError:
            # A file system without locks: rows are appended whole, so two scorers do no more than work twice.
            pass
        self.verdicts, unfinished = _read(path, suites)
        """By key."""
        if unfinished:
            os.write(self._descriptor, b"\n")

    def __enter__(self) -> VerdictFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, key: str, sample: Sample, verdicts: Verdicts) -> None:
        """Append a row.

        Raises:
            OSError: when it cannot be written, as on a full disk; the file is as it was.
        """
        row = {"key": key, "task_id": sample.task_id, "sample": sample.number, "verdicts": as_row(verdicts)}
        append_whole(self._descriptor, json.dumps(row).encode() + b"\n")
        self.verdicts[key] = verdicts


def _read(path: Path, suites: int) -> tuple[dict[str, Verdicts], bool]:
    """The file's verdicts, and whether its last row was cut short; what is no row counts as not written."""
    verdicts: dict[str, Verdicts] = {}
    line = b"\n"
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                row = json.loads(line)
                found = from_row(row["verdicts"])
                if isinstance(row["key"], str) and len(found) == suites:
                    verdicts[row["key"]] = found
    return verdicts, not line.endswith(b"\n")


def verdict_keys(dataset: str, problems: Sequence[Problem], samples: Sequence[Sample], *limits: object) -> list[str]:
    """A hash of all that determines each sample's verdict.

    Args:
        limits: whatever else does; its ``repr`` counts.
    """
    common = [dataset, _judging_code(), platform.python_version(), package_version("evalplus"), repr(limits)]
    by_task = {problem.task_id: _digest([common, problem.record]) for problem in problems}
    return [_digest([by_task[sample.task_id], sample.number, sample.code]) for sample in samples]


def _digest(value: Any) -> str:
    # JSON escapes what is no valid Unicode.
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _judging_code() -> str:
    """A hash of the modules that judge: what an earlier version found is not taken over."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *(here.parent / "sandbox").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def package_version(package: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
