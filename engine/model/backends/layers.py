"""The modules of a layer that each of ``backends.layers`` names, and what they compute one by one.

Models are built of ``layer_parts``; checks and benchmarks take a norm, a SwiGLU and a rotation of the same parts alone.

T tokens, H hidden, F width of the gated MLP, h heads, g key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.nn.functional import silu
from typing_extensions import assert_never

from reflectron.engine.config import LayersBackend
from reflectron.engine.model.norm import RMSNorm
from reflectron.engine.model.rope import cosines_and_sines, rotary_angles, rotary_tables, rotate

# (position ids [T], inverse frequencies [D / 2]) -> what every layer rotates by
Rotation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The modules that compute a layer; each is built as megatron-core builds its own."""

    norm: type = RMSNorm
    """The norm of query and key heads, and the one behind the last layer."""
    norm_before_linear: type = RMSNorm
    """The norm before attention and MLP."""
    column_linear: type = ColumnParallelLinear
    """The first linear layer of attention and MLP."""
    row_linear: type = RowParallelLinear
    """The second linear layer of attention and MLP."""
    self_attention: type = SelfAttention
    """The module around the core attention."""
    activation: Callable[..., Any] | None = None
    """SwiGLU, a function or what builds one from the configuration; None for megatron-core's own."""
    rotation: Rotation | None = None
    """What the layers rotate queries and keys by before the core attention; None where that rotates them itself."""
    rotates_fused: bool = False
    """Whether megatron-core hands the rotation to transformer-engine."""


def layer_parts(backend: LayersBackend) -> LayerParts:
    """Return the parts of ``backend``; each library is imported only where it is chosen."""
    if backend == "torch":
        return LayerParts()
    if backend == "liger":
        from reflectron.engine.model.backends.liger import LigerRMSNorm, LigerSelfAttention, swiglu

        return LayerParts(
            norm=LigerRMSNorm,
            norm_before_linear=LigerRMSNorm,
            self_attention=LigerSelfAttention,
            activation=swiglu,
            rotation=cosines_and_sines,
        )
    if backend == "transformer_engine":
        from megatron.core.extensions import transformer_engine as extension

        return LayerParts(
            norm=extension.TENorm,
            norm_before_linear=IdentityOp,
            column_linear=extension.TELayerNormColumnParallelLinear,
            row_linear=extension.TERowParallelLinear,
            activation=TransformerEngineSwiGLU,
            rotation=rotary_angles,
            rotates_fused=True,
        )
    assert_never(backend)


class TransformerEngineSwiGLU:
    """transformer-engine's SwiGLU, which reads both halves where they lie and keeps nothing but them.

    It is not a ``torch.nn.Module``, because megatron-core asks every module inside an MLP for its part of a checkpoint
    (0.16.1), and it has none.
    """

    def __init__(self, config: TransformerConfig) -> None:
        from megatron.core.extensions.transformer_engine import TEActivationOp

        self._operation: Any = TEActivationOp(config)

    def __call__(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Compute [T, 1, F] from [T, 1, 2 F]."""
        return self._operation(gate_and_up)


def lone_norm(backend: LayersBackend, hidden: int, eps: float, dtype: torch.dtype) -> torch.nn.Module:
    """Return the norm of ``backend`` over [T, 1, H]."""
    norm: torch.nn.Module = layer_parts(backend).norm(config=_lone_layer(dtype), hidden_size=hidden, eps=eps)
    return norm


def lone_swiglu(backend: LayersBackend, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return SwiGLU of ``backend``: [T, 1, 2 F] -> [T, 1, F]."""
    activation = layer_parts(backend).activation
    return _plain_swiglu if activation is None else build_module(activation, config=_lone_layer(dtype))


def lone_rotation(
    backend: LayersBackend, positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return the rotation of query [T, 1, h, D] and key [T, 1, g, D] by ``backend``.

    What is made of the positions is made here, for all layers of a microbatch share it.
    """
    match backend:
        case "torch":
            return rotated_by(*rotary_tables(positions, frequencies, dtype))
        case "liger":
            from reflectron.engine.model.backends import liger

            table = cosines_and_sines(positions, frequencies)
            return lambda query, key: liger.rotate(query, key, table)
        case "transformer_engine":
            from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

            angles = rotary_angles(positions, frequencies)
            return lambda *query_and_key: tuple(fused_apply_rotary_pos_emb(x, angles) for x in query_and_key)
    assert_never(backend)


def rotated_by(cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return the plain rotation of query and key by given cosines and sines."""
    return lambda *query_and_key: tuple(rotate(x.squeeze(1), cos, sin).unsqueeze(1) for x in query_and_key)


def _plain_swiglu(gate_and_up: Tensor) -> Tensor:
    """Compute as megatron-core's MLP does, which adds an offset of 0 (0.16.1)."""
    gate, up = torch.chunk(gate_and_up, 2, dim=-1)
    return silu(gate) * (up + 0.0)


def _lone_layer(dtype: torch.dtype) -> TransformerConfig:
    """Return a configuration for parts that stand outside a model."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=96,
        num_attention_heads=6,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        use_te_activation_func=True,
        add_bias_linear=False,
        params_dtype=dtype,
    )
