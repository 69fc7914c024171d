"""``config.json`` of an export: both majors of transformers read one model, and three files name one set of ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models

from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.model.hf_config import parse_architecture, read_hf_config
from reflectron.engine.model.inputs import ModelInputs
from reflectron.engine.model.rope import attention_factor, inverse_frequencies
from reflectron.engine.model.rope_parameters import RopeParameters
from reflectron.engine.weights.hf_folder import write_description

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 12,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "no rotary keys": {},
    "theta": {"rope_theta": 1e6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "linear": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4}},
    "yarn": {"rope_scaling": YARN},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}},
    "llama3 of version 5": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "original_max_position_embeddings": 512},
    "default of version 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2, "rope_theta": 1e6},
}


def save_tokenizer(folder: Path, **named: str) -> None:
    words = ["<unk>", "<s>", "</s>", "<pad>", "a", "b"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:4]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def export(hf_config: dict[str, Any], folder: Path, template: Any = "reflection", **named: str) -> Path:
    save_tokenizer(folder, **named)
    tokenizer, arch = load_tokenizer(str(folder), template), parse_architecture(hf_config)
    out = folder / "export"
    out.mkdir()
    write_description(
        out, ModelInputs(hf_config=hf_config, arch=arch, original_vocab_size=12, tokenizer=tokenizer), torch.bfloat16
    )
    return out


def rotation_of_version_4_48(config: dict[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """As ``modeling_rope_utils.py`` of transformers 4.48.3 reads ``config.json``: it knows no ``rope_parameters``."""
    scaling = config["rope_scaling"]
    if scaling is not None and scaling["type"] == "yarn":
        # It takes the model's positions for the original ones and knows neither mscale nor truncate.
        known = ("type", "factor", "attention_factor", "beta_fast", "beta_slow")
        scaling = {key: scaling[key] for key in known if key in scaling}
    old = {"rope_theta": config["rope_theta"], "rope_scaling": scaling}
    rope = RopeParameters.from_hf(old | {"max_position_embeddings": config["max_position_embeddings"]}, "old")
    return inverse_frequencies(rope, head_dim), attention_factor(rope)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_reader_computes_the_same_rotation(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = parse_architecture(SIZES | CONFIGS[name])
    config = read_hf_config(export(SIZES | CONFIGS[name], tmp_path))
    again = parse_architecture(config)
    expected = inverse_frequencies(arch.rope, arch.head_dim)
    assert torch.equal(inverse_frequencies(again.rope, again.head_dim), expected)
    assert again.rope.positions == arch.rope.positions

    old, factor = rotation_of_version_4_48(config, arch.head_dim)
    assert torch.equal(old, expected)
    assert factor == pytest.approx(attention_factor(arch.rope), rel=1e-12)

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "export"))
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(attention_factor(arch.rope), rel=1e-12)
    assert model.config.num_key_value_heads == arch.num_query_groups
    assert model.config.rms_norm_eps == arch.layernorm_epsilon
    assert model.config.tie_word_embeddings == arch.tied_embeddings
    assert str(model.config.dtype) == "torch.bfloat16"
    assert (config["torch_dtype"], config["dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("template", ["reflection", "magicoder"])
@pytest.mark.parametrize(
    ("named", "bos", "pad"),
    [({"bos_token": "<s>", "pad_token": "<pad>"}, 1, 3), ({"bos_token": "<s>"}, 1, 2), ({"pad_token": "<gone>"}, 2, 2)],
)
def test_ids_are_alike_in_all_files(template: str, named: dict[str, str], bos: int, pad: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    out = export(SIZES | {"eos_token_id": 7, "pad_token_id": 0}, tmp_path, template, **named)
    generation = GenerationConfig.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    stops = [2, tokenizer.convert_tokens_to_ids("<|endofmessage|>")] if template == "reflection" else 2
    for config in (read_hf_config(out), generation.to_dict()):
        assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [bos, stops, pad]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, pad)
    assert tokenizer.bos_token_id == (bos if "bos_token" in named else None)
    assert len(tokenizer) == (13 if template == "reflection" else 6)
    assert tokenizer.chat_template
