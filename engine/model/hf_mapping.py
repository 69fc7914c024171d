"""Which Hugging Face tensor lies where in megatron-core's parameters: one table for import, export and gradients.

Each parameter is a list of ``HfPiece``: a Hugging Face name, the dimension along which tensor-parallel
ranks split that tensor, and a view of the local parameter that holds this rank's share of it. ``linear_qkv``
interleaves the query heads, key and value of each group, ``linear_fc1`` stacks gate and up; all others are one piece.

H hidden, F ffn, g local key-value groups, q query heads a group, D width of a head.

The tensors of a checkpoint against those that its architecture computes with: none missing, none left unread.

A tensor that nobody reads is a part of the model that would be dropped in silence: a bias, a further layer, a norm, an
adapter. Only what is known to have no effect may stay unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from reflectron.engine.model.architecture import CHECKPOINT_NAMES, Architecture
from reflectron.engine.text import printable

if TYPE_CHECKING:
    from reflectron.engine.model.gpt import PackedGPT

# Weights are read and planned without megatron-core, which takes seconds to import.

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class HfPiece:
    """One Hugging Face tensor inside a local parameter."""

    name: str
    """Hugging Face parameter name."""
    shape: tuple[int, ...]
    """Its whole shape, without vocabulary padding."""
    shard_dim: int | None
    """The dimension split over tensor-parallel ranks; None when every rank holds all of it."""
    view: Callable[[torch.Tensor], torch.Tensor]
    """Local parameter (or its gradient) -> view on the piece; its elements are the local shard's, in order."""

    def shard_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Shape of a rank's share, vocabulary padding included."""
        shape = list(self.shape)
        if self.shard_dim is not None:
            shape[self.shard_dim] = -(-shape[self.shard_dim] // tensor_parallel_size)
        return tuple(shape)


def hf_pieces(
    chunks: Sequence[PackedGPT], arch: Architecture, tensor_parallel_size: int
) -> Iterator[tuple[torch.nn.Parameter, list[HfPiece]]]:
    """Every parameter of this rank's chunks with the Hugging Face tensors inside it, in the order of the layers.

    A tied output layer on the last pipeline stage is listed as the embedding that it copies.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield parameter, _pieces_of(name, chunk, arch, tensor_parallel_size)


def tied_copy(chunks: Sequence[PackedGPT], arch: Architecture) -> torch.nn.Parameter | None:
    """The output layer that the last of several stages holds as a copy of the embedding; None on other ranks."""
    output_layer = getattr(chunks[-1], "output_layer", None)
    return getattr(output_layer, "weight", None) if arch.tied_embeddings else None


def _pieces_of(name: str, model: PackedGPT, arch: Architecture, tp: int) -> list[HfPiece]:
    if not name.startswith("decoder.layers."):
        return _outer_pieces(arch)[name]
    _, _, local_index, rest = name.split(".", 3)
    pieces = _layer_pieces(name_without_fusion(rest), arch, tp)
    return _in_layer(model.decoder.layers[int(local_index)].layer_number - 1, pieces)


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint in megatron-core's format: a parameter as a single rank would hold it."""

    key: str
    """Its name there; the layers share one and are stacked along a dimension in front."""
    layer: int | None
    """Index in that dimension; None for what lies outside the layers."""
    num_layers: int
    """Of the model."""
    pieces: list[HfPiece]
    """The Hugging Face tensors inside it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this layer's part, without vocabulary padding."""
        first = self.pieces[0].shape
        # What holds several pieces holds them along its rows.
        return (sum(piece.shape[0] for piece in self.pieces), *first[1:])

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Of all layers together."""
        return self.shape if self.layer is None else (self.num_layers, *self.shape)


def checkpoint_tensors(arch: Architecture) -> Iterator[CheckpointTensor]:
    """Every tensor of a model's weights in a checkpoint, in the order of the forward."""
    outer = {
        name: CheckpointTensor(name, None, arch.num_layers, pieces) for name, pieces in _outer_pieces(arch).items()
    }
    yield outer["embedding.word_embeddings.weight"]
    for layer in range(arch.num_layers):
        for name in _layer_parameters(arch):
            pieces = _in_layer(layer, _layer_pieces(name, arch, 1))
            yield CheckpointTensor(f"decoder.layers.{_checkpoint_name(name)}", layer, arch.num_layers, pieces)
    yield outer["decoder.final_layernorm.weight"]
    if not arch.tied_embeddings:
        yield outer["output_layer.weight"]


def name_without_fusion(name: str) -> str:
    """Name inside a layer whose norms are modules of their own, of one whose linear layers may hold them."""
    for inside, stored in CHECKPOINT_NAMES.items():
        if name.startswith(stored):
            return inside + name.removeprefix(stored)
    return name


def _checkpoint_name(name: str) -> str:
    for inside, stored in CHECKPOINT_NAMES.items():
        if name.startswith(inside):
            return stored + name.removeprefix(inside)
    return name


def _outer_pieces(arch: Architecture) -> dict[str, list[HfPiece]]:
    """Of the parameters outside the layers."""
    vocab = (arch.vocab_size, arch.hidden_size)
    return {
        "embedding.word_embeddings.weight": [HfPiece(EMBEDDING, vocab, 0, _whole)],
        "decoder.final_layernorm.weight": [HfPiece("model.norm.weight", (arch.hidden_size,), None, _whole)],
        "output_layer.weight": [HfPiece(EMBEDDING if arch.tied_embeddings else OUTPUT_LAYER, vocab, 0, _whole)],
    }


def _in_layer(layer: int, pieces: list[HfPiece]) -> list[HfPiece]:
    return [replace(piece, name=f"model.layers.{layer}.{piece.name}") for piece in pieces]


def _layer_parameters(arch: Architecture) -> list[str]:
    """Names inside a layer, in the order of the forward."""
    names = ["input_layernorm.weight", "self_attention.linear_qkv.weight"]
    if arch.qkv_bias:
        names.append("self_attention.linear_qkv.bias")
    if arch.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    return [
        *names,
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def _layer_pieces(name: str, arch: Architecture, tp: int) -> list[HfPiece]:
    hidden, ffn, width = arch.hidden_size, arch.ffn_hidden_size, arch.head_dim
    queries = arch.num_attention_heads * width
    if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return _qkv_pieces(name.rsplit(".", 1)[1], arch, tp)
    if name == "mlp.linear_fc1.weight":
        return [
            HfPiece(f"mlp.{half}_proj.weight", (ffn, hidden), 0, _half_of_rows(index))
            for index, half in enumerate(("gate", "up"))
        ]
    whole = {
        "input_layernorm.weight": ("input_layernorm.weight", (hidden,), None),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", (hidden,), None),
        "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", (width,), None),
        "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", (width,), None),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", (hidden, queries), 1),
        "mlp.linear_fc2.weight": ("mlp.down_proj.weight", (hidden, ffn), 1),
    }
    hf_name, shape, shard_dim = whole[name]
    return [HfPiece(hf_name, shape, shard_dim, _whole)]


def _qkv_pieces(kind: str, arch: Architecture, tp: int) -> list[HfPiece]:
    """``kind`` is weight or bias; the local rows are, per group, q query heads, then the key, then the value."""
    width, groups = arch.head_dim, arch.num_query_groups // tp
    query_rows = arch.num_attention_heads // arch.num_query_groups * width
    columns = (arch.hidden_size,) if kind == "weight" else ()
    pieces, start = [], 0
    for letter, rows in (("q", query_rows), ("k", width), ("v", width)):
        view = _rows_of_each_group(groups, query_rows + 2 * width, start, rows)
        shape = (arch.num_query_groups * rows, *columns)
        pieces.append(HfPiece(f"self_attn.{letter}_proj.{kind}", shape, 0, view))
        start += rows
    return pieces


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _half_of_rows(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda parameter: parameter.view(2, -1, *parameter.shape[1:])[index]


def _rows_of_each_group(
    groups: int, rows_per_group: int, start: int, rows: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda parameter: parameter.view(groups, rows_per_group, *parameter.shape[1:])[:, start : start + rows]


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
