"""``reflectron validate``: compute a model's loss terms on the validation files of a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.engine.config import Config
from reflectron.tools.load_config import add_config_arguments, load_config
from reflectron.tools.ranks import run_as_ranks

if TYPE_CHECKING:
    from reflectron.engine.parallel.process_groups import ParallelGroups
    from reflectron.engine.training.run import RunInputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    add_config_arguments(parser)
    parser.add_argument("--model", metavar="DIR", help="checkpoint to validate instead of the configured model")
    parser.add_argument("--json", metavar="OUT", help="write the loss terms there as well")


def run(args: argparse.Namespace) -> int:
    """Validate; return the exit code."""
    overrides = list(args.overrides)
    if args.model:
        overrides += [f"model.path={args.model}", "model.config=null", "tokenizer.path=null"]
    config = load_config(args.config, overrides)
    if not config.data.validation:
        raise ValueError("data.validation is empty, expected at least one file")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=()))
    words = ["validate", args.config, *args.overrides]
    words += [word for flag in ("model", "json") if (value := getattr(args, flag)) for word in (f"--{flag}", value)]

    def body(config: Config, inputs: RunInputs, groups: ParallelGroups) -> int:
        _validate(config, inputs, groups, args.json)
        return 0

    return run_as_ranks(config, words, body)


def _validate(config: Config, inputs: RunInputs, groups: ParallelGroups, json_file: str | None) -> None:
    import torch

    from reflectron.engine.model.backends.choose import choose_on_every_rank
    from reflectron.engine.training.build import load_model
    from reflectron.engine.training.flops import decoder_shape, forward_cost
    from reflectron.engine.training.run import held_out_samples
    from reflectron.engine.training.step import validate
    from reflectron.tools.run_log import describe_terms

    backends = choose_on_every_rank(config, inputs.model.arch, groups.device)
    chunks = load_model(config, inputs.model, groups, getattr(torch, config.model.dtype), backends)
    cost = forward_cost(decoder_shape(inputs.model.arch, config))
    samples = held_out_samples(config, inputs)
    terms = validate(chunks, samples, config, cost, groups)
    if groups.is_main:
        print(f"{len(samples.views)} samples: {describe_terms(terms)}")
        if json_file:
            Path(json_file).write_text(json.dumps(vars(terms)) + "\n", encoding="utf-8")


SUBCOMMANDS = {"": (add_arguments, run)}
