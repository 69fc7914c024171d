"""A configuration and the names of variants come in, every run of the ablation goes out, before any is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reflectron.engine.config import Config
from reflectron.engine.training.run import RunInputs, prepare
from reflectron.tools.eval.token_budget import samples_of_run, steps_for_tokens, tokens_of_run
from reflectron.tools.eval.variants import FULL, kinds_of_files, overrides_of
from reflectron.tools.load_config import load_config


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    variant: str
    same_as: tuple[str, ...]
    """Other variants that come to the same configuration."""
    seed: int
    overrides: tuple[str, ...]
    """Settings that make the variant."""
    words: tuple[str, ...]
    """Command line of the training after ``reflectron``."""
    config: Config
    """What these words resolve to."""
    inputs: RunInputs
    samples: int
    """That the run trains on, repeats counted."""

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.config.output_dir)

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Base:
    """What the user asks to be varied."""

    path: str
    """YAML file."""
    overrides: tuple[str, ...]
    """Settings that win over it."""
    out: Path
    """Folder of the ablation."""

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """The configuration with ``overrides``; all share a token store, so that a file is tokenised once.

        Raises:
            ValueError: one line that names the key.
        """
        config = load_config(self.path, [*self.overrides, *overrides])
        if config.data.store_dir is not None:
            return config
        return replace(config, data=replace(config.data, store_dir=str(self.out / "token_store")))


def plan(base: Base, names: Sequence[str], seeds: Sequence[int], same_tokens: bool, progress: bool) -> list[Run]:
    """Every run, variant by variant; variants that come to the same configuration are one.

    Args:
        base: the configuration.
        names: variants, ``full`` first.
        seeds: of each; the configuration's when empty.
        same_tokens: give every variant the steps at which its tokens are nearest to those of ``full`` with its seed.
        progress: draw progress bars.

    Raises:
        ValueError: naming the key, file or variant at fault.
    """
    config = base.load()
    store = prepare(config, progress).train
    assert store is not None, "the caller asks for training files"
    kinds = kinds_of_files(store, len(config.data.train))
    overrides = {name: overrides_of(name, config.data.train, kinds) for name in names}
    by_config: dict[Config, list[str]] = {}
    for name in names:
        by_config.setdefault(base.load(overrides[name]), []).append(name)
    runs = []
    tokens: dict[int, int] = {}
    for varied, (name, *others) in by_config.items():
        inputs = prepare(varied, progress)
        assert inputs.train is not None
        for seed in seeds or [config.seed]:
            seeded, steps = replace(varied, seed=seed), None
            if same_tokens and name == FULL:
                tokens[seed] = tokens_of_run(seeded, inputs.train)
            elif same_tokens:
                steps = steps_for_tokens(seeded, inputs.train, tokens[seed])
            words = [*overrides[name], *_of_run(varied, base.out / name / f"seed-{seed}", seed, steps)]
            resolved = load_config(base.path, [*base.overrides, *words])
            runs.append(
                Run(
                    variant=name,
                    same_as=tuple(others),
                    seed=seed,
                    overrides=tuple(overrides[name]),
                    words=("train", base.path, *base.overrides, *words),
                    config=resolved,
                    inputs=inputs,
                    samples=samples_of_run(resolved, inputs.train),
                )
            )
    return runs


def _of_run(config: Config, folder: Path, seed: int, steps: int | None) -> list[str]:
    values: dict[str, object] = {
        "seed": seed,
        "output_dir": str(folder),
        "data.store_dir": config.data.store_dir,
        "checkpoint.resume": "auto",
    }
    if steps is not None:
        values["train.steps"] = steps
    # JSON is YAML.
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
