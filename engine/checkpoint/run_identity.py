"""What determines a run, key by key: a folder that holds one run must not be continued by another.

Two configurations with the same identity train the same curve, up to rounding: the parallel layout, the token budget,
the number of workers and where files lie are not part of it; what the files hold is.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.checkpoint.manifest import DamagedCheckpoint, read_manifest
from reflectron.engine.checkpoint.retention import (
    checkpoints_folder,
    export_folder,
    set_aside,
    step_folder,
    steps_to_try,
)
from reflectron.engine.checkpoint.weights_identity import weights_identity
from reflectron.engine.config import Config
from reflectron.engine.data.draws import DRAWS_VERSION
from reflectron.engine.files import remove, write_text
from reflectron.engine.preparation import RunInputs

_FINISHED = "finished.json"
# Everything else in a configuration is part of the identity, so that a new key is, until someone decides otherwise.
NOT_IDENTITY = frozenset(
    {
        # Where things are, who computes them, and how much at once.
        "output_dir",
        "parallel",
        "backends",
        "loss.backend",
        "optimizer.cpu_offload_fraction",
        "batch.tokens_per_microbatch",
        "model.make_vocab_size_divisible_by",
        "data.store_dir",
        "data.workers",
        # What watches the run and records it.
        "data.validation",
        "data.max_reject_share",
        "eval",
        "checkpoint",
        "train.validate_every",
        "train.tensorboard",
        "train.wandb_project",
        "train.collective_timeout_minutes",
        "train.heartbeat_timeout_seconds",
        "train.spike_threshold",
        "train.spike_window",
        "train.max_skipped_steps",
        # Files and folders, which count by their content.
        "model.path",
        "model.config",
        "tokenizer.path",
        "data.train.path",
        # One of the two decides.
        "train.epochs",
    }
)
# A checkpoint that does not name them is of the version before there were others.
_VERSIONS = ("random draws (version)",)


def run_identity(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """By configuration key, what a continued run must have in common with the run so far; plain JSON values."""
    assert inputs.train is not None, "a run has training files"
    store, train = inputs.train, config.train
    identity: dict[str, Any] = {
        **_settings(dataclasses.asdict(config)),
        "train.epochs": None if train.steps else train.epochs,
        "model.path (SHA-256 of the weights)": weights_identity(config.model.path) if config.model.path else None,
        **{f"{name} of the model": value for name, value in dataclasses.asdict(inputs.model.arch).items()},
        "tokenizer.path (SHA-256 of the content)": inputs.model.tokenizer.fingerprint,
        "data.train (samples of each file)": np.bincount(store.file_index, minlength=len(config.data.train)).tolist(),
        "data.train (SHA-256 of the content)": store.fingerprint,
        "random draws (version)": DRAWS_VERSION,
    }
    # As it comes back from a file, where tuples are lists.
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration that is not ``NOT_IDENTITY``, by its dotted name; of a list, a list of values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in NOT_IDENTITY:
            continue
        if isinstance(value, dict):
            found |= _settings(value, f"{key}.")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for part in value:
                for inner, one in _settings(part, f"{key}.").items():
                    found.setdefault(inner, []).append(one)
        else:
            found[key] = value
    return found


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


def look_into_folder(config: Config, inputs: RunInputs) -> str | None:
    """Before a run: whether ``output_dir`` leaves anything to do.

    Returns:
        A line that says the run is finished, or None.

    Raises:
        ValueError: when the folder holds another run, and ``checkpoint.resume`` is ``auto``.
    """
    if config.checkpoint.resume == "never":
        return None
    identity, finished = run_identity(config, inputs), Path(config.output_dir) / _FINISHED
    if (content := _read_finished(finished)) is not None:
        check_same_run(content["run"], identity, finished)
    root = checkpoints_folder(config.output_dir)
    saved = steps_to_try(root).steps
    if content is not None:
        lost = _lost_of_export(config, content)
        if not lost or not saved:
            also = f"; {lost}, and no checkpoint is left to make it from" if lost else ""
            return (
                f"{config.output_dir}: this run finished after step {content['step']}{also}; "
                "checkpoint.resume=never trains it again"
            )
    for step in saved:
        try:
            check_same_run(read_manifest(step_folder(root, step)).run, identity, step_folder(root, step))
        except DamagedCheckpoint:
            # The ranks read the files and say what is wrong.
            continue
        break
    return None


def _read_finished(path: Path) -> dict[str, Any] | None:
    """What ``mark_finished`` wrote; None when it did not, or the file is damaged: then the export is made again."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content["run"], dict) and type(content["step"]) is int else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _lost_of_export(config: Config, finished: dict[str, Any]) -> str:
    """Which file of the finished run's weights is not there as it was written; empty when all are."""
    folder, sizes = export_folder(config.output_dir), finished.get("export")
    # A run that finished before they were noted.
    if not isinstance(sizes, dict):
        sizes = {}
    for name in (*sizes, "config.json"):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{folder / name} is missing"
        if size != sizes.get(name, size):
            return f"{folder / name} has {size} bytes, expected {sizes[name]}"
    return ""


def mark_finished(config: Config, identity: dict[str, Any], step: int) -> None:
    """Note that the run of ``step`` updates is complete, and the size of each file of its exported weights.

    The other files of the export are small, and a user may well change them.
    """
    weights = export_folder(config.output_dir).glob("*.safetensors")
    content = {"step": step, "export": {file.name: file.stat().st_size for file in weights}, "run": identity}
    write_text(Path(config.output_dir) / _FINISHED, json.dumps(content, indent=2) + "\n")


def start_over(config: Config) -> None:
    """As a run begins anew: set aside what would make a later start believe that it had come further."""
    remove(Path(config.output_dir) / _FINISHED)
    set_aside(checkpoints_folder(config.output_dir))
