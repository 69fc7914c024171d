"""Keys of a Hugging Face ``config.json`` that would change what the model computes, and are not implemented.

A key that means another forward or another training is refused with its value; it is never ignored. Those known by
name come first. Any other key, of a family that this project does not know or of one to come, is refused when its name
speaks of a part of the forward, unless its value switches that part off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectron.engine.files import read_object
from reflectron.engine.model.architecture import (
    _DEFAULT_HEAD_DIM,
    _DEFAULT_KEY_VALUE_HEADS,
    _DEFAULT_POSITIONS,
    _MOST_LAYERS,
    Architecture,
    Family,
)
from reflectron.engine.model.rope_parameters import LARGEST_SIZE, RopeParameters
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


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The object in ``config.json``; ``path`` is the file or the folder that holds it.

    Raises:
        ValueError: when there is none or it is not a JSON object.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(f"{file} is no regular file, expected a Hugging Face config.json")
    try:
        return read_object(file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}, expected a Hugging Face config.json") from None


def parse_architecture(hf_config: dict[str, Any], source: str = "config.json") -> Architecture:
    """Translate a Hugging Face configuration; ``source`` names it in errors.

    Raises:
        ValueError: naming the key whose value is missing or not supported.
    """
    family = hf_config.get("model_type")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{source}: model_type is {family!r}, expected 'llama', 'qwen2' or 'qwen3'")
    check_keys(hf_config, family, source)
    keys = _Keys(hf_config, source)
    heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    groups = keys.optional_integer("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS[family]) or heads
    if heads % groups:
        raise ValueError(
            f"{source}: num_key_value_heads is {groups}, expected a divisor of num_attention_heads ({heads})"
        )
    return Architecture(
        family=family,
        num_layers=keys.integer("num_hidden_layers", _MOST_LAYERS),
        hidden_size=hidden,
        ffn_hidden_size=keys.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_head_dim(keys, family, hidden, heads),
        vocab_size=keys.integer("vocab_size"),
        layernorm_epsilon=keys.number("rms_norm_eps", 1e-6),
        initializer_range=keys.number("initializer_range", 0.02),
        rope=RopeParameters.from_hf(hf_config, source, _DEFAULT_POSITIONS[family]),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=keys.flag("tie_word_embeddings"),
    )


@dataclass(frozen=True)
class _Keys:
    """Reads values of ``config.json`` by their kind and names the key of one that is none."""

    hf_config: dict[str, Any]
    source: str

    def integer(self, key: str, most: int = LARGEST_SIZE) -> int:
        value = self.optional_integer(key, None, most)
        if value is None:
            raise ValueError(f"{self.source}: {key} is None, expected a whole number of at least 1")
        return value

    def optional_integer(self, key: str, default: int | None, most: int = LARGEST_SIZE) -> int | None:
        value = self.hf_config.get(key, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{self.source}: {key} is {value!r}, expected a whole number of at least 1")
        if value is not None and value > most:
            raise ValueError(f"{self.source}: {key} is {printable(value, 40)}, expected at most {most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.hf_config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{self.source}: {key} is {value!r}, expected a number of at least 0")
        return value

    def flag(self, key: str) -> bool:
        value = self.hf_config.get(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} is {value!r}, expected true or false")
        return value


def _head_dim(keys: _Keys, family: Family, hidden: int, heads: int) -> int:
    width = keys.optional_integer("head_dim", _DEFAULT_HEAD_DIM[family])
    if width is None:
        if hidden % heads:
            raise ValueError(
                f"{keys.source}: hidden_size is {hidden}, expected a multiple of num_attention_heads ({heads}), "
                "or a head_dim"
            )
        width = hidden // heads
    if width % 2:
        raise ValueError(
            f"{keys.source}: the width of a head is {width}, expected an even number, since pairs are rotated"
        )
    return width
