"""Hugging Face ``config.json`` -> ``Architecture``: the families, their keys, and what is rejected.

Llama (CodeLlama, DeepSeek-Coder), Qwen2 (Qwen2.5-Coder) and Qwen3 are one decoder with few differences, which
``FAMILIES`` lists. A key that means another forward or another training is rejected with its value, never ignored. Keys
known by name come first. Any other key, of an unknown family or of one to come, is rejected when its name speaks
of a part of the forward, unless its value switches that part off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reflectron.engine.files import printable, read_object
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.rope_parameters import LARGEST_SIZE, RopeParameters


@dataclass(frozen=True, kw_only=True)
class HfFamily:
    """The properties that tell a family from the others; the defaults are what transformers takes for an absent key."""

    class_name: str
    """The Hugging Face class of its language model."""
    positions: int
    """Default of ``max_position_embeddings``."""
    key_value_heads: int | None = None
    """Default of ``num_key_value_heads``; None for as many as queries."""
    head_dim: int | None = None
    """Default of ``head_dim``; None for the hidden size divided among the heads."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    qk_norm: bool = False
    """Whether each query and key head is normalised."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values under which a key of its own has no effect; any other value of it is rejected."""
    known_keys: frozenset[str] = frozenset()
    """Keys of its own that may have any value, although their names speak of the forward."""


# Llama's and Qwen3's attention_bias adds one to o_proj as well, which no published checkpoint uses.
_NO_ATTENTION_BIAS = {"attention_bias": (None, False)}
# Qwen states a window that use_sliding_window switches on; Llama knows none, so that one there means another model.
_WINDOW = frozenset({"sliding_window"})
FAMILIES = {
    "llama": HfFamily(class_name="LlamaForCausalLM", positions=2048, neutral=_NO_ATTENTION_BIAS),
    "qwen2": HfFamily(
        class_name="Qwen2ForCausalLM",
        positions=32768,
        key_value_heads=32,
        qkv_bias=True,
        known_keys=_WINDOW | {"attention_bias"},
    ),
    "qwen3": HfFamily(
        class_name="Qwen3ForCausalLM",
        positions=32768,
        key_value_heads=32,
        head_dim=128,
        qk_norm=True,
        neutral=_NO_ATTENTION_BIAS,
        known_keys=_WINDOW,
    ),
}

# Values under which a key has no effect; any other value of it is rejected.
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
    "max_window_layers",
}
_SPEAKS_OF_THE_FORWARD = re.compile(
    r"scal(e|ing|ar)|multiplier|soft_?cap|bias|norm|rope|rotary|expert|moe|window|chunk|dropout|pdrop|parallel_(resid|attn)"
    r"|alibi|clip|residual|temperature_tuning|mup|activation|bidirectional|nextn|mtp|lora|quantiz|compression|cross_attention"
    r"|sparse|linear_attn|mixer|mamba|ssm|gated?_|altup|laurel|sink|position_embedding_type"
)
# Beyond every model; a list of as many layers as a hostile file may name would fill the memory.
_MOST_LAYERS = 10_000
_OFF = (None, False, 0, 1, "", "none")


def check_keys(hf_config: Mapping[str, Any], family: str, source: str) -> None:
    """Reject what the engine does not compute; ``source`` names the file in errors.

    Raises:
        ValueError: naming the key, its value and the value expected.
    """
    accepted = {**_NEUTRAL, **FAMILIES[family].neutral}
    for key, neutral in accepted.items():
        if not _is_one_of(hf_config.get(key), neutral):
            expected = " or ".join(json.dumps(value) for value in neutral)
            found, of_family = _shown(hf_config[key]), f" for {family}" if key in FAMILIES[family].neutral else ""
            raise ValueError(f"{source}: {key} is {found}, which is not supported{of_family}; expected {expected}")
    layer_types = hf_config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"{source}: layer_types is {_shown(layer_types)}, expected a list of 'full_attention'")
    for index, kind in enumerate(layer_types):
        if kind != "full_attention":
            raise ValueError(
                f"{source}: layer_types[{index}] is {_shown(kind)}, which is not supported; expected 'full_attention'"
            )
    _check_class(hf_config.get("architectures"), family, source)
    known = _KNOWN | FAMILIES[family].known_keys | accepted.keys()
    for key, value in hf_config.items():
        if key not in known and _SPEAKS_OF_THE_FORWARD.search(key) and value and not _is_one_of(value, _OFF):
            raise ValueError(
                f"{source}: {printable(key, 100)} is {_shown(value)}, which is no key of {family} and may change what "
                "the model computes; expected no such key (remove it if it has no effect)"
            )


def _check_class(architectures: Any, family: str, source: str) -> None:
    if not architectures:
        return
    expected = FAMILIES[family].class_name
    # LLaMAForCausalLM is how the first conversions spelt it.
    if not isinstance(architectures, list) or expected.lower() not in [str(a).lower() for a in architectures]:
        raise ValueError(
            f"{source}: architectures is {_shown(architectures)}, which is not supported for model_type {family!r}; "
            f"expected [{expected!r}]"
        )


def _shown(value: Any) -> str:
    return printable(repr(value), 100)


def _is_one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Test as ``in`` does, except that true is not 1 and false not 0 unless both stand there."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in accepted)


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read the object in ``config.json``; ``path`` is the file or the folder that holds it.

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
    if not isinstance(family, str) or family not in FAMILIES:
        *others, last = map(repr, FAMILIES)
        raise ValueError(f"{source}: model_type is {family!r}, expected {', '.join(others)} or {last}")
    known = FAMILIES[family]
    check_keys(hf_config, family, source)
    keys = _Keys(hf_config, source)
    heads, hidden = keys.integer("num_attention_heads"), keys.integer("hidden_size")
    groups = keys.optional_integer("num_key_value_heads", known.key_value_heads) or heads
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
        head_dim=_head_dim(keys, known.head_dim, hidden, heads),
        vocab_size=keys.integer("vocab_size"),
        layernorm_epsilon=keys.number("rms_norm_eps", 1e-6),
        initializer_range=keys.number("initializer_range", 0.02),
        rope=RopeParameters.from_hf(hf_config, source, known.positions),
        qkv_bias=known.qkv_bias,
        qk_norm=known.qk_norm,
        tied_embeddings=keys.flag("tie_word_embeddings"),
    )


@dataclass(frozen=True)
class _Keys:
    """Reads values of ``config.json`` by their type and names the key of a wrong one."""

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


def _head_dim(keys: _Keys, default: int | None, hidden: int, heads: int) -> int:
    width = keys.optional_integer("head_dim", default)
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
