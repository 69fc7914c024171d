"""Keys of a Hugging Face ``config.json`` that would change what the model computes, and are not implemented.

A key that means another forward or another training is refused with its value; it is never ignored. Those known by
name come first. Any other key, of a family that this project does not know or of one to come, is refused when its name
speaks of a part of the forward, unless its value switches that part off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from reflectron.engine.text import printable

# Values under which a key has no effect; any other value of it is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None, {}, []),
    "block_configs": (None, []),
    "auto_map": (None, {}),
    "transformers_weights": (None,),
    "position_embedding_type": (None, "rope", "rotary"),
    # What a Llama computes in any case, as Falcon3 says it.
    "activation": (None, "swiglu", "silu"),
}
# Keys that the families know, whose names would otherwise look as if they changed the forward.
_KNOWN = {
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "attention_bias",
    "max_window_layers",
}
# Qwen states a window that use_sliding_window switches on; Llama knows none, so that one there means another model.
_KNOWN_OF = {"llama": set[str](), "qwen2": {"sliding_window"}, "qwen3": {"sliding_window"}}
_SPEAKS_OF_THE_FORWARD = re.compile(
    r"scal(e|ing|ar)|multiplier|soft_?cap|bias|norm|rope|rotary|expert|moe|window|chunk|dropout|pdrop|parallel_(resid|attn)"
    r"|alibi|clip|residual|temperature_tuning|mup|activation|bidirectional|nextn|mtp|lora|quantiz|compression|cross_attention"
    r"|sparse|linear_attn|mixer|mamba|ssm|gated?_|altup|laurel|sink|position_embedding_type"
)
_OFF = (None, False, 0, 1, "", "none")
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def class_name(family: str) -> str:
    """The Hugging Face class of a family's language model."""
    return _CLASSES[family]


def check_keys(hf_config: Mapping[str, Any], family: str, source: str) -> None:
    """Refuse what the engine does not compute; ``source`` names the file in errors.

    Raises:
        ValueError: naming the key, its value and the value expected.
    """
    for key, neutral in _NEUTRAL.items():
        if not _is_one_of(hf_config.get(key), neutral):
            expected = " or ".join(json.dumps(value) for value in neutral)
            found = _shown(hf_config[key])
            raise ValueError(f"{source}: {key} is {found}, which is not supported; expected {expected}")
    if family != "qwen2" and hf_config.get("attention_bias"):
        # Llama's and Qwen3's attention_bias adds one to o_proj as well, which no published checkpoint uses.
        raise ValueError(
            f"{source}: attention_bias is {hf_config['attention_bias']!r}, which is not supported for {family}; "
            "expected false"
        )
    layer_types = hf_config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"{source}: layer_types is {_shown(layer_types)}, expected a list of 'full_attention'")
    for index, kind in enumerate(layer_types):
        if kind != "full_attention":
            raise ValueError(
                f"{source}: layer_types[{index}] is {_shown(kind)}, which is not supported; expected 'full_attention'"
            )
    _check_class(hf_config.get("architectures"), family, source)
    known = _KNOWN | _KNOWN_OF[family] | set(_NEUTRAL)
    for key, value in hf_config.items():
        if key not in known and _SPEAKS_OF_THE_FORWARD.search(key) and value and not _is_one_of(value, _OFF):
            raise ValueError(
                f"{source}: {printable(key, 100)} is {_shown(value)}, which is no key of {family} and may change what "
                "the model computes; expected no such key (remove it if it has no effect)"
            )


def _check_class(architectures: Any, family: str, source: str) -> None:
    if not architectures:
        return
    # LLaMAForCausalLM is how the first conversions spelt it.
    if not isinstance(architectures, list) or _CLASSES[family].lower() not in [str(a).lower() for a in architectures]:
        raise ValueError(
            f"{source}: architectures is {_shown(architectures)}, which is not supported for model_type {family!r}; "
            f"expected [{_CLASSES[family]!r}]"
        )


def _shown(value: Any) -> str:
    return printable(repr(value), 100)


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Like ``in``, except that true is not 1 and false not 0 unless both stand there."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in accepted)
