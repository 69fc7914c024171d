"""``manifest.json``: what a training checkpoint holds, and whether it still does.

It is written last and lists every other file with size and SHA-256, so that a folder that was cut short or changed is
found before a tensor of it is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reflectron.engine.files import sha256_of, write_text
from reflectron.engine.text import printable

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
    """Of the run so far."""
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
    """Of python and packages."""
    files: dict[str, FileDigest]
    """Every other file of the folder."""
    skipped: SkippedSteps = SkippedSteps()
    """Of the steps before it, those that changed nothing."""
    backends: dict[str, str] = field(default_factory=dict)
    """What computed it, by key of the section ``backends``."""


def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file, read in pieces."""
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
