"""The description of one transformer layer, put together from the parts that the chosen backends name.

megatron-core builds every layer from it. All backends have the same parameters, but for the names of the norms:
transformer-engine holds each inside the linear layer behind it. Checkpoints know them by ``checkpoint_prefix`` alone.
"""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from reflectron.engine.model.architecture import Architecture, layer_matrices
from reflectron.engine.model.attention import PackedCausalAttention
from reflectron.engine.model.backends.choose import Backends
from reflectron.engine.model.backends.layers import LayerParts, layer_parts


def block_spec(
    arch: Architecture, config: TransformerConfig, backends: Backends, num_layers: int
) -> TransformerBlockSubmodules:
    """Describe ``num_layers`` equal layers and the norm behind the last."""
    parts = layer_parts(backends.layers)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch, config, backends, parts)] * num_layers, layer_norm=parts.norm
    )


def layer_spec(arch: Architecture, config: TransformerConfig, backends: Backends, parts: LayerParts) -> ModuleSpec:
    """Describe a transformer layer of ``parts`` and our packed attention."""
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
            sharded_state_dict_keys_map={
                f"{matrix.name}.": matrix.checkpoint_prefix for matrix in layer_matrices(arch) if matrix.fused_into
            },
        ),
    )
