"""Random configurations of every family, the odd and the contradicting among them: transformers' logits, or a refusal.

Each is written as a folder, read by both and computed on the same tokens; the weights are random, norms and biases
included, so that nothing cancels. What transformers cannot load may be refused or computed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectron.engine.config import ParallelConfig
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER
from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
from reflectron.engine.weights.dist_reader import open_weights

VARIANTS = 100
TOKENS = 48
# Differences of float32 sums in another order; logits are of the order of 10.
TOLERANCE = 1e-4

YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_theta": 100},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_scaling": {}, "rope_theta": 100.0},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 100.0},
    {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 100.0}, "rope_theta": 100.0},
    {"rope_scaling": {**YARN, "truncate": None}},
    {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2, "rope_theta": 50.0}},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}, "rope_theta": 100.0},
    {"rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}, "rope_theta": 100.0},
    {"rope_scaling": {**YARN, "attention_factor": 1.3, "truncate": False, "beta_fast": 8}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    {"rope_parameters": {**YARN, "rope_theta": 50.0}, "original_max_position_embeddings": 8},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 100.0},
    {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 100.0}},
    {"rope_scaling": LLAMA3, "rope_theta": 100.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 50.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_theta": 50.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_scaling": YARN},
    {"rope_scaling": {**YARN, "original_max_position_embeddings": 16}, "original_max_position_embeddings": 32},
    {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5},
)
SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 1},
    {"head_dim": 16},
    {"head_dim": 32, "num_key_value_heads": 4},
    {"num_attention_heads": 2, "num_key_value_heads": 2},
    {"hidden_size": 48, "head_dim": 6},
)
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {},
    {},
    {},
    {"tie_word_embeddings": True},
    {"rms_norm_eps": 1e-2},
    {"hidden_act": "swish"},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
    {"attention_bias": False},
    {"mlp_bias": True},
    {"pretraining_tp": 2},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    {"layer_types": ["full_attention", "full_attention"]},
    {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
    {"final_logit_softcapping": 3.0},
    {"is_causal": False},
    {"residual_multiplier": 0.5},
)


def draw(random: random.Random) -> dict[str, Any]:
    family = random.choice(("llama", "qwen2", "qwen3"))
    base: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": random.choice((64, 128)),
        "head_dim": 8,
    }
    if family != "qwen3" and random.random() < 0.5:
        del base["head_dim"]
    return base | random.choice(SIZES) | random.choice(ROTATIONS) | random.choice(OTHERS)


def theirs(folder: Path, hf_config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """transformers' logits [T, V]; the folder is left with weights and the configuration as it was given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    except Exception:  # whatever transformers finds wrong with a configuration
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim == 2 else 0.5, 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).float().eval()(tokens[None]).logits[0]
    return logits


def ours(folder: Path, hf_config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    from reflectron.tools.convert.verify import last_hidden_states

    arch = parse_architecture(hf_config)
    weights = open_weights(folder, arch)
    hidden = last_hidden_states(arch, weights, tokens, torch.device("cpu"))
    name = EMBEDDING if arch.tied_embeddings else OUTPUT_LAYER
    return hidden @ weights.read(name, (arch.vocab_size, arch.hidden_size), None, 0, 0).T


@pytest.mark.slow
def test_logits_are_transformers_or_the_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(5)
    torch.manual_seed(5)
    variants = [(tmp_path / str(number), draw(generator), torch.randint(40, (TOKENS,))) for number in range(VARIANTS)]
    for folder, _, _ in variants:
        folder.mkdir()
    # All of them before torch's factories are redirected to the CPU: transformers' meta device does not know the
    # redirected ones, and would leave the rotary buffers unset.
    expected = [theirs(*variant) for variant in variants]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    start_process_groups(ParallelConfig(), seed=0)
    outcomes = Counter[str]()
    try:
        for variant, logits in zip(variants, expected, strict=True):
            try:
                found = ours(*variant)
            except ValueError:
                outcomes["refused"] += 1
                continue
            if logits is None:
                outcomes["computed, not loaded by transformers"] += 1
                continue
            outcomes["equal"] += 1
            difference = float((found - logits).abs().max() / logits.abs().max().clamp(min=1))
            assert difference < TOLERANCE, json.dumps(variant[1])
    finally:
        stop_process_groups()
    print(outcomes)
    assert outcomes["equal"] >= VARIANTS // 4, outcomes
    assert outcomes["refused"] >= VARIANTS // 8, outcomes
