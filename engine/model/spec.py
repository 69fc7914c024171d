"""One transformer layer, put together from the parts that the chosen backends name.

megatron-core builds every layer from such a description. The parameters are the same with all of them, but for the
names of the norms: transformer-engine holds each inside the linear layer behind it. ``hf_table`` knows both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from reflectron.engine.model.architecture import CHECKPOINT_NAMES
from reflectron.engine.model.attention import PackedCausalAttention
from reflectron.engine.model.backends.choose import Backends
from reflectron.engine.model.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What computes the parts of a layer; each is built as megatron-core builds its own."""

    norm: type = RMSNorm
    """Of query and key heads, and behind the last layer."""
    norm_before_linear: type = RMSNorm
    """Before attention and MLP."""
    column_linear: type = ColumnParallelLinear
    """First linear layer of attention and MLP."""
    row_linear: type = RowParallelLinear
    """Second linear layer of attention and MLP."""
    self_attention: type = SelfAttention
    """What is around the core attention."""
    activation: Callable[..., Any] | None = None
    """SwiGLU, a function or what builds one from the configuration; None for megatron-core's own."""


def block_spec(config: TransformerConfig, backends: Backends, num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` equal layers and the norm behind the last."""
    parts = layer_parts(backends)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, backends, parts)] * num_layers, layer_norm=parts.norm
    )


def layer_parts(backends: Backends) -> LayerParts:
    """The parts that ``backends`` names; each choice is imported only where it is made."""
    if backends.layers == "liger":
        from reflectron.engine.model.backends.liger import LigerRMSNorm, LigerSelfAttention, swiglu

        return LayerParts(
            norm=LigerRMSNorm,
            norm_before_linear=LigerRMSNorm,
            self_attention=LigerSelfAttention,
            activation=swiglu,
        )
    if backends.layers == "transformer_engine":
        from megatron.core.extensions import transformer_engine as extension

        return LayerParts(
            norm=extension.TENorm,
            norm_before_linear=IdentityOp,
            column_linear=extension.TELayerNormColumnParallelLinear,
            row_linear=extension.TERowParallelLinear,
            activation=TransformerEngineSwiGLU,
        )
    return LayerParts()


def layer_spec(config: TransformerConfig, backends: Backends, parts: LayerParts) -> ModuleSpec:
    """One transformer layer out of ``parts`` and our packed attention."""
    head_norm = parts.norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before_linear,
            self_attention=ModuleSpec(
                module=parts.self_attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear,
                    core_attention=partial(PackedCausalAttention, backend=backends.attention),
                    linear_proj=parts.row_linear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm_before_linear,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=parts.column_linear, activation_func=parts.activation, linear_fc2=parts.row_linear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=CHECKPOINT_NAMES,
        ),
    )


class TransformerEngineSwiGLU:
    """transformer-engine's SwiGLU, which reads both halves where they lie and keeps nothing but them.

    Not a ``torch.nn.Module``: megatron-core asks every module inside an MLP for its part of a checkpoint, which this
    one does not have (0.16.1).
    """

    def __init__(self, config: TransformerConfig) -> None:
        from megatron.core.extensions.transformer_engine import TEActivationOp

        self._operation: Any = TEActivationOp(config)

    def __call__(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """[T, 1, 2 F] -> [T, 1, F]."""
        return self._operation(gate_and_up)
