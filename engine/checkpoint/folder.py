"""The folder of a run's checkpoints: what each holds and whether it still does, which is the latest.

``step_00000012/`` is a complete checkpoint; ``latest`` holds the name of the one to resume from; what ends in
``.partial`` is being written or removed. ``manifest.json`` is written last and lists every other file with size and
SHA-256, so that a checkpoint that was cut short or changed is found before a tensor of it is used. Renames make each
change whole or absent, so that a run can be killed at any moment; whatever ``latest`` became, the complete checkpoints
beside it are found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reflectron.engine.files import printable, remove, sha256_of, sync, temporary_name, write_text

MANIFEST = "manifest.json"
_FORMAT_VERSION = 1


class DamagedCheckpoint(ValueError):
    """Names the file that is missing, cut short, changed, or of a format that this version does not know."""


@dataclass(frozen=True)
class FileDigest:
    """Content of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SkippedSteps:
    """Steps whose update was skipped because loss or gradient were not finite."""

    total: int = 0
    """Their number in the run so far."""
    in_a_row: int = 0
    """Up to now, without an update in between."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    step: int
    """Steps before it; learning rate, mask rate and position in the sample order follow from it."""
    run: dict[str, Any]
    """What determines the run, by configuration key; see ``run_identity``."""
    layout: dict[str, int]
    """Parallel sizes of the job that wrote it."""
    config: dict[str, Any]
    """Its resolved configuration."""
    versions: dict[str, str]
    """Versions of Python and packages."""
    files: dict[str, FileDigest]
    """Every other file of the folder."""
    skipped: SkippedSteps = SkippedSteps()
    """The steps before it that changed nothing."""
    backends: dict[str, str] = field(default_factory=dict)
    """What computed it, by key of the section ``backends``."""


def digest_file(path: Path) -> FileDigest:
    """Return size and SHA-256 of a file, read in pieces."""
    return FileDigest(path.stat().st_size, sha256_of(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync it.

    Raises:
        OSError: when it cannot be written.
    """
    content = {"format_version": _FORMAT_VERSION} | asdict(manifest)
    write_text(folder / MANIFEST, json.dumps({"sha256": _checksum(content), **content}, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: when it is missing, cut short, changed, or of another version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        intact = content.pop("sha256") == _checksum(content)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path} is missing") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    # No JSON, none that is an object, none of this depth.
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedCheckpoint(f"{path} is damaged: its content is not what its checksum says")
    if (version := content.pop("format_version", None)) != _FORMAT_VERSION:
        raise DamagedCheckpoint(f"{path} has format version {printable(version)}, expected {_FORMAT_VERSION}")
    try:
        return _parsed(content)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} does not hold what a manifest does: {printable(error)}") from None


def _parsed(content: dict[str, Any]) -> Manifest:
    files = {name: FileDigest(**file) for name, file in content["files"].items()}
    manifest = Manifest(**content | {"files": files, "skipped": SkippedSteps(**content.get("skipped", {}))})
    numbers = (manifest.step, manifest.skipped.total, manifest.skipped.in_a_row, *(f.bytes for f in files.values()))
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a count is no number")
    if not all(isinstance(part, dict) for part in (manifest.run, manifest.layout, manifest.config)):
        raise ValueError("run, layout or config is no object")
    if any(Path(name).name != name for name in files):
        raise ValueError("a name of a file leads out of the folder")
    return manifest


def check_file(path: Path, expected: FileDigest) -> None:
    """Compare a file with its entry.

    Raises:
        DamagedCheckpoint: naming the file and how it differs.
    """
    try:
        # A file of another size need not be read.
        size = path.stat().st_size
        found = digest_file(path) if size == expected.bytes else None
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if found is None:
        raise DamagedCheckpoint(f"{path} is damaged: it has {size} bytes, expected {expected.bytes}")
    if found != expected:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# A checkpoint that does not name them is of the version before there were others.
_VERSIONS = ("random draws (version)",)


def check_same_run(found: dict[str, Any], identity: dict[str, Any], where: Path) -> None:
    """Compare what ``where`` was written with to this run's identity.

    Raises:
        ValueError: naming the first key that differs, both values and what to do.
    """
    found = dict.fromkeys(_VERSIONS, 1) | found
    # A key that an older version did not know had its default.
    for key in [key for key in identity if key in found]:
        if found[key] != identity[key]:
            raise ValueError(
                f"{key} is {identity[key]!r}, expected {found[key]!r} as in the run that {where} holds: set it back to "
                "continue that run, choose another output_dir, or start over with checkpoint.resume=never"
            )


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
    """Steps of the complete checkpoints, the one to try first at the front."""
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
