"""Names of an ablation's variants come in, the settings by which each departs from the user's configuration go out.

The groups are the studies of ReflectionCoder (arXiv 2405.17057). ``full`` is the configuration as it stands, and
belongs to every ablation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Literal

import numpy as np

from reflectron.engine.config import DataFile

if TYPE_CHECKING:
    from reflectron.engine.data.store import TokenStore

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


def chosen(groups: Sequence[str], variants: Sequence[str]) -> list[str]:
    """``full`` and what the user names, in the order of ``GROUPS``.

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
    """What the samples of each training file are; ``reflection`` are those with a student."""
    with_student = np.array([store[index].kind != "generation" for index in range(len(store))])
    kinds: list[FileKind] = []
    for number in range(count):
        own = with_student[store.file_index == number]
        kinds.append("reflection" if own.all() else "mixed" if own.any() else "generation")
    return kinds


def overrides_of(variant: str, files: Sequence[DataFile], kinds: Sequence[FileKind]) -> list[str]:
    """Settings that make ``variant`` of a configuration with these training files.

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
    """``data.train`` with reflection files listed so many times in an epoch."""
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
