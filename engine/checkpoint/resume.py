"""From a run's checkpoint folder to the newest checkpoint whose files are intact; every rank calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from reflectron.engine.checkpoint.manifest import DamagedCheckpoint, Manifest, check_file, read_manifest
from reflectron.engine.checkpoint.on_main import from_main
from reflectron.engine.checkpoint.retention import step_folder, steps_to_try
from reflectron.engine.checkpoint.run_identity import check_same_run


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on."""

    folder: Path
    """An intact checkpoint."""
    manifest: Manifest
    """Its manifest."""
    damaged: tuple[str, ...]
    """What is wrong with ``latest`` and with the newer ones, a line each."""


def find_resume_point(root: Path, identity: dict[str, Any]) -> ResumePoint | None:
    """The newest intact checkpoint up to ``latest``; each rank reads its share of the files.

    Args:
        root: the run's checkpoints.
        identity: of the run that wants to go on.

    Returns:
        None when there is no checkpoint.

    Raises:
        ValueError: when all are damaged, naming the files, or when they are another run's.
    """
    # One rank looks: a shared file system may show each machine another state of a folder.
    candidates = from_main(steps_to_try(root) if dist.get_rank() == 0 else None)
    assert candidates is not None
    notes = [candidates.note] if candidates.note else []
    damaged: list[str] = []
    for step in candidates.steps:
        folder = step_folder(root, step)
        found = _read_intact(folder)
        if isinstance(found, Manifest):
            check_same_run(found.run, identity, folder)
            used = [f"{line}; the checkpoint before it is used" for line in damaged]
            return ResumePoint(folder, found, (*notes, *used))
        damaged.append(found)
    if damaged:
        raise ValueError(
            f"{root} holds no intact checkpoint ({'; '.join(damaged)}): restore a file that is named, or start over "
            "with checkpoint.resume=never"
        )
    return None


def _read_intact(folder: Path) -> Manifest | str:
    """The manifest when all files are as it says, else what is wrong; the same on all ranks."""
    manifest, error = None, ""
    try:
        manifest = read_manifest(folder)
        for name in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
            check_file(folder / name, manifest.files[name])
    except (DamagedCheckpoint, OSError) as failure:
        error = str(failure)
    errors = [error] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error), None)
    if first is not None:
        return first
    assert manifest is not None, "a rank without an error has read the manifest"
    return manifest
