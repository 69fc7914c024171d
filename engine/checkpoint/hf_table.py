"""Which Hugging Face tensor lies where in megatron-core's parameters: one table for import, export and gradients.

Each parameter is a list of ``HfPiece``: a Hugging Face name, the dimension along which tensor-parallel
ranks split that tensor, and a view of the local parameter that holds this rank's share of it. ``linear_qkv``
interleaves the query heads, key and value of each group, ``linear_fc1`` stacks gate and up; all others are one piece.

H hidden, F ffn, g local key-value groups, q query heads a group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from reflectron.engine.model.families import CHECKPOINT_NAMES, Architecture

# Weights are read and planned without megatron-core, which takes seconds to import.
if TYPE_CHECKING:
    from reflectron.engine.model.gpt import PackedGPT

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
