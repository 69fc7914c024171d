"""The folder of a run's checkpoints: their names, which one is the latest, and which are kept.

``step_00000012/`` is a complete checkpoint; ``latest`` holds the name of the one to continue from; what ends in
``.partial`` is being written or removed. Renames make each change whole or absent, so that a run can be killed at any
moment; whatever ``latest`` became, the complete checkpoints beside it are found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectron.engine.files import remove, sync, temporary_name
from reflectron.engine.text import printable

_STEP = re.compile(r"step_(\d{8,})")
_LATEST = "latest"


def checkpoints_folder(output_dir: str) -> Path:
    """Return where the checkpoints of a run are."""
    return Path(output_dir) / "checkpoints"


def export_folder(output_dir: str) -> Path:
    """Return where the trained model of a run is, for Hugging Face's programs."""
    return Path(output_dir) / "export"


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` updates."""
    return root / f"step_{step:08d}"


def partial_folder(root: Path, step: int) -> Path:
    """Return a new name for the folder in which that checkpoint is written before it is complete."""
    return root / temporary_name(step_folder(root, step).name, "partial")


def saved_steps(root: Path) -> list[int]:
    """Return the steps of the complete checkpoints, ascending."""
    if not root.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


@dataclass(frozen=True)
class Candidates:
    """Where a run may resume."""

    steps: tuple[int, ...]
    """Of complete checkpoints, the one to try first at the front."""
    note: str = ""
    """What is wrong with ``latest``, in a line."""


def steps_to_try(root: Path) -> Candidates:
    """Return the latest checkpoint and those before it, newest first; all of them where ``latest`` cannot be
    trusted."""
    saved, latest = saved_steps(root)[::-1], root / _LATEST
    if not saved:
        return Candidates(())
    try:
        with latest.open("rb") as file:
            # More is no name; a device or a huge file is not read.
            text = file.read(100).decode()
        match = _STEP.fullmatch(text.strip())
        wrong = "" if match else f"names no checkpoint ('{printable(text, 40)}')"
        if match and int(match[1]) not in saved:
            wrong = f"names {match[0]}, which is not there"
    except UnicodeDecodeError:
        wrong = "names no checkpoint"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    if wrong:
        return Candidates(tuple(saved), f"{latest} {wrong}; the newest intact checkpoint is taken")
    assert match is not None, "else something is wrong"
    return Candidates(tuple(step for step in saved if step <= int(match[1])))


def commit(root: Path, step: int, partial: Path) -> None:
    """Make the finished folder ``partial`` the latest checkpoint.

    One of the same step, left by a run that was continued from before it, is replaced.

    Raises:
        OSError: when the folder cannot be changed.
    """
    target, pointer = step_folder(root, step), root / temporary_name(_LATEST)
    try:
        # What needs space on the disk comes before the renames.
        pointer.write_text(target.name + "\n", encoding="utf-8")
        sync(pointer)
        sync(partial)
        remove(target)
        partial.rename(target)
        sync(root)
        if (root / _LATEST).is_dir() and not (root / _LATEST).is_symlink():
            (root / _LATEST).rename(root / temporary_name(_LATEST, "partial"))
        pointer.replace(root / _LATEST)
        sync(root)
    finally:
        remove(pointer)


def remove_surplus(root: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete what need not be kept once ``step`` is committed."""
    for old in surplus([saved for saved in saved_steps(root) if saved <= step], keep_last, keep_every):
        # Renamed first: half a checkpoint must not look like one.
        step_folder(root, old).rename(partial_folder(root, old))
    remove_partial(root)


def remove_partial(root: Path) -> None:
    """Delete what interrupted saves and removals have left; only the job that holds the run's folder may."""
    for path in (*root.glob("step_*.partial"), *root.glob(f"{_LATEST}.*")):
        remove(path)


def surplus(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """Return those of ascending ``steps`` that are neither of the ``keep_last`` newest nor multiples of ``keep_every``.

    ``keep_every`` 0 keeps no multiples.
    """
    return [step for step in steps[:-keep_last] if not keep_every or step % keep_every]


def set_aside(root: Path) -> None:
    """Start over: the checkpoints so far become ``checkpoints.previous``, in place of older ones."""
    if root.exists():
        previous = root.with_name(root.name + ".previous")
        remove(previous)
        root.rename(previous)
