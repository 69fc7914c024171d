"""The decoder: megatron-core's ``GPTModel`` on packed rows, ending in the distillation loss instead of logits.

``build_chunks`` returns the parts of the model that this rank holds, several when the pipeline is interleaved. Full
logits never leave the model, because they never exist: the last stage hands its hidden states and the output weight to
an ``OutputProcessor``.

T tokens of a pack, H hidden, V padded vocabulary, D width of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from typing_extensions import assert_never

from reflectron.engine.config import ParallelConfig
from reflectron.engine.model.architecture import Architecture, check_parallel, layers_per_stage
from reflectron.engine.model.attention import PackedRows
from reflectron.engine.model.backends.choose import Backends
from reflectron.engine.model.backends.layers import Rotation, layer_parts
from reflectron.engine.model.backends.weight_gradient import use_weight_gradient
from reflectron.engine.model.rope import inverse_frequencies, rotary_tables, softmax_scale
from reflectron.engine.model.spec import block_spec

Fp8 = Literal["none", "delayed", "current"]
# (hidden states [T, 1, H] or this rank's share of T, output weight [V / tp, H], context) -> result of the last stage
OutputProcessor = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


class PackedGPT(GPTModel):
    """``GPTModel`` whose rotation follows each token's own position and whose last stage calls ``output_processor``.

    ``forward(input_ids [1, T], position_ids [1, T], attention_mask=None, packed_seq_params=PackedRows,
    labels=context)`` returns the hidden states [T, 1, H] on every stage but the last, and there
    ``output_processor(hidden states, output weight, context)``.

    Overriding ``_postprocess`` stands in for the ``output_processor`` argument of ``GPTModel.forward`` that
    megatron-core has after 0.16.1, and goes away with it.
    """

    def __init__(
        self, arch: Architecture, output_processor: OutputProcessor, rotation: Rotation | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.output_processor, self.rotation = output_processor, rotation
        # A plain attribute: Float16Module would round a buffer to bfloat16.
        self.inverse_frequencies = inverse_frequencies(arch.rope, arch.head_dim).to(torch.cuda.current_device())
        self.decoder.register_forward_pre_hook(self._set_rotation, with_kwargs=True)

    def _set_rotation(self, decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rows: PackedRows = kwargs["packed_seq_params"]
        if self.rotation is None:
            kwargs["packed_seq_params"] = self.with_rotation(rows)
        else:
            assert rows.position_ids is not None
            kwargs["rotary_pos_emb"] = self.rotation(rows.position_ids, self.inverse_frequencies)
        return args, kwargs

    def with_rotation(self, rows: PackedRows) -> PackedRows:
        """Return ``rows`` with the cosines and sines of its positions, made once for all layers."""
        assert rows.position_ids is not None
        rotary = rotary_tables(rows.position_ids, self.inverse_frequencies, self.config.params_dtype)
        return dataclasses.replace(rows, rotary=rotary)

    def _set_attention_backend(self) -> None:
        """Leave transformer-engine's switches as they are.

        megatron-core (0.16.1) asks for ``NVTE_UNFUSED_ATTN=1`` with every model and fails where it is off, which the
        kernel of that backend needs.
        """

    def _postprocess(self, hidden_states: torch.Tensor, labels: Any = None, **_: Any) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        return self.output_processor(hidden_states, self.output_weight(), labels)

    def output_weight(self) -> torch.Tensor:
        """Return this rank's rows of the output layer, [V / tp, H]; the embedding's when they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    backends: Backends,
    fp8: Fp8 = "none",
) -> TransformerConfig:
    """Return megatron-core's configuration of the same decoder.

    Raises:
        ValueError: when the parallel layout does not divide the model.
    """
    check_parallel(arch, parallel)
    parts = layer_parts(backends.layers)
    return TransformerConfig(
        **_decoder_options(arch),
        **_layout_options(arch, parallel),
        **_recompute_options(parallel),
        **_fp8_options(fp8),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are always loaded, from a checkpoint or from a seeded source. perform_initialization=False would also
        # omit the marks of split parameters, without which the gradient norm counts one rank only.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        # Every row's weight is known before the forward, so the loss is a plain sum that nothing may rescale.
        calculate_per_token_loss=True,
        # Whichever SwiGLU the layers' parts name, not transformer-engine's alone.
        use_te_activation_func=parts.activation is not None,
        apply_rope_fusion=parts.rotates_fused,
        gradient_accumulation_fusion=backends.weight_gradient != "torch",
        # These fusions call torch.compile or CUDA extensions.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _decoder_options(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        # finalize_model_grads sums the gradients of these norms over tensor-parallel ranks only when this is set.
        "qk_layernorm": arch.qk_norm,
        "softmax_scale": softmax_scale(arch.rope, arch.head_dim),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout_options(arch: Architecture, parallel: ParallelConfig) -> dict[str, Any]:
    chunks = parallel.virtual_pipeline_model_parallel_size
    stages = layers_per_stage(arch.num_layers, parallel)
    layout = [["decoder"] * layers for layers in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_layout": layout if len(stages) > 1 else None,
        # The interleaved schedule with batched transfers computes wrong gradients over gloo, silently (0.16.1).
        "overlap_p2p_comm": chunks > 1,
        "batch_p2p_comm": chunks == 1,
        "sequence_parallel": parallel.sequence_parallel,
        # 1F1B keeps outputs of earlier microbatches; freeing them early corrupts gloo's pending sends.
        "deallocate_pipeline_outputs": torch.cuda.is_available(),
    }


def _fp8_options(fp8: Fp8) -> dict[str, Any]:
    # Range matters more to gradients than precision, so they are E5M2, all else E4M3. transformer-engine's own defaults
    # for the history; megatron-core's look one step back only.
    options = {"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if fp8 == "none":
        return {}
    if fp8 == "delayed":
        return options | {"fp8_recipe": "delayed"}
    if fp8 == "current":
        # Scaling by the tensor itself goes by the name of what has one scale: a tensor.
        return options | {"fp8_recipe": "tensorwise"}
    assert_never(fp8)


def _recompute_options(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert_never(parallel.recompute)


def build_chunks(
    arch: Architecture,
    config: TransformerConfig,
    padded_vocab_size: int,
    output_processor: OutputProcessor,
    backends: Backends,
) -> list[PackedGPT]:
    """Build the pipeline stage and tensor-parallel shard of this rank, on its device, weights not yet loaded.

    Returns:
        One chunk, or the chunks of an interleaved pipeline in the model's order.
    """
    use_weight_gradient(backends.weight_gradient)
    chunks = config.virtual_pipeline_model_parallel_size
    return [
        PackedGPT(
            arch,
            output_processor,
            layer_parts(backends.layers).rotation,
            config=config,
            transformer_layer_spec=block_spec(arch, config, backends, get_num_layers_to_build(config, vp_stage)),
            vocab_size=padded_vocab_size,
            max_sequence_length=arch.rope.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        for vp_stage in (range(chunks) if chunks else (None,))
    ]
