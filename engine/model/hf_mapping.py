"""Which Hugging Face tensor lies where in megatron-core's parameters, from the table of the architecture's matrices.

Each parameter is a list of ``HfPiece``: a Hugging Face name, the dimension along which tensor-parallel ranks split that
tensor, and a view of the local parameter that holds this rank's share of it. Import, export, gradients and optimizer
state go through the same pieces; ``check_names`` holds the tensors of a checkpoint against them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from reflectron.engine.files import printable
from reflectron.engine.model.architecture import (
    HF_EMBEDDING,
    HF_OUTPUT_LAYER,
    Architecture,
    Matrix,
    ParameterKind,
    layer_matrices,
    outer_matrices,
)

if TYPE_CHECKING:
    from reflectron.engine.model.gpt import PackedGPT

# Weights are read and planned without megatron-core, which takes seconds to import.

EMBEDDING, OUTPUT_LAYER = f"{HF_EMBEDDING}.weight", f"{HF_OUTPUT_LAYER}.weight"
# In front of a layer's names.
_LAYERS, _HF_LAYERS = "decoder.layers.", "model.layers."


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


def hf_pieces(
    chunks: Sequence[PackedGPT], arch: Architecture, tensor_parallel_size: int
) -> Iterator[tuple[torch.nn.Parameter, list[HfPiece]]]:
    """List every parameter of this rank's chunks with the Hugging Face tensors inside it, in the order of the layers.

    A tied output layer on the last pipeline stage is listed as the embedding that it copies.
    """
    outer = {f"{matrix.name}.weight": matrix for matrix in outer_matrices(arch)}
    inside = {
        name: (matrix, kind)
        for matrix in layer_matrices(arch)
        for kind in matrix.kinds
        # Norms are modules of their own, or parameters of the linear layer behind them.
        for name in (f"{matrix.name}.{kind}", f"{matrix.checkpoint_prefix}{kind}")
    }
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not name.startswith(_LAYERS):
                yield parameter, _pieces(outer[name], "weight", tensor_parallel_size)
                continue
            index, _, rest = name.removeprefix(_LAYERS).partition(".")
            layer = chunk.decoder.layers[int(index)].layer_number - 1
            yield parameter, _pieces(*inside[rest], tensor_parallel_size, f"{_HF_LAYERS}{layer}.")


def tied_copy(chunks: Sequence[PackedGPT], arch: Architecture) -> torch.nn.Parameter | None:
    """Return the output layer that the last of several stages holds as a copy of the embedding; None on other ranks."""
    output_layer = getattr(chunks[-1], "output_layer", None)
    return getattr(output_layer, "weight", None) if arch.tied_embeddings else None


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint in megatron-core's format: a parameter as a single rank would hold it."""

    key: str
    """Its name there; the layers share one and are stacked along a dimension in front."""
    layer: int | None
    """Index in that dimension; None for what lies outside the layers."""
    num_layers: int
    """Layers of the model."""
    pieces: list[HfPiece]
    """The Hugging Face tensors inside it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this layer's part, without vocabulary padding."""
        first = self.pieces[0].shape
        # What holds several pieces holds them along its rows.
        return (sum(piece.shape[0] for piece in self.pieces), *first[1:])

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of all layers together."""
        return self.shape if self.layer is None else (self.num_layers, *self.shape)


def checkpoint_tensors(arch: Architecture) -> Iterator[CheckpointTensor]:
    """List every tensor of a model's weights in a checkpoint, in the order of the forward."""
    embedding, final_norm, output_layer = (
        CheckpointTensor(f"{matrix.name}.weight", None, arch.num_layers, _pieces(matrix, "weight", 1))
        for matrix in outer_matrices(arch)
    )
    yield embedding
    for layer in range(arch.num_layers):
        for matrix in layer_matrices(arch):
            for kind in matrix.kinds:
                pieces = _pieces(matrix, kind, 1, f"{_HF_LAYERS}{layer}.")
                yield CheckpointTensor(f"{_LAYERS}{matrix.checkpoint_prefix}{kind}", layer, arch.num_layers, pieces)
    yield final_norm
    if not arch.tied_embeddings:
        yield output_layer


def _pieces(matrix: Matrix, kind: ParameterKind, tensor_parallel_size: int, prefix: str = "") -> list[HfPiece]:
    columns = {"weight": () if matrix.inputs is None else (matrix.inputs,), "bias": ()}[kind]
    return [
        HfPiece(f"{prefix}{part.module}.{kind}", (part.rows, *columns), matrix.shard_dim(kind), view)
        for part, view in zip(matrix.parts, _views(matrix, tensor_parallel_size), strict=True)
    ]


def _views(matrix: Matrix, tensor_parallel_size: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return the views of a local parameter on its share of each part of ``matrix``."""
    if len(matrix.parts) == 1:
        # Not cut by its rows, of which a padded vocabulary has more than its part says.
        return [lambda parameter: parameter]
    groups = 1 if matrix.groups is None else matrix.groups // tensor_parallel_size
    sizes = [part.rows // tensor_parallel_size // groups for part in matrix.parts]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    places = list(zip(starts, sizes, strict=True))
    if matrix.groups is None:
        return [partial(torch.narrow, dim=0, start=start, length=size) for start, size in places]
    return [partial(_rows_of_each_group, groups, start, size) for start, size in places]


def _rows_of_each_group(groups: int, start: int, rows: int, parameter: torch.Tensor) -> torch.Tensor:
    """View [rows of all groups, ...] as [groups, rows, ...]."""
    return parameter.view(groups, -1, *parameter.shape[1:])[:, start : start + rows]


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
    """List every tensor of the architecture, in the order of the forward."""
    return [piece.name for tensor in checkpoint_tensors(arch) for piece in tensor.pieces]


def check_names(names: Collection[str], arch: Architecture, folder: object) -> None:
    """Reject tensors ``names`` of ``folder`` that are not those of ``arch``.

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
    """Reject an output layer that differs from the embedding which a tied model takes in its place.

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
    """Spell up to three of ``names``, and how many more there are."""
    shown = ", ".join(printable(name, 100) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
