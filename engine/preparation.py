"""What a run needs before any process group exists: architecture, tokenizer, token stores, all of it checked.

``prepare`` builds the stores and is called by one process; every rank then calls ``open_run_inputs``, which reads what
was built. Neither imports torch, so a wrong path or a sample too long for the budget is reported before anything heavy
starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reflectron.engine.config import Config, DataFile
from reflectron.engine.data.draws import Draws
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import SampleOrder
from reflectron.engine.data.store import TokenStore, build_store, open_store
from reflectron.engine.data.tokenizer import Tokenizer, load_tokenizer
from reflectron.engine.model.families import (
    Architecture,
    check_parallel,
    layers_per_stage,
    parse_architecture,
    read_hf_config,
)
from reflectron.engine.model.tokenizer_fit import check_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The model that is trained, before its weights are read."""

    hf_config: dict[str, Any]
    """``config.json`` of the original."""
    arch: Architecture
    """Its architecture, with a vocabulary that holds the tokenizer's tags."""
    original_vocab_size: int
    """Rows of the original's embedding."""
    tokenizer: Tokenizer
    """With the tags."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the two go together."""


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Model and data of a run."""

    model: ModelInputs
    train: TokenStore | None
    """Training samples; None when the configuration names no files."""
    validation: TokenStore | None
    """Held-out samples; likewise."""


def read_model_inputs(config: Config) -> ModelInputs:
    """Architecture and tokenizer, checked against the parallel layout.

    Raises:
        ValueError: naming the key or file at fault.
    """
    source = config.model.path or config.model.config
    if source is None:
        raise ValueError("model.path is null, expected a checkpoint folder, or model.config a config.json")
    hf_config = read_hf_config(source)
    arch = parse_architecture(hf_config, str(source))
    tokenizer_path = config.tokenizer.path or config.model.path
    assert tokenizer_path is not None, "check_relations asks for tokenizer.path beside model.config"
    tokenizer = load_tokenizer(tokenizer_path, config.data.template)
    notes = check_tokenizer(arch, tokenizer, tokenizer_path, hf_config, config.model.path)
    check_parallel(arch, config.parallel)
    layers_per_stage(arch.num_layers, config.parallel)
    return ModelInputs(
        hf_config=hf_config,
        arch=replace(arch, vocab_size=max(arch.vocab_size, tokenizer.size)),
        original_vocab_size=arch.vocab_size,
        tokenizer=tokenizer,
        notes=notes,
    )


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
    """What ``prepare`` built, on any rank."""
    model = read_model_inputs(config)

    def open_part(part: str, files: tuple[DataFile, ...]) -> TokenStore | None:
        return open_store(config.data, files, model.tokenizer, store_folder(config, part)) if files else None

    return RunInputs(
        model=model,
        train=open_part("train", config.data.train),
        validation=open_part("validation", config.data.validation),
    )


def check_budget(store: TokenStore, files: tuple[DataFile, ...], config: Config) -> None:
    """Refuse a budget that a sample's two views exceed when the student sees the most.

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
    """Refuse samples that are longer than the model has positions; a smaller ``data.max_length`` drops and counts them.

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
    """The order in which the samples of ``files`` are trained on."""
    return SampleOrder([file.repeat for file in files], store.file_index, seed)


def run_length(config: Config, order: SampleOrder) -> tuple[int, float | None]:
    """Steps of a run, and the epochs after which its last batch stops short; None where a number of steps ends it.

    Raises:
        ValueError: when that is no step at all.
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
    """Where the token store of ``train`` or ``validation`` is."""
    return Path(config.data.store_dir or Path(config.output_dir) / "token_store") / part
