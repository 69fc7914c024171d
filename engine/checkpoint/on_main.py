"""What the main rank alone does with files, so that all ranks learn alike whether it went well."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from reflectron.engine.job_lock import LockLost
from reflectron.engine.text import printable

T = TypeVar("T")

# What writing a file raises: torch's writer and safetensors have types of their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, LockLost)


def error_on_main(action: Callable[[], str | None]) -> str:
    """Run ``action`` on the main rank; every rank gets the error that it returned or raised, in one line."""
    error = [""]
    if dist.get_rank() == 0:
        try:
            error = [action() or ""]
        except WRITE_ERRORS as failure:
            error = [file_error(failure)]
    dist.broadcast_object_list(error)
    return error[0]


def first_error(error: str) -> str:
    """The error of the lowest rank that has one, the same on all ranks; every rank calls it with its own."""
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text), "")


def from_main(value: T) -> T:
    """The main rank's ``value``, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def file_error(error: BaseException) -> str:
    """Why a file could not be written: file and reason, where the system said so."""
    # torch's writer follows an OSError of the stream with a RuntimeError of its own.
    cause = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return f"{cause.filename}: {cause.strerror}" if cause.filename else cause.strerror
    return printable((str(error).splitlines() or [type(error).__name__])[0])
