"""What determines a run, key by key: a folder that holds one run must not be continued by another.

Two configurations with the same identity train the same curve, up to rounding: the parallel layout, the token budget,
the number of workers and where files lie are not part of it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from reflectron.engine.checkpoint.manifest import DamagedCheckpoint, read_manifest
from reflectron.engine.checkpoint.retention import checkpoints_folder, set_aside, step_folder, steps_to_try
from reflectron.engine.config import Config
from reflectron.engine.preparation import RunInputs

_FINISHED = "finished.json"
# Who computes something, and where.
_PLACEMENT = ("loss.backend", "optimizer.cpu_offload_fraction")


def run_identity(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """By configuration key, what a continued run must have in common with the run so far; plain JSON values."""
    assert inputs.train is not None, "a run has training files"
    data, train = config.data, config.train
    identity: dict[str, Any] = {
        "seed": config.seed,
        "model.path": _name(config.model.path),
        "model.config": _name(config.model.config),
        "model.dtype": config.model.dtype,
        "model.fp8": config.model.fp8,
        **{f"{name} of the model": value for name, value in dataclasses.asdict(inputs.model.arch).items()},
        "tokenizer.path (SHA-256 of the content)": inputs.model.tokenizer.fingerprint,
        "data.template": data.template,
        "data.max_length": data.max_length,
        "data.train (repeats)": [file.repeat for file in data.train],
        "data.train (SHA-256 of the content)": inputs.train.fingerprint,
        "batch.global_batch_size": config.batch.global_batch_size,
        "train.steps": train.steps,
        "train.epochs": None if train.steps else train.epochs,
    }
    for section in ("mask", "loss", "optimizer", "lr_schedule"):
        values = dataclasses.asdict(getattr(config, section))
        identity |= {f"{section}.{key}": value for key, value in values.items()}
    for key in _PLACEMENT:
        del identity[key]
    # As it comes back from a file, where tuples are lists.
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def _name(path: str | None) -> str | None:
    # The folder above differs between machines.
    return Path(path).resolve().name if path else None


def check_same_run(found: dict[str, Any], identity: dict[str, Any], where: Path) -> None:
    """Compare what ``where`` was written with to this run's identity.

    Raises:
        ValueError: naming the first key that differs, both values and what to do.
    """
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
    if finished.exists():
        content = json.loads(finished.read_text(encoding="utf-8"))
        check_same_run(content["run"], identity, finished)
        return (
            f"{config.output_dir}: this run finished after step {content['step']}; "
            "checkpoint.resume=never trains it again"
        )
    root = checkpoints_folder(config.output_dir)
    for step in steps_to_try(root):
        try:
            check_same_run(read_manifest(step_folder(root, step)).run, identity, step_folder(root, step))
        except DamagedCheckpoint:
            # The ranks read the files and say what is wrong.
            continue
        break
    return None


def mark_finished(config: Config, identity: dict[str, Any], step: int) -> None:
    """Note that the run of ``step`` updates is complete, its export included."""
    content = {"step": step, "run": identity}
    (Path(config.output_dir) / _FINISHED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def start_over(config: Config) -> None:
    """As a run begins anew: set aside what would make a later start believe that it had come further."""
    (Path(config.output_dir) / _FINISHED).unlink(missing_ok=True)
    set_aside(checkpoints_folder(config.output_dir))
