"""A run and its folder: inputs prepared and checked, what makes two runs the same, how a run ends and is stopped.

One process calls ``prepare``, which tokenises and checks everything; every rank then reads the result by
``open_run_inputs``. Nothing here needs a process group or megatron-core, so that a wrong path or a sample too long for
the budget is reported before anything heavy starts.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from reflectron.engine.checkpoint.folder import (
    DamagedCheckpoint,
    check_same_run,
    checkpoints_folder,
    export_folder,
    read_manifest,
    set_aside,
    step_folder,
    steps_to_try,
)
from reflectron.engine.config import Config, DataFile
from reflectron.engine.data.batch_source import BatchSource, StepSamples, StoreSource
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import DRAWS_VERSION, Draws, SampleOrder, SampleRef, mask_draws
from reflectron.engine.data.store import TokenStore, build_store, open_store
from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.data.views import SampleViews, make_views
from reflectron.engine.files import remove, write_text
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.inputs import ModelInputs, read_model_inputs
from reflectron.engine.weights.identity import weights_identity

# ---- inputs ----


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Model and data of a run."""

    model: ModelInputs
    train: TokenStore | None
    """Training samples; None when the configuration names no files."""
    validation: TokenStore | None
    """Held-out samples; None when the configuration names no files."""


def prepare(config: Config, progress: bool) -> RunInputs:
    """Read, check and tokenise everything; a second call finds its work done.

    Args:
        config: the run.
        progress: draw progress bars.

    Raises:
        ValueError: naming the key, file or record at fault.
        OSError: when the stores cannot be written.
    """
    model = read_model_inputs(config)

    def build(part: str, files: tuple[DataFile, ...]) -> TokenStore | None:
        if not files:
            return None
        store = build_store(config.data, files, model.tokenizer, store_folder(config, part), progress)
        if len(store) == 0:
            raise ValueError(
                f"data.{part} has no sample: every record was rejected; {store_folder(config, part)} says why"
            )
        check_budget(store, files, config)
        check_positions(store, files, config, model.arch)
        if part == "train":
            run_length(config, sample_order(store, files, config.seed))
        return store

    return RunInputs(
        model=model,
        train=build("train", config.data.train),
        validation=build("validation", config.data.validation),
    )


def open_run_inputs(config: Config) -> RunInputs:
    """Return what ``prepare`` built, on any rank."""
    model = read_model_inputs(config)

    def open_part(part: str, files: tuple[DataFile, ...]) -> TokenStore | None:
        return open_store(config.data, files, model.tokenizer, store_folder(config, part)) if files else None

    return RunInputs(
        model=model,
        train=open_part("train", config.data.train),
        validation=open_part("validation", config.data.validation),
    )


def training_source(config: Config, inputs: RunInputs) -> BatchSource:
    """Return the source of the samples of every step of the run.

    Raises:
        ValueError: when there are no training files, or the run has no step.
    """
    if inputs.train is None:
        raise ValueError("data.train is empty, expected at least one file")
    order = sample_order(inputs.train, config.data.train, config.seed)
    total_steps, epochs = run_length(config, order)
    return StoreSource(inputs.train, order, config, total_steps=total_steps, epochs=epochs)


def held_out_samples(config: Config, inputs: RunInputs) -> StepSamples:
    """Return all validation samples, with the student at the end of the mask schedule.

    The rate is 1 at any point of a run, so that its validations measure one task: the answer without the reflection.

    Raises:
        ValueError: when there are no validation files.
    """
    if inputs.validation is None:
        raise ValueError("data.validation is empty, expected at least one file")
    rate = 1.0

    def views(index: int, sample: TokenizedSample) -> SampleViews:
        draws = mask_draws(config.seed, SampleRef(0, index, 0))
        return make_views(sample, visible_tokens(sample, config.mask, rate, draws))

    store = inputs.validation
    return StepSamples(views=[views(index, store[index]) for index in range(len(store))], mask_rate=rate)


def check_budget(store: TokenStore, files: tuple[DataFile, ...], config: Config) -> None:
    """Reject a budget that a sample's two views exceed when the student sees the most.

    Raises:
        ValueError: naming the sample that needs the most tokens.
    """
    budget = config.batch.tokens_per_microbatch
    worst, needed = -1, budget
    for index in np.flatnonzero(2 * store.lengths > budget):
        sample = store[int(index)]
        seen = visible_tokens(sample, config.mask, 0.0, Draws(0))
        tokens = len(sample.input_ids) + (0 if seen is None or seen.all() else int(seen.sum()))
        if tokens > needed:
            worst, needed = int(index), tokens
    if worst >= 0:
        raise ValueError(
            f"batch.tokens_per_microbatch is {budget}, expected at least {needed}: record "
            f"{store.record_index[worst]} of {files[store.file_index[worst]].path} has that many tokens in its two "
            "views (or lower data.max_length)"
        )


def check_positions(store: TokenStore, files: tuple[DataFile, ...], config: Config, arch: Architecture) -> None:
    """Reject samples that are longer than the model has positions; a smaller ``data.max_length`` drops and counts them.

    Raises:
        ValueError: naming the longest sample.
    """
    positions = arch.rope.positions
    longest = int(store.lengths.argmax()) if len(store) else 0
    if len(store) and store.lengths[longest] > positions:
        raise ValueError(
            f"data.max_length is {config.data.max_length}, expected at most {positions}, the positions of the model "
            f"(max_position_embeddings): record {store.record_index[longest]} of "
            f"{files[store.file_index[longest]].path} has {store.lengths[longest]} tokens"
        )


def sample_order(store: TokenStore, files: tuple[DataFile, ...], seed: int) -> SampleOrder:
    """Return the order in which the samples of ``files`` are trained on."""
    return SampleOrder([file.repeat for file in files], store.file_index, seed)


def run_length(config: Config, order: SampleOrder) -> tuple[int, float | None]:
    """Return the steps of a run, and the epochs that end its last batch early; None where a number of steps ends it.

    Raises:
        ValueError: when the run has no step at all.
    """
    if config.train.steps:
        return config.train.steps, None
    steps = order.total_steps(config.train.epochs, config.batch.global_batch_size)
    if steps < 1:
        raise ValueError(
            f"the run has 0 steps: train.epochs {config.train.epochs:g} of data.train list no sample with their "
            "data.train[*].repeat; expected at least one: raise either, or set train.steps"
        )
    return steps, config.train.epochs


def store_folder(config: Config, part: str) -> Path:
    """Return the folder of the token store of ``train`` or ``validation``."""
    return Path(config.data.store_dir or Path(config.output_dir) / "token_store") / part


# ---- identity ----

# Two configurations of one identity train the same curve, up to rounding: a folder that holds one run must not be
# continued by another. Every key that is not listed is part of the identity, so that a new one is until someone decides
# otherwise.
NOT_IDENTITY = frozenset(
    {
        # Paths, implementations and layout.
        "output_dir",
        "parallel",
        "backends",
        "loss.backend",
        "optimizer.cpu_offload_fraction",
        "batch.tokens_per_microbatch",
        "model.make_vocab_size_divisible_by",
        "data.store_dir",
        "data.workers",
        # Watching and recording.
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
        # Files and folders are identified by their content.
        "model.path",
        "model.config",
        "tokenizer.path",
        "data.train.path",
        # Together with train.steps; one of the two decides.
        "train.epochs",
    }
)


def run_identity(config: Config, inputs: RunInputs) -> dict[str, Any]:
    """Return, by configuration key, what a resumed run must have in common with the run so far; plain JSON values."""
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
    """Return every key of a configuration outside ``NOT_IDENTITY`` by its dotted name; for a list, a list of values."""
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


# ---- the folder ----

_FINISHED = "finished.json"


def look_into_folder(config: Config, inputs: RunInputs) -> str | None:
    """Find out, before a run, whether ``output_dir`` leaves anything to do.

    Returns:
        A line that says that the run is finished, or None.

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
    """Return what ``mark_finished`` wrote; None when it is missing or damaged: the export is then repeated."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content["run"], dict) and type(content["step"]) is int else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _lost_of_export(config: Config, finished: dict[str, Any]) -> str:
    """Name a file of the finished run's weights that is not there as it was written; empty when all are."""
    folder, sizes = export_folder(config.output_dir), finished.get("export")
    # A run that finished before sizes were recorded.
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
    """Record that the run of ``step`` updates is complete, and the size of each file of its exported weights.

    The other files of the export are small, and a user may well change them.
    """
    weights = export_folder(config.output_dir).glob("*.safetensors")
    content = {"step": step, "export": {file.name: file.stat().st_size for file in weights}, "run": identity}
    write_text(Path(config.output_dir) / _FINISHED, json.dumps(content, indent=2) + "\n")


def start_over(config: Config) -> None:
    """Set aside, as a run begins anew, what would make a later start believe that it had come further."""
    remove(Path(config.output_dir) / _FINISHED)
    set_aside(checkpoints_folder(config.output_dir))


# ---- stop signals ----


@dataclass
class StopRequest:
    """Whether this process has been asked to stop its training run soon."""

    received: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Have SIGTERM, and Slurm's SIGUSR1 before a time limit, mark the request instead of ending the process.

    Only the main thread may call it. The run finishes its step, saves and ends with ``REQUEUE_EXIT_CODE``.
    """
    request = StopRequest()

    def mark(number: int, frame: FrameType | None) -> None:
        request.received = True

    previous = {number: signal.signal(number, mark) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
