"""FLOP accounting: against what torch counts in transformers' Llama, and against published numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from reflectron.engine.config import Config, ModelConfig
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.training.flops import DecoderShape, decoder_shape, forward_cost, training_cost, training_flops


def architecture(**sizes: int) -> Architecture:
    return parse_architecture({"model_type": "llama"} | sizes)


def shape_of(arch: Architecture) -> DecoderShape:
    return decoder_shape(arch, Config(model=ModelConfig(make_vocab_size_divisible_by=1)))


ARCH = architecture(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=80,
    vocab_size=104,
)
SHAPE = shape_of(ARCH)


def counted_by_torch(length: int, *, backward: bool) -> int:
    config = LlamaConfig(
        num_hidden_layers=ARCH.num_layers,
        hidden_size=ARCH.hidden_size,
        num_attention_heads=ARCH.num_attention_heads,
        num_key_value_heads=ARCH.num_query_groups,
        head_dim=ARCH.head_dim,
        intermediate_size=ARCH.ffn_hidden_size,
        vocab_size=ARCH.vocab_size,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False).logits
        if backward:
            logits.sum().backward()
    # Some versions of transformers spell the outer product of RoPE's angles as a matmul.
    rope = counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
    return counter.get_total_flops() - sum(rope.values())


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("backward", [False, True])
def test_equals_torch_but_for_the_masked_half_of_attention(length: int, backward: bool) -> None:
    cost = training_cost(SHAPE, "none") if backward else forward_cost(SHAPE)
    masked_pairs = length * (length - 1) / 2
    pair = 4 * ARCH.num_layers * ARCH.num_attention_heads * ARCH.head_dim * (3 if backward else 1)
    expected = training_flops(cost, [length], rows=length) + pair * masked_pairs
    assert counted_by_torch(length, backward=backward) == expected


def test_llama_7b_agrees_with_six_flops_per_parameter_and_token() -> None:
    """PaLM, appendix B: 6 N + 12 L H Q T per token with N parameters, less the causal half of attention."""
    shape = shape_of(
        architecture(
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            intermediate_size=11008,
            vocab_size=32000,
        )
    )
    matrix_parameters = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # Llama 2 7B without look-up table and norms
    length = 4096
    per_token = training_flops(training_cost(shape, "none"), [length], rows=length) / length
    assert per_token == pytest.approx(6 * matrix_parameters + 12 * 32 * 4096 * (length + 1) / 2, rel=1e-12)


def test_views_add_up_and_only_loss_rows_pay_the_head() -> None:
    cost = training_cost(SHAPE, "none")
    together = training_flops(cost, [100, 40, 7], rows=60)
    assert together == training_flops(cost, [100], 50) + training_flops(cost, [40, 7], 10)
    assert together - training_flops(cost, [100, 40, 7], rows=0) == 60 * 6 * ARCH.hidden_size * ARCH.vocab_size


def test_full_recompute_repeats_the_layers_but_not_the_head() -> None:
    forward, full = forward_cost(SHAPE), training_cost(SHAPE, "full")
    assert full.per_token == 4 * forward.per_token
    assert full.per_token_squared == 4 * forward.per_token_squared
    assert full.per_row == 3 * forward.per_row


def test_selective_recompute_repeats_what_it_names() -> None:
    none, pair = training_cost(SHAPE, "none"), forward_cost(SHAPE).per_token_squared
    attention = training_cost(SHAPE, "selective", ("core_attn",))
    assert attention.per_token_squared - none.per_token_squared == attention.per_token - none.per_token == pair
    both = training_cost(SHAPE, "selective", ("core_attn", "mlp"))
    mlp = ARCH.num_layers * 2 * 3 * ARCH.hidden_size * ARCH.ffn_hidden_size
    assert both.per_token - attention.per_token == mlp
    assert both.per_row == attention.per_row == none.per_row


def test_the_vocabularys_padding_is_computed() -> None:
    padded = decoder_shape(ARCH, Config(model=ModelConfig(make_vocab_size_divisible_by=32)))
    assert forward_cost(padded).per_row == 2 * 48 * 128
    assert forward_cost(padded).per_token == forward_cost(SHAPE).per_token
