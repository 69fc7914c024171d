"""Which implementation computes attention, layers, weight gradients and AdamW: from configuration and machine to names.

Each part has an ordered table of candidates, the best first and last the plain one that works everywhere. ``auto``
takes the first without a reason against it; a candidate that is asked for by name and has one ends the run before it
starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from reflectron.engine.config import Config
from reflectron.engine.model.families import Architecture


@dataclass(frozen=True)
class Use:
    """What a backend would have to do."""

    config: Config
    arch: Architecture | None
    """None where no model is known yet: its sizes then count as fine."""
    device: torch.device


# One sentence why not, or None.
Objection = Callable[[Use], str | None]


@dataclass(frozen=True, kw_only=True)
class Backends:
    """What computes a run; the default is plain torch throughout."""

    attention: str = "sdpa"
    layers: str = "torch"
    weight_gradient: str = "torch"
    adamw: str = "torch"
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)
    """By part, the candidates before the chosen one, and why each was not taken."""

    @property
    def names(self) -> dict[str, str]:
        """The choice for each part."""
        return {part: getattr(self, part) for part in CANDIDATES}

    def lines(self) -> list[str]:
        """For a person: one line a part, with the reasons."""
        return [f"backends: {part} {name}{self._reasons(part)}" for part, name in self.names.items()]

    def _reasons(self, part: str) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.passed_over.get(part, {}).items():
            by_reason.setdefault(reason, []).append(name)
        reasons = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return f" ({'; '.join(reasons)})" if reasons else ""


PLAIN = Backends()


def choose_backends(config: Config, arch: Architecture | None, device: torch.device) -> Backends:
    """The backends of a run on ``device``, as the section ``backends`` of its configuration says.

    Raises:
        ValueError: when one is asked for by name and cannot do it; names the key, the reason and what can.
    """
    use = Use(config, arch, device)
    chosen: dict[str, str] = {}
    passed_over: dict[str, dict[str, str]] = {}
    for part, candidates in CANDIDATES.items():
        asked = getattr(config.backends, part)
        passed_over[part] = {}
        for name, objection in candidates.items():
            if asked not in ("auto", name):
                continue
            reason = objection(use)
            if reason is None:
                chosen[part] = name
                break
            if asked == name:
                able = [repr(other) for other, objects in candidates.items() if objects(use) is None]
                raise ValueError(f"backends.{part} is {name!r}, expected 'auto' or {' or '.join(able)}: {reason}")
            passed_over[part][name] = reason
    return Backends(**chosen, passed_over=passed_over)


def without_cuda(use: Use) -> str | None:
    """For what runs on CUDA alone."""
    return None if use.device.type == "cuda" else "needs CUDA"


def without_package(distribution: str, module: str, install: str) -> str | None:
    """Whether ``module`` of ``distribution`` can be imported; ``install`` says how to get it."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} is not installed ({install})"
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension built for another torch raises whatever it likes
        first_line = (str(error).splitlines() or [""])[0]
        return f"{distribution} cannot be imported: {type(error).__name__}: {first_line}"
    return None


def _nothing(use: Use) -> None:
    """Plain torch works everywhere."""


def _not_built(use: Use) -> str | None:
    return without_cuda(use) or "the engine does not use it yet"


CANDIDATES: dict[str, dict[str, Objection]] = {
    "attention": {
        "transformer_engine": _not_built,
        "flash_attention_3": _not_built,
        "flash_attention_2": _not_built,
        "torch_varlen": _not_built,
        "sdpa": _nothing,
    },
    "layers": {"transformer_engine": _not_built, "liger": _not_built, "torch": _nothing},
    "weight_gradient": {"apex": _not_built, "addmm": _not_built, "torch": _nothing},
    "adamw": {"transformer_engine": _not_built, "apex": _not_built, "torch_fused": _not_built, "torch": _nothing},
}
