"""What ``reflectron bench train`` is asked to measure, as its ranks read it, and the variants that it knows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from reflectron.tools.planner.samples import PHASES

BASELINE = "hf_reference"
ENGINE = "engine"
SCHEDULE = tuple((low + high) / 2 for low, high in PHASES)
"""Mask rates that stand for a whole run: the middle of each of its phases, which are equally long."""


@dataclass(frozen=True)
class Variant:
    """One way of training on the same samples."""

    layout: Literal["packed", "one_by_one", "hidden_kept"] = "packed"
    fused_head: bool = True
    """The Triton backend of the head where it can run; plain torch in chunks of rows otherwise."""
    note: str = ""


VARIANTS = {
    ENGINE: Variant(note="as `reflectron train`"),
    "engine_unpacked": Variant(layout="one_by_one", note="a sample a microbatch"),
    "engine_full_student": Variant(layout="hidden_kept", note="hidden tokens stay in the student's row"),
    "engine_plain_head": Variant(fused_head=False, note="loss.backend reference"),
}
"""Of the engine; ``BASELINE`` is beside them."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """The engine built once more with other settings."""

    name: str
    overrides: tuple[str, ...]
    """``key=value``"""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One shape."""

    shape: str
    config: str
    """YAML file of the engine's settings, beside the overrides."""
    overrides: tuple[str, ...]
    layers: int | None
    """None takes as many as fit."""
    samples: int
    data: str | None
    tokenizer: str | None
    mask_rates: tuple[float, ...]
    variants: tuple[str, ...]
    builds: tuple[Build, ...]
    rounds: int
    deadline: float
    """``time.time()`` after which no more work begins."""
    calibration: str | None
    rows: str
    """File that rows are added to."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_plan(path: Path) -> TrainPlan:
    """What ``TrainPlan.write`` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    builds = tuple(Build(name=b["name"], overrides=tuple(b["overrides"])) for b in content.pop("builds"))
    content |= {key: tuple(content[key]) for key in ("overrides", "mask_rates", "variants")}
    return TrainPlan(**content, builds=builds)


def parse_build(text: str) -> Build:
    """``name:key=value,key=value``

    Raises:
        ValueError: when it is spelt otherwise.
    """
    name, colon, settings = text.partition(":")
    overrides = tuple(settings.split(",")) if settings else ()
    if not name or not colon or not all("=" in word for word in overrides) or not overrides:
        raise ValueError(f"--build is {text!r}, expected name:key=value,key=value")
    return Build(name=name, overrides=overrides)
