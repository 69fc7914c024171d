"""The rotary keys of a Hugging Face ``config.json``, read as one rotation and written back. No torch.

transformers 4 keeps them in ``rope_theta`` and ``rope_scaling``, transformers 5 in ``rope_parameters``, and people edit
either by hand. A configuration whose keys contradict each other is rejected, because each reader would compute another
rotation; one that is written here means the same to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import assert_never

from reflectron.engine.files import printable

RopeType = Literal["default", "linear", "llama3", "yarn"]
# Numbers that each type of rotary scaling cannot do without, and those that it may have.
_REQUIRED: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "llama3": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
# Keys that change nothing, whatever the type; no release of transformers reads ``finetuned``.
_WITHOUT_EFFECT = ("finetuned",)
_ORIGINAL = "original_max_position_embeddings"
LARGEST_SIZE = (1 << 31) - 1
"""Beyond every size of a model; what a hostile file may name instead fills memory or overflows."""
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The rotary position embedding of a Hugging Face model."""

    theta: float
    """Base of the frequencies."""
    rope_type: RopeType
    """How positions beyond the original context are rotated."""
    scaling: dict[str, Any]
    """The remaining keys of ``rope_scaling``; llama3 and yarn have ``original_max_position_embeddings`` in any case."""
    max_position_embeddings: int
    """The key of this name: the longest context, before yarn's extension or after it."""

    @property
    def positions(self) -> int:
        """Longest sequence that the model is made for.

        Qwen states the context before yarn in ``max_position_embeddings``, others the one after it.
        """
        if not _has_original_context(self.rope_type):
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.scaling[_ORIGINAL] * self.scaling["factor"]))

    @staticmethod
    def from_hf(hf_config: Mapping[str, Any], source: str, default_positions: int = 2048) -> RopeParameters:
        """Read the keys of either major version; ``default_positions`` stands for an absent number of positions.

        Raises:
            ValueError: naming the key, for an unknown type, a missing number, a rotation of another kind, or keys that
                contradict each other.
        """
        context = _integer(hf_config, "max_position_embeddings", source, default_positions)
        readings = [
            (key, _reading(hf_config, key, source, context))
            for key in ("rope_scaling", "rope_parameters")
            if hf_config.get(key)
        ]
        if not readings:
            return RopeParameters(
                theta=_theta(hf_config, None, source), rope_type="default", scaling={}, max_position_embeddings=context
            )
        (first, rope), *others = readings
        for second, other in others:
            _check_equal(first, rope, second, other, source)
        return rope

    def to_hf(self, attention_factor: float) -> dict[str, Any]:
        """Return the keys that transformers 4.48 to 5 and vLLM read as this rotation.

        ``attention_factor`` is yarn's temperature, which stands in for the ``mscale`` that transformers 4.48 does not
        know. The positions are those before yarn's extension, which it takes for the original ones.
        """
        # transformers 4.48 warns of a factor that is no float.
        numbers = {
            name: float(value) if type(value) is int and name != _ORIGINAL else value
            for name, value in self.scaling.items()
        }
        scaling: dict[str, Any] = {"rope_type": self.rope_type, **numbers}
        positions = self.max_position_embeddings
        if self.rope_type == "yarn":
            if "mscale" in scaling:
                scaling["attention_factor"] = attention_factor
            positions = self.scaling[_ORIGINAL]
        return {
            "max_position_embeddings": positions,
            "rope_theta": self.theta,
            "rope_scaling": None if self.rope_type == "default" else {"type": self.rope_type, **scaling},
            "rope_parameters": {**scaling, "rope_theta": self.theta},
        }


def _reading(hf_config: Mapping[str, Any], key: str, source: str, context: int) -> RopeParameters:
    """Read ``key`` together with the keys beside it."""
    given = hf_config[key]
    if not isinstance(given, dict):
        raise ValueError(f"{source}: {key} is {given!r}, expected an object")
    # transformers writes absent numbers as null. Only truncate has another meaning when it is null than when absent.
    scaling = {
        name: value
        for name, value in given.items()
        if (value is not None or name == "truncate") and name not in _WITHOUT_EFFECT
    }
    rope_type = _rope_type(scaling, key, source)
    theta = _theta(hf_config, (f"{key}.rope_theta", scaling.pop("rope_theta", None)), source)
    _check_scaling(scaling, rope_type, key, source)
    original = _original_context(hf_config, scaling.pop(_ORIGINAL, None), key, source)
    if _has_original_context(rope_type):
        scaling[_ORIGINAL] = context if original is None else _whole(original, f"{source}: {_ORIGINAL}")
    scaling.pop("partial_rotary_factor", None)
    return RopeParameters(theta=theta, rope_type=rope_type, scaling=scaling, max_position_embeddings=context)


def _rope_type(scaling: dict[str, Any], key: str, source: str) -> RopeType:
    old, new = scaling.pop("type", None), scaling.pop("rope_type", None)
    if old is not None and new is not None and old != new:
        raise ValueError(
            f"{source}: {key}.rope_type is {new!r} and {key}.type {old!r}, which contradict each other; keep one"
        )
    rope_type = new or old or "default"
    for known in _REQUIRED:
        if rope_type == known:
            return known
    *names, last = map(repr, _REQUIRED)
    raise ValueError(
        f"{source}: {key}.rope_type is {rope_type!r}, which is not supported; expected {', '.join(names)} or {last}"
    )


def _has_original_context(rope_type: RopeType) -> bool:
    """Return whether the rotation depends on the context before scaling."""
    match rope_type:
        case "default" | "linear":
            return False
        case "llama3" | "yarn":
            return True
    assert_never(rope_type)


def _check_scaling(scaling: Mapping[str, Any], rope_type: RopeType, key: str, source: str) -> None:
    for name in _REQUIRED[rope_type]:
        if not _is_positive(scaling.get(name)):
            raise ValueError(f"{source}: {key}.{name} is {scaling.get(name)!r}, expected a number above 0")
    for name, value in scaling.items():
        if name in _REQUIRED[rope_type] or (name == "partial_rotary_factor" and value == 1):
            continue
        if name == "truncate" and rope_type == "yarn":
            if not isinstance(value, bool):
                raise ValueError(f"{source}: {key}.truncate is {value!r}, expected true or false")
        elif name == _ORIGINAL or name in _OPTIONAL[rope_type]:
            if not _is_positive(value):
                raise ValueError(f"{source}: {key}.{name} is {value!r}, expected a number above 0")
        else:
            # transformers 5 keeps the rotated share of a head here, and rotations that differ by the kind of layer.
            raise ValueError(
                f"{source}: {key}.{name} is {value!r}, which is not supported with rope_type {rope_type!r}; "
                "expected no such key"
            )


def _theta(hf_config: Mapping[str, Any], inside: tuple[str, Any] | None, source: str) -> float:
    """Return the base, which stands beside the scaling or inside it (a name and a value)."""
    given = [("rope_theta", hf_config.get("rope_theta")), *([inside] if inside else [])]
    given = [(name, value) for name, value in given if value is not None]
    for name, value in given:
        if not _is_positive(value):
            raise ValueError(f"{source}: {name} is {value!r}, expected a number above 0")
    if len(given) == 2 and given[0][1] != given[1][1]:
        (first, one), (second, other) = given
        raise ValueError(
            f"{source}: {first} is {one!r} and {second} {other!r}, which contradict each other; "
            "keep the one that the model was trained with"
        )
    return float(given[0][1]) if given else _DEFAULT_THETA


def _original_context(hf_config: Mapping[str, Any], inside: Any, key: str, source: str) -> Any:
    """Return the context before scaling; transformers 5 prefers the key outside, transformers 4 never reads it."""
    outside = hf_config.get(_ORIGINAL)
    if outside is None:
        return inside
    if not _is_positive(outside):
        raise ValueError(f"{source}: {_ORIGINAL} is {outside!r}, expected a number above 0")
    if inside is not None and inside != outside:
        raise ValueError(
            f"{source}: {_ORIGINAL} is {outside!r} and {key}.{_ORIGINAL} {inside!r}, which contradict each other; "
            f"keep the one inside {key}"
        )
    return outside


def _check_equal(first: str, rope: RopeParameters, second: str, other: RopeParameters, source: str) -> None:
    one, two = ({"rope_type": r.rope_type, "rope_theta": r.theta, **r.scaling} for r in (rope, other))
    for name in one | two:
        if one.get(name) != two.get(name):
            raise ValueError(
                f"{source}: {first} gives {name} {one.get(name)!r} and {second} {two.get(name)!r}, which contradict "
                f"each other; put all rotary keys, rope_theta among them, into {second} and remove {first}"
            )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _integer(hf_config: Mapping[str, Any], key: str, source: str, default: int) -> int:
    value = hf_config.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"{source}: {key} is {value!r}, expected a whole number of at least 1")
    return _whole(value, f"{source}: {key}")


def _whole(value: Any, name: str) -> int:
    """Check a number of positions, which some files write as a float."""
    if not _is_positive(value) or value != int(value):
        raise ValueError(f"{name} is {printable(value, 40)}, expected a whole number of at least 1")
    if value > LARGEST_SIZE:
        raise ValueError(f"{name} is {printable(value, 40)}, expected at most {LARGEST_SIZE}")
    return int(value)
