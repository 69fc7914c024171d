"""Plans an ablation: a configuration and the names of variants become all runs, before any is trained.

The groups of variants are the studies of ReflectionCoder (arXiv 2405.17057). ``full`` is the configuration as it
stands, and belongs to every ablation. Tokens of a run are those that enter the model: teacher views, student views and
generation samples, without padding, counted by the code that makes the batches. A student's view gets shorter as the
mask rate rises with the share of the run that is done, so the count depends on the run's length.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from reflectron.engine.config import Config, DataFile
from reflectron.engine.parallel.launch import resolve_environment
from reflectron.engine.parallel.machine import check_machine
from reflectron.engine.training.run import RunInputs, prepare, run_length, sample_order
from reflectron.tools.load_config import load_config

if TYPE_CHECKING:
    from reflectron.engine.data.sampler import SampleOrder
    from reflectron.engine.data.store import TokenStore


@dataclass(frozen=True)
class AblationRun:
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
class AblationBase:
    """The configuration that is varied."""

    path: str
    """YAML file."""
    overrides: tuple[str, ...]
    """Settings that win over it."""
    out: Path
    """Folder of the ablation."""

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """Return the configuration with ``overrides``; all share a token store, so that a file is tokenised once.

        Raises:
            ValueError: one line that names the key.
        """
        config = load_config(self.path, [*self.overrides, *overrides])
        if config.data.store_dir is not None:
            return config
        return replace(config, data=replace(config.data, store_dir=str(self.out / "token_store")))

    def run(
        self,
        variant: str,
        same_as: tuple[str, ...],
        seed: int,
        overrides: tuple[str, ...],
        words: Sequence[str],
        inputs: RunInputs,
    ) -> AblationRun:
        """Return the run of a variant that ``words`` make of the configuration."""
        config = load_config(self.path, [*self.overrides, *words])
        assert inputs.train is not None
        return AblationRun(
            variant=variant,
            same_as=same_as,
            seed=seed,
            overrides=overrides,
            words=("train", self.path, *self.overrides, *words),
            config=config,
            inputs=inputs,
            samples=samples_of_run(config, inputs.train),
        )


def check_ablation(base: AblationBase, seeds: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Find out before any training what can be wrong; return the seeds.

    Raises:
        ValueError: naming the argument or key at fault.
    """
    if resolve_environment(environment) is not None:
        raise ValueError("eval ablate starts its training runs itself: start it once, without torchrun or srun")
    for seed in seeds:
        if not seed.isdecimal():
            raise ValueError(f"--seeds holds {seed!r}, expected numbers of 0 or more")
    config = base.load()
    if not config.data.train:
        raise ValueError("data.train is empty, expected at least one file")
    check_machine(config)
    return [int(seed) for seed in dict.fromkeys(seeds)]


def plan_ablation(
    base: AblationBase, names: Sequence[str], seeds: Sequence[int], same_tokens: bool, progress: bool
) -> list[AblationRun]:
    """Return every run, variant by variant; variants that come to the same configuration are one.

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
            runs.append(base.run(name, tuple(others), seed, tuple(overrides[name]), words, inputs))
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


FULL = "full"
_METHOD = {
    # The student sees none of the reflection sequence from the first step on, as the reference's `--all_mask` has it.
    # (Its run without any mask shows the student everything, which leaves nothing to distil.)
    "no_dynamic_mask": ["mask.strategy=all"],
    # The student stays, and learns the answer by cross entropy alone.
    "no_kl": ["loss.kl_weight=0.0"],
    # No student: the reference without `--logit`. A view that hides nothing costs no tokens.
    "no_distillation": ["mask.strategy=none", "loss.kl_weight=0.0", "loss.ce_student_weight=0.0"],
}
_NO_REFLECTION_DATA = "no_reflection_data"
_STRATEGIES = {
    f"mask_{strategy}": [f"mask.strategy={strategy}"]
    for strategy in ("block", "sequential_block", "random_block", "sequential_token", "random_token")
}
_ORDERS = {
    f"order_{''.join(order)}": ["mask.strategy=block", f"mask.order={''.join(order)}"] for order in permutations("tce")
}
_UPSAMPLING = {f"upsampling_{times}": times for times in range(4)}

GROUPS: dict[str, tuple[str, ...]] = {
    "method": (*_METHOD, _NO_REFLECTION_DATA),
    "strategies": tuple(_STRATEGIES),
    "orders": tuple(_ORDERS),
    "upsampling": tuple(_UPSAMPLING),
}
"""Variants of each study, beside ``full``."""

FileKind = Literal["generation", "reflection", "mixed"]


def chosen_variants(groups: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Return ``full`` and what the user names, in the order of ``GROUPS``.

    Args:
        groups: studies; only looked at when ``variants`` is empty.
        variants: single variants.

    Raises:
        ValueError: for a name that there is not.
    """
    known = [name for names in GROUPS.values() for name in names]
    for option, names, allowed in (("groups", groups, list(GROUPS)), ("variants", variants, [FULL, *known])):
        for name in names:
            if name not in allowed:
                raise ValueError(f"--{option} holds {name!r}, expected names of: {', '.join(allowed)}")
    wanted = set(variants) or {name for group in groups for name in GROUPS[group]}
    return [FULL, *(name for name in known if name in wanted)]


def kinds_of_files(store: TokenStore, count: int) -> list[FileKind]:
    """Return what the samples of each training file are; ``reflection`` are those with a student."""
    with_student = np.array([store[index].kind != "generation" for index in range(len(store))])
    kinds: list[FileKind] = []
    for number in range(count):
        own = with_student[store.file_index == number]
        kinds.append("reflection" if own.all() else "mixed" if own.any() else "generation")
    return kinds


def overrides_of(variant: str, files: Sequence[DataFile], kinds: Sequence[FileKind]) -> list[str]:
    """Return the settings that make ``variant`` of a configuration with these training files.

    Raises:
        ValueError: when the variant needs files of reflection samples alone, and there are none or only such.
    """
    if variant == FULL:
        return []
    if variant == _NO_REFLECTION_DATA:
        return [_reflection_listed(variant, 0, files, kinds)]
    if variant in _UPSAMPLING:
        return [_reflection_listed(variant, _UPSAMPLING[variant], files, kinds)]
    return (_METHOD | _STRATEGIES | _ORDERS)[variant]


def _reflection_listed(variant: str, times: int, files: Sequence[DataFile], kinds: Sequence[FileKind]) -> str:
    """Return ``data.train`` with reflection files listed so many times in an epoch."""
    for file, kind in zip(files, kinds, strict=True):
        if kind == "mixed":
            raise ValueError(
                f"data file {file.path} holds reflection and instruction samples, expected one kind: {variant} lists "
                "the reflection samples by themselves, so split the file"
            )
    if "reflection" not in kinds:
        raise ValueError(f"data.train has no file of reflection samples, expected one for the variant {variant}")
    listed = [
        dataclasses.replace(file, repeat=float(times)) if kind == "reflection" else file
        for file, kind in zip(files, kinds, strict=True)
        if kind == "generation" or times
    ]
    if not listed:
        raise ValueError(f"data.train has files of reflection samples only, so that {variant} leaves nothing to train")
    # JSON is YAML.
    return "data.train=" + json.dumps([dataclasses.asdict(file) for file in listed])


# Tokens are nearly proportional to steps, so that two or three are enough.
_MOST_TRIALS = 8


def samples_of_run(config: Config, store: TokenStore) -> int:
    """Return how many samples a run trains on, repeats counted."""
    order = sample_order(store, config.data.train, config.seed)
    steps, epochs = run_length(config, order)
    return order.total_samples(epochs) if epochs else steps * config.batch.global_batch_size


def tokens_of_run(config: Config, store: TokenStore) -> int:
    """Return how many tokens enter the model in a whole run."""
    order = sample_order(store, config.data.train, config.seed)
    return _tokens(config, store, order, *run_length(config, order))


def steps_for_tokens(config: Config, store: TokenStore, tokens: int) -> int:
    """Return the steps of the run whose tokens come nearest to ``tokens``, as far as a few trials find it."""
    order = sample_order(store, config.data.train, config.seed)
    counted: dict[int, int] = {}
    steps, _ = run_length(config, order)
    while steps not in counted and len(counted) < _MOST_TRIALS:
        counted[steps] = _tokens(config, store, order, steps, None)
        steps = max(round(steps * tokens / counted[steps]), 1)
    return min(counted, key=lambda steps: abs(counted[steps] - tokens))


def _tokens(config: Config, store: TokenStore, order: SampleOrder, steps: int, epochs: float | None) -> int:
    from reflectron.engine.data.batch_source import StoreSource
    from reflectron.engine.data.global_batch import count_tokens

    source = StoreSource(store, order, config, total_steps=steps, epochs=epochs)
    return sum(count_tokens(source.samples(step).views).total for step in range(steps))
