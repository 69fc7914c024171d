"""Published ``config.json`` files become architectures; what is not implemented is refused by its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import ParallelConfig
from reflectron.engine.model.architecture import Architecture, check_parallel, layers_per_stage, padded_vocab_size
from reflectron.engine.model.hf_config import FAMILIES, parse_architecture, read_hf_config
from reflectron.engine.model.rope_parameters import RopeParameters, RopeType

KNOWN = f"{', '.join(map(repr, list(FAMILIES)[:-1]))} or {list(FAMILIES)[-1]!r}"
CODELLAMA_7B: dict[str, Any] = {
    "_name_or_path": "CodeLlama-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.0.dev0",
    "use_cache": True,
    "vocab_size": 32016,
}
CODELLAMA_34B = CODELLAMA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
DEEPSEEK_CODER_6_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 32013,
    "eos_token_id": 32014,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "rope_theta": 100000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 32256,
}
DEEPSEEK_CODER_33B = DEEPSEEK_CODER_6_7B | {
    "hidden_size": 7168,
    "intermediate_size": 19200,
    "num_attention_heads": 56,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
}
QWEN25_CODER_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN25_CODER_1_5B = QWEN25_CODER_7B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def rope(theta: float, context: int, rope_type: RopeType = "default", **scaling: Any) -> RopeParameters:
    return RopeParameters(theta=theta, rope_type=rope_type, scaling=scaling, max_position_embeddings=context)


def architecture(
    family: Any, sizes: tuple[int, int, int, int, int, int, int], eps: float, rotation: RopeParameters, **flags: bool
) -> Architecture:
    """``sizes``: layers, hidden, ffn, heads, key-value heads, head, vocabulary."""
    layers, hidden, ffn, heads, groups, head_dim, vocab = sizes
    return Architecture(
        family=family,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab,
        layernorm_epsilon=eps,
        initializer_range=0.02,
        rope=rotation,
        **({"qkv_bias": False, "qk_norm": False, "tied_embeddings": False} | flags),
    )


PUBLISHED = {
    "CodeLlama-7B": (
        CODELLAMA_7B,
        architecture("llama", (32, 4096, 11008, 32, 32, 128, 32016), 1e-5, rope(1e6, 16384)),
    ),
    "CodeLlama-34B": (
        CODELLAMA_34B,
        architecture("llama", (48, 8192, 22016, 64, 8, 128, 32000), 1e-5, rope(1e6, 16384)),
    ),
    "DeepSeek-Coder-6.7B": (
        DEEPSEEK_CODER_6_7B,
        architecture("llama", (32, 4096, 11008, 32, 32, 128, 32256), 1e-6, rope(1e5, 16384, "linear", factor=4.0)),
    ),
    "DeepSeek-Coder-33B": (
        DEEPSEEK_CODER_33B,
        architecture("llama", (62, 7168, 19200, 56, 8, 128, 32256), 1e-6, rope(1e5, 16384, "linear", factor=4.0)),
    ),
    "Qwen2.5-Coder-7B": (
        QWEN25_CODER_7B,
        architecture("qwen2", (28, 3584, 18944, 28, 4, 128, 152064), 1e-6, rope(1e6, 32768), qkv_bias=True),
    ),
    "Qwen2.5-Coder-1.5B": (
        QWEN25_CODER_1_5B,
        architecture(
            "qwen2",
            (28, 1536, 8960, 12, 2, 128, 151936),
            1e-6,
            rope(1e6, 32768),
            qkv_bias=True,
            tied_embeddings=True,
        ),
    ),
    "Qwen3-8B": (
        QWEN3_8B,
        architecture("qwen3", (36, 4096, 12288, 32, 8, 128, 151936), 1e-6, rope(1e6, 40960), qk_norm=True),
    ),
}


@pytest.mark.parametrize(("hf_config", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations(hf_config: dict[str, Any], expected: Architecture) -> None:
    assert parse_architecture(hf_config) == expected


@pytest.mark.parametrize(("hf_config", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_transformers_saves_the_same_architecture(
    hf_config: dict[str, Any], expected: Architecture, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(**hf_config).save_pretrained(tmp_path)
    assert parse_architecture(read_hf_config(tmp_path)) == expected


def test_omitted_keys_have_transformers_defaults() -> None:
    optional = (
        "num_key_value_heads",
        "rms_norm_eps",
        "hidden_act",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
    )
    arch = parse_architecture({key: value for key, value in CODELLAMA_7B.items() if key not in optional})
    assert (arch.num_query_groups, arch.layernorm_epsilon, arch.tied_embeddings) == (32, 1e-6, False)
    assert arch.rope == rope(1e4, 16384)
    assert parse_architecture(CODELLAMA_7B | {"num_key_value_heads": None}).num_query_groups == 32
    assert parse_architecture(QWEN3_8B | {"head_dim": None}).head_dim == 128


def test_the_families_have_defaults_of_their_own() -> None:
    omitted = ("num_key_value_heads", "max_position_embeddings", "head_dim")
    llama, qwen2, qwen3 = (
        parse_architecture(
            {key: value for key, value in hf_config.items() if key not in omitted}
            | {"num_attention_heads": 64, "hidden_size": 4096}
        )
        for hf_config in (CODELLAMA_7B, QWEN25_CODER_7B, QWEN3_8B)
    )
    assert [a.num_query_groups for a in (llama, qwen2, qwen3)] == [64, 32, 32]
    assert [a.head_dim for a in (llama, qwen2, qwen3)] == [64, 64, 128]
    assert [a.rope.positions for a in (llama, qwen2, qwen3)] == [2048, 32768, 32768]


@pytest.mark.parametrize(
    "harmless",
    [
        {"pretraining_tp": 2},
        {"use_cache": False, "unsloth_version": "2024.9", "_attn_implementation": "sdpa"},
        {"attention_bias": False, "mlp_bias": None, "residual_multiplier": 1.0, "num_local_experts": 0},
        {"architectures": ["LLaMAForCausalLM"], "hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 32},
        {"use_mrope": False, "max_window_layers": 28},
        {"activation": "swiglu"},
    ],
)
def test_keys_without_effect_are_accepted(harmless: dict[str, Any]) -> None:
    assert parse_architecture(CODELLAMA_7B | harmless) == PUBLISHED["CodeLlama-7B"][1]


def test_a_head_need_not_be_a_share_of_the_hidden_size() -> None:
    assert parse_architecture(QWEN3_8B | {"hidden_size": 1024, "num_attention_heads": 16}).head_dim == 128


@pytest.mark.parametrize(
    ("hf_config", "change", "message"),
    [
        (CODELLAMA_7B, {"model_type": "mistral"}, f"model_type is 'mistral', expected {KNOWN}"),
        (CODELLAMA_7B, {"model_type": None}, f"model_type is None, expected {KNOWN}"),
        (
            CODELLAMA_7B,
            {"hidden_act": "gelu"},
            'hidden_act is \'gelu\', which is not supported; expected null or "silu" or "swish"',
        ),
        (CODELLAMA_7B, {"mlp_bias": True}, "mlp_bias is True, which is not supported; expected null or false"),
        (
            CODELLAMA_7B,
            {"attention_bias": True},
            "attention_bias is True, which is not supported for llama; expected null or false",
        ),
        (
            QWEN3_8B,
            {"attention_bias": True},
            "attention_bias is True, which is not supported for qwen3; expected null or false",
        ),
        (
            QWEN25_CODER_7B,
            {"use_sliding_window": True},
            "use_sliding_window is True, which is not supported; expected null or false",
        ),
        (
            CODELLAMA_7B,
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is {'quant_method': 'gptq'}, which is not supported; expected null",
        ),
        (
            CODELLAMA_7B,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type is 'dynamic', which is not supported; "
            "expected 'default', 'linear', 'llama3' or 'yarn'",
        ),
        (CODELLAMA_7B, {"num_hidden_layers": None}, "num_hidden_layers is None, expected a whole number of at least 1"),
        (CODELLAMA_7B, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 10000"),
        (CODELLAMA_7B, {"hidden_size": 1 << 40}, "hidden_size is 1099511627776, expected at most 2147483647"),
        (CODELLAMA_7B, {"vocab_size": "32k"}, "vocab_size is '32k', expected a whole number of at least 1"),
        (CODELLAMA_7B, {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected a whole number of at least 1"),
        (
            CODELLAMA_7B,
            {"num_key_value_heads": 5},
            "num_key_value_heads is 5, expected a divisor of num_attention_heads (32)",
        ),
        (
            CODELLAMA_7B,
            {"hidden_size": 4000, "num_attention_heads": 30, "num_key_value_heads": 30},
            "hidden_size is 4000, expected a multiple of num_attention_heads (30), or a head_dim",
        ),
        (CODELLAMA_7B, {"head_dim": 33}, "the width of a head is 33, expected an even number, since pairs are rotated"),
        (CODELLAMA_7B, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        (CODELLAMA_7B, {"rms_norm_eps": None}, "rms_norm_eps is None, expected a number of at least 0"),
        (CODELLAMA_7B, {"is_causal": False}, "is_causal is False, which is not supported; expected null or true"),
        (
            CODELLAMA_7B,
            {"max_position_embeddings": 0},
            "max_position_embeddings is 0, expected a whole number of at least 1",
        ),
        (
            CODELLAMA_7B,
            {"max_position_embeddings": 10**400},
            f"max_position_embeddings is 1{'0' * 38}…, expected at most 2147483647",
        ),
        (
            QWEN25_CODER_7B,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types[1] is 'sliding_attention', which is not supported; expected 'full_attention'",
        ),
        (
            CODELLAMA_7B,
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures is ['LlamaForSequenceClassification'], which is not supported for model_type 'llama'; "
            "expected ['LlamaForCausalLM']",
        ),
        (
            CODELLAMA_7B,
            {"sliding_window": 4096},
            "sliding_window is 4096, which is no key of llama and may change what the model computes; "
            "expected no such key (remove it if it has no effect)",
        ),
        (
            QWEN3_8B,
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0, which is no key of qwen3 and may change what the model computes; "
            "expected no such key (remove it if it has no effect)",
        ),
        (CODELLAMA_7B, {"hidden_size": True}, "hidden_size is True, expected a whole number of at least 1"),
        (CODELLAMA_7B, {"vocab_size": 2**40}, "vocab_size is 1099511627776, expected at most 2147483647"),
        (CODELLAMA_7B, {"layer_types": 5}, "layer_types is 5, expected a list of 'full_attention'"),
        (
            CODELLAMA_7B,
            {"rope_scaling": {"rope_type": ["yarn"]}},
            "rope_scaling.rope_type is ['yarn'], which is not supported; expected 'default', 'linear', 'llama3' or "
            "'yarn'",
        ),
        (
            CODELLAMA_7B,
            {"moe\n\x1b[31m": "x" * 10_000},
            f"moe \\x1b[31m is '{'x' * 98}…, which is no key of llama and may change what the model computes; expected "
            "no such key (remove it if it has no effect)",
        ),
    ],
)
def test_refusals_name_the_key(hf_config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^here: ") as refusal:
        parse_architecture(hf_config | change, "here")
    assert str(refusal.value) == f"here: {message}"


def test_config_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_8B), encoding="utf-8")
    assert read_hf_config(tmp_path) == read_hf_config(str(file)) == QWEN3_8B


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{file}: No such file or directory, expected a Hugging Face config.json"),
        ("{", "{file} is not JSON: Expecting property name"),
        ("[1]", "{file} holds a list, expected a JSON object"),
        ("[" * 100_000, "{file} is not JSON: maximum recursion depth"),
    ],
)
def test_unreadable_config_names_the_file(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="config") as refusal:
        read_hf_config(tmp_path)
    assert str(refusal.value).startswith(message.format(file=file))
    assert "\n" not in str(refusal.value)


def stages(count: int, *layers: int) -> ParallelConfig:
    return ParallelConfig(pipeline_model_parallel_size=count, layers_per_stage=layers)


def chunks(stages: int, count: int, *layers: int) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=count, layers_per_stage=layers
    )


@pytest.mark.parametrize(
    ("num_layers", "parallel", "expected"),
    [
        (62, stages(1), (62,)),
        (62, stages(2), (31, 31)),
        (62, stages(4), (15, 16, 16, 15)),
        (62, stages(8), (7, 8, 8, 8, 8, 8, 8, 7)),
        (62, stages(4, 14, 16, 18, 14), (14, 16, 18, 14)),
        (32, stages(4), (8, 8, 8, 8)),
        (3, stages(2), (2, 1)),
        (7, stages(4), (2, 2, 2, 1)),
        (4, stages(4), (1, 1, 1, 1)),
        (32, chunks(4, 2), (4,) * 8),
        (62, chunks(4, 2), (8, 8, 8, 8, 7, 8, 8, 7)),
        (62, chunks(4, 4), (4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 4, 4, 3)),
        (5, chunks(2, 2), (2, 1, 1, 1)),
        (7, chunks(2, 3, 1, 1, 2, 1, 1, 1), (1, 1, 2, 1, 1, 1)),
    ],
)
def test_layers_per_stage(num_layers: int, parallel: ParallelConfig, expected: tuple[int, ...]) -> None:
    assert layers_per_stage(num_layers, parallel) == expected


def test_layers_that_do_not_fit_the_stages() -> None:
    with pytest.raises(ValueError, match=r"layers_per_stage is \[31, 30\], which adds up to 61, expected .* 62 layers"):
        layers_per_stage(62, stages(2, 31, 30))
    with pytest.raises(ValueError, match=r"pipeline_model_parallel_size is 4, expected at most 3 \(layers\)"):
        layers_per_stage(3, stages(4))
    with pytest.raises(ValueError, match=r"virtual_pipeline_model_parallel_size is 3, expected at most 2: .* 5 layers"):
        layers_per_stage(5, chunks(2, 3))


def test_tensor_parallel_size_divides_what_it_splits() -> None:
    def check(hf_config: dict[str, Any], size: int) -> None:
        check_parallel(parse_architecture(hf_config), ParallelConfig(tensor_model_parallel_size=size))

    for hf_config, size in ((CODELLAMA_34B, 8), (DEEPSEEK_CODER_33B, 8), (QWEN25_CODER_7B, 4), (QWEN25_CODER_1_5B, 2)):
        check(hf_config, size)
    for hf_config, size, dimension in (
        (DEEPSEEK_CODER_33B, 16, r"num_attention_heads \(56\)"),
        (QWEN25_CODER_1_5B, 4, r"num_key_value_heads \(2\)"),
        (CODELLAMA_7B | {"intermediate_size": 11007}, 2, r"intermediate_size \(11007\)"),
    ):
        with pytest.raises(ValueError, match=f"size is {size}, expected a divisor of the model's {dimension}"):
            check(hf_config, size)


@pytest.mark.parametrize(
    ("vocab_size", "divisible_by", "tensor_parallel", "expected"),
    [(32256, 128, 2, 32256), (32263, 128, 2, 32512), (331, 128, 1, 384), (331, 128, 4, 512), (331, 1, 1, 331)],
)
def test_padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel: int, expected: int) -> None:
    assert padded_vocab_size(vocab_size, divisible_by, tensor_parallel) == expected
