"""The tensors of a checkpoint against those that its architecture computes with: none missing, none left unread.

A tensor that nobody reads is a part of the model that would be dropped in silence: a bias, a further layer, a norm, an
adapter. Only what is known to have no effect may stay unread.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from reflectron.engine.checkpoint.hf_table import EMBEDDING, OUTPUT_LAYER, checkpoint_tensors
from reflectron.engine.model.families import Architecture
from reflectron.engine.text import printable

# Buffers that older releases of transformers saved; each is computed anew from config.json.
_LEFTOVERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)$")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|SCB|weight_scale|weight_scale_inv|weight_packed)"
)
_NAMES_SHOWN = 3
_ROWS_AT_A_TIME = 4096


class NamedWeights(Protocol):
    """Tensors whose names are all known."""

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        ...


def expected_names(arch: Architecture) -> list[str]:
    """Every tensor of the architecture, in the order of the forward."""
    return [piece.name for tensor in checkpoint_tensors(arch) for piece in tensor.pieces]


def check_names(names: Collection[str], arch: Architecture, folder: object) -> None:
    """Refuse tensors ``names`` of ``folder`` that are not those of ``arch``.

    Raises:
        ValueError: naming up to three that are missing or unread, and how many there are.
    """
    expected, given = expected_names(arch), set(names)
    missing = [name for name in expected if name not in given]
    unread = [name for name in sorted(given.difference(expected)) if not _LEFTOVERS.search(name)]
    if arch.tied_embeddings:
        unread = [name for name in unread if name != OUTPUT_LAYER]
    quantised = [name for name in unread if _QUANTISED.search(name)]
    if quantised:
        raise ValueError(
            f"{folder} holds quantised weights ({listed(quantised)}); expected float32, bfloat16 or float16: "
            "use the checkpoint that they were made of"
        )
    if missing:
        also = f", but {listed(unread)}" if unread else ""
        raise ValueError(
            f"{folder} has no tensor {listed(missing)}{also}: its config.json and its weights do not belong together"
        )
    if unread:
        raise ValueError(
            f"{folder} holds {len(unread)} tensors that this {arch.family} does not compute with: {listed(unread)}; "
            "expected none: use the config.json that belongs to the weights, or remove what has no effect"
        )


def check_tied_output(weights: NamedWeights, arch: Architecture, names: Collection[str], folder: object) -> None:
    """Refuse an output layer that differs from the embedding which a tied model takes in its place.

    Raises:
        ValueError: when it differs.
    """
    if not arch.tied_embeddings or OUTPUT_LAYER not in names:
        return
    shape = (arch.vocab_size, arch.hidden_size)
    for start in range(0, arch.vocab_size, _ROWS_AT_A_TIME):
        embedding, output = (
            weights.read(name, shape, 0, start, start + _ROWS_AT_A_TIME) for name in (EMBEDDING, OUTPUT_LAYER)
        )
        if not torch.equal(embedding, output):
            raise ValueError(
                f"{folder}: tie_word_embeddings is True, but {OUTPUT_LAYER} differs from {EMBEDDING}; set it to false "
                f"in config.json, or remove {OUTPUT_LAYER}"
            )


def listed(names: Sequence[str]) -> str:
    """Up to three of ``names``, and how many more there are."""
    shown = ", ".join(printable(name, 100) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
