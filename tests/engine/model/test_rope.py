"""Rotary frequencies against transformers' own, bit for bit, for every type and every spelling of ``config.json``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reflectron.engine.model.rope import attention_factor, inverse_frequencies, rotary_tables, rotate
from reflectron.engine.model.rope_parameters import RopeParameters

HEAD_DIM = 128

# type, theta, max_position_embeddings, the other keys
CASES: dict[str, tuple[str, float, int, dict[str, Any]]] = {
    "Llama 2": ("default", 1e4, 4096, {}),
    "CodeLlama": ("default", 1e6, 16384, {}),
    "DeepSeek-Coder": ("linear", 1e5, 16384, {"factor": 4.0}),
    "Llama 3.1": (
        "llama3",
        5e5,
        131072,
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama3, no original context": (
        "llama3",
        5e5,
        8192,
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "Qwen2.5": ("yarn", 1e6, 131072, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn, no original context": ("yarn", 1e6, 32768, {"factor": 4.0}),
    "yarn, both mscales": (
        "yarn",
        1e4,
        163840,
        {
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ),
    "yarn, one mscale": (
        "yarn",
        1e4,
        16384,
        {"factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 0.8},
    ),
    "yarn, not truncated": (
        "yarn",
        15e4,
        131072,
        {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 24},
    ),
    "yarn, attention factor": (
        "yarn",
        1e4,
        16384,
        {"factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.3},
    ),
}


def spelt(case: str, spelling: str) -> dict[str, Any]:
    """The keys of ``config.json`` that tell the rotation."""
    rope_type, theta, context, rest = CASES[case]
    if spelling == "rope_parameters":
        rope: dict[str, Any] = {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **rest}}
    else:
        scaling = None if rope_type == "default" else {spelling: rope_type, **rest}
        rope = {"rope_theta": theta, "rope_scaling": scaling}
    return {"max_position_embeddings": context, **rope}


@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_transformers(case: str, spelling: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = spelt(case, spelling)
    ours = RopeParameters.from_hf(hf_config, "config.json")
    theirs = LlamaRotaryEmbedding(
        LlamaConfig.from_dict({**spelt(case, spelling), "hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4})
    )

    assert hf_config == spelt(case, spelling), "the configuration is exported later and must stay as it was"
    assert torch.equal(inverse_frequencies(ours, HEAD_DIM), theirs.inv_freq)
    assert attention_factor(ours) == theirs.attention_scaling


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=["yarn", "llama3"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_original_context_may_stand_outside_the_scaling(key: str, scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config: dict[str, Any] = {
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 1024,
        "rope_theta": 1e4,
        key: scaling,
    }
    ours = RopeParameters.from_hf(hf_config, "config.json")
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4}
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(hf_config | sizes | {key: dict(scaling)}))
    assert torch.equal(inverse_frequencies(ours, HEAD_DIM), theirs.inv_freq)
    assert attention_factor(ours) == theirs.attention_scaling


def test_both_spellings_are_one_when_they_agree() -> None:
    inside = {**YARN, "original_max_position_embeddings": 32768}
    hf_config = {
        "rope_theta": 1e6,
        "rope_scaling": {**inside, "type": "yarn"},
        "rope_parameters": {**inside, "rope_theta": 1e6, "beta_fast": None},
        "original_max_position_embeddings": 32768,
        "partial_rotary_factor": 1.0,
    }
    rope = RopeParameters.from_hf(hf_config, "config.json")
    assert (rope.rope_type, rope.theta, rope.positions) == ("yarn", 1e6, 131072)
    assert rope.scaling == {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"type": "yarn", "factor": 4},
            },
            "rope_scaling gives rope_type 'yarn' and rope_parameters 'default', which contradict each other; "
            "put all rotary keys, rope_theta among them, into rope_parameters and remove rope_scaling",
        ),
        (
            {"rope_parameters": {**YARN, "rope_theta": 1e6}, "rope_scaling": YARN},
            "rope_scaling gives rope_theta 10000.0 and rope_parameters 1000000.0, which contradict each other; "
            "put all rotary keys, rope_theta among them, into rope_parameters and remove rope_scaling",
        ),
        (
            {"rope_parameters": {**YARN, "beta_fast": 24}, "rope_scaling": YARN},
            "rope_scaling gives beta_fast None and rope_parameters 24, which contradict each other; "
            "put all rotary keys, rope_theta among them, into rope_parameters and remove rope_scaling",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta 1000000.0, which contradict each other; "
            "keep the one that the model was trained with",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 4}},
            "rope_scaling.rope_type is 'linear' and rope_scaling.type 'yarn', which contradict each other; keep one",
        ),
        (
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {**YARN, "original_max_position_embeddings": 8192},
            },
            "original_max_position_embeddings is 4096 and rope_scaling.original_max_position_embeddings 8192, "
            "which contradict each other; keep the one inside rope_scaling",
        ),
    ],
)
def test_contradicting_keys_are_refused(hf_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="contradict") as refusal:
        RopeParameters.from_hf(hf_config, "here")
    assert str(refusal.value) == f"here: {message}"


def test_the_original_context_is_a_whole_number() -> None:
    def original(value: float) -> Any:
        scaling = {**YARN, "original_max_position_embeddings": value}
        return RopeParameters.from_hf({"rope_scaling": scaling}, "here").scaling["original_max_position_embeddings"]

    assert type(original(4096.0)) is int
    assert original(4096.0) == 4096
    for value in (4096.5, 2.0**40):
        with pytest.raises(ValueError, match="here: original_max_position_embeddings is "):
            original(value)


def test_theta_beside_rope_parameters() -> None:
    rope = RopeParameters.from_hf({"rope_theta": 1e5, "rope_parameters": {"rope_type": "default"}}, "config.json")
    assert rope.theta == 1e5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_is_rotated_by_its_own_position_as_in_transformers(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    hf_config = spelt("DeepSeek-Coder", "type")
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict({**hf_config, "hidden_size": 512, "num_attention_heads": 4}))
    positions = torch.tensor([0, 7, 3, 4000, 4001])
    query = torch.randn(5, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = query[:, :2].flip(-1)
    batched = [x.transpose(0, 1)[None] for x in (query, key)]
    expected = apply_rotary_pos_emb(*batched, *theirs(query, positions[None]))

    inv_freq = inverse_frequencies(RopeParameters.from_hf(hf_config, "config.json"), HEAD_DIM)
    tables = rotary_tables(positions, inv_freq, dtype)
    for x, rotated in zip((query, key), expected, strict=True):
        assert torch.equal(rotate(x, *tables), rotated[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type is 'dynamic', which is not supported; "
            "expected 'default', 'linear', 'llama3' or 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'longrope', which is not supported; "
            "expected 'default', 'linear', 'llama3' or 'yarn'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None, expected a number above 0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
            "rope_parameters.low_freq_factor is None, expected a number above 0",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5, which is not supported with rope_type 'default'; "
            "expected no such key",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention is {'rope_type': 'default'}, which is not supported with rope_type "
            "'default'; expected no such key",
        ),
        (
            {"rope_scaling": {"factor": 4.0}},
            "rope_scaling.factor is 4.0, which is not supported with rope_type 'default'; expected no such key",
        ),
        ({"rope_scaling": [4.0]}, "rope_scaling is [4.0], expected an object"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', expected a number above 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": float("inf")}},
            "rope_scaling.factor is inf, expected a number above 0",
        ),
        (
            {"rope_scaling": {**YARN, "truncate": "no"}},
            "rope_scaling.truncate is 'no', expected true or false",
        ),
        (
            {"rope_scaling": {**YARN, "truncate": None}},
            "rope_scaling.truncate is None, expected true or false",
        ),
    ],
)
def test_refusals_name_the_key(hf_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^here/config\.json: ") as refusal:
        RopeParameters.from_hf(hf_config, "here/config.json")
    assert str(refusal.value) == f"here/config.json: {message}"
