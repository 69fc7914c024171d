"""Which backends a planned run is taken to use: what its configuration names, and where it says ``auto``, what the
machines are assumed to have installed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from reflectron.engine.config import Config

if TYPE_CHECKING:
    from reflectron.tools.planner.hardware import Cluster


@dataclass(frozen=True, kw_only=True)
class Backends:
    """Named as in the section ``backends`` of a run."""

    attention: str
    layers: Literal["transformer_engine", "liger", "torch"]
    weight_gradient: str
    adamw: str

    @property
    def packed_attention(self) -> bool:
        """One call for all segments, instead of one each."""
        return self.attention != "sdpa"

    @property
    def fused_gradient(self) -> str:
        """How a linear layer's weight gradient gets into its sum: ``fused`` with the product, or by ``torch``."""
        return "torch" if self.weight_gradient == "torch" else "fused"

    @property
    def separate_layers(self) -> str:
        """Whose norm, rotation and SwiGLU a calibration measures: transformer-engine's norms are part of products."""
        return "torch" if self.layers == "transformer_engine" else self.layers

    @property
    def fused_update(self) -> str:
        """How AdamW's update runs: ``fused`` or by ``torch``'s passes."""
        return "torch" if self.adamw == "torch" else "fused"


# What ``auto`` comes to: with what pip installs, with transformer-engine as well, with torch and megatron-core alone.
STACKS = {
    "pip": Backends(attention="torch_varlen", layers="liger", weight_gradient="addmm", adamw="torch_fused"),
    "te": Backends(
        attention="transformer_engine",
        layers="transformer_engine",
        weight_gradient="addmm",
        adamw="transformer_engine",
    ),
    "plain": Backends(attention="sdpa", layers="torch", weight_gradient="torch", adamw="torch"),
}


def planned_backends(config: Config, cluster: Cluster) -> Backends:
    """The backends of a run on ``cluster``.

    Raises:
        ValueError: for FP8 on GPUs without it, or without transformer-engine's layers, which alone have it.
    """
    named: dict[str, Any] = {part: name for part, name in vars(config.backends).items() if name != "auto"}
    chosen = replace(cluster.backends, **named)
    if config.model.fp8 != "none" and not cluster.gpu.fp8_flops:
        raise ValueError(f"model.fp8 is {config.model.fp8!r}, expected 'none': {cluster.gpu.name} has no FP8")
    if config.model.fp8 != "none" and chosen.layers != "transformer_engine":
        raise ValueError(
            f"model.fp8 is {config.model.fp8!r}, expected 'none' with backends.layers {chosen.layers!r}: plan with "
            "--backends te"
        )
    return chosen
