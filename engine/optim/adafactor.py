"""Adafactor on parameters that tensor-parallel ranks split and that fuse several Hugging Face matrices.

The step is the one that transformers' Adafactor takes on the Hugging Face tensors inside the parameters one by one.
Invariant: the update of a tensor depends on the whole tensor and on nothing else, however it is fused, split or padded.

R rows and C columns of a Hugging Face tensor; a rank holds r of its rows or c of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from reflectron.engine.model.hf_mapping import HfPiece

# [dimension over which the squared gradients are averaged]
_AVERAGES = ("exp_avg_sq_col", "exp_avg_sq_row")


class Adafactor(torch.optim.Optimizer):
    """Adafactor with a given learning rate and without first moment (Shazeer and Stern, arXiv 1804.04235).

    The arithmetic is that of ``transformers.optimization.Adafactor(scale_parameter=False, relative_step=False)``, the
    ``Trainer``'s ``optim="adafactor"``. Per Hugging Face tensor, at its step t, with beta = 1 - t**decay_rate: the
    averages of squared gradients + eps along rows and along columns (a vector: the squares themselves) move by
    1 - beta; the update is the gradient over the root of their outer product over their mean, divided by its root mean
    square over ``clip_threshold`` where that exceeds 1; weight decay is decoupled and scaled by the learning rate.

    ``state[parameter]`` holds ``step`` (int) and, under each Hugging Face name, float32 averages: ``exp_avg_sq_row``
    [r or R] and ``exp_avg_sq_col`` [c or C] of a matrix, ``exp_avg_sq`` (this rank's share) of a vector. An average
    over a split dimension is whole, and the same on all ranks. Rows that pad the vocabulary have no state and are never
    touched.

    Over ``tensor_group`` are summed, for split tensors only: the averages over the split dimension, then the squares of
    the updates, which depend on the first sums nonlinearly. That makes two all-reduces a step for any number of
    tensors, none with one rank. Nothing else is exchanged: data-parallel replicas hold the same gradients, and no
    tensor spans pipeline stages. Temporaries have the size of one tensor's share, for which its update is computed
    twice.

    Args:
        params: parameter groups; ``lr`` and ``weight_decay`` may differ between groups. Parameters are looked up by
            their place at every step, for megatron-core puts float32 copies there after construction. One without a
            gradient is skipped; then it must have none on any rank of ``tensor_group``.
        pieces: ``pieces[group][i]`` are the Hugging Face tensors in parameter ``i`` of that group.
        lr: learning rate.
        decay_rate: negative exponent of the averages' decay over steps.
        clip_threshold: largest root mean square of one tensor's update.
        eps: added to the squared gradients.
        weight_decay: share of a weight, times the learning rate, that a step takes away.
        tensor_group: ranks that split the tensors; None when they are whole here.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        pieces: list[list[list[HfPiece]]],
        *,
        lr: float,
        decay_rate: float,
        clip_threshold: float,
        eps: float = 1e-30,
        weight_decay: float,
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        options = {"lr": lr, "decay_rate": decay_rate, "clip_threshold": clip_threshold, "eps": eps}
        super().__init__(params, options | {"weight_decay": weight_decay})
        self._pieces = pieces
        self._tensor_group = tensor_group
        self._rank = 0 if tensor_group is None else dist.get_rank(tensor_group)
        self._ranks = 1 if tensor_group is None else dist.get_world_size(tensor_group)

    def initialize_state(self) -> None:
        """Give every parameter without state zero averages and step 0, as before the first step."""
        for _, parameter, pieces in self._places():
            if not self.state[parameter]:
                self.state[parameter] = {"step": 0} | {
                    piece.name: _zero_averages(piece, self._real_rows(piece, parameter)) for piece in pieces
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.initialize_state()
        shards = list(self._next_shards())
        self._average_squares(shards)
        for shard, square_sum in zip(shards, self._update_square_sums(shards), strict=True):
            shard.move(square_sum)

    def _places(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, list[HfPiece]]]:
        for group, pieces_of_group in zip(self.param_groups, self._pieces, strict=True):
            for parameter, pieces in zip(group["params"], pieces_of_group, strict=True):
                yield group, parameter, pieces

    def _next_shards(self) -> Iterator[_Shard]:
        """Count the step of every tensor that has a gradient, and yield this rank's share of it."""
        for group, parameter, pieces in self._places():
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            state["step"] += 1
            for piece in pieces:
                yield _Shard(
                    piece=piece,
                    split_dim=piece.shard_dim if self._ranks > 1 else None,
                    parameter=self._real_rows(piece, parameter),
                    gradient=self._real_rows(piece, parameter.grad),
                    averages=state[piece.name],
                    beta=1.0 - state["step"] ** group["decay_rate"],
                    group=group,
                )

    def _real_rows(self, piece: HfPiece, tensor: torch.Tensor) -> torch.Tensor:
        """Return a view on the piece without the rows that pad the vocabulary, at the end of the last ranks."""
        local = piece.view(tensor)
        # A view of more dimensions interleaves heads; only the vocabulary is padded.
        if piece.shard_dim == 0 and local.ndim == len(piece.shape):
            return local[: max(0, piece.shape[0] - self._rank * local.shape[0])]
        return local

    def _average_squares(self, shards: list[_Shard]) -> None:
        averages = [shard.average_squares() for shard in shards]
        self._sum_over_ranks(
            [
                average[_AVERAGES[shard.split_dim]]
                for shard, average in zip(shards, averages, strict=True)
                if shard.is_matrix and shard.split_dim is not None
            ]
        )
        for shard, average in zip(shards, averages, strict=True):
            for key, value in average.items():
                shard.averages[key].mul_(shard.beta).add_(value, alpha=1.0 - shard.beta)

    def _update_square_sums(self, shards: list[_Shard]) -> list[torch.Tensor]:
        """Return, for each shard, the sum of the squares of the whole tensor's update before clipping."""
        sums = [shard.update().square_().sum() for shard in shards]
        self._sum_over_ranks([value for shard, value in zip(shards, sums, strict=True) if shard.split_dim is not None])
        return sums

    def _sum_over_ranks(self, tensors: list[torch.Tensor]) -> None:
        """Replace the tensors by their sums over the tensor-parallel ranks, in one collective."""
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self._tensor_group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@dataclass(frozen=True)
class _Shard:
    """This rank's share of one Hugging Face tensor in one step, without padded rows."""

    piece: HfPiece
    split_dim: int | None
    """Dimension along which other ranks hold the rest."""
    parameter: torch.Tensor
    """Strided view on the share, of the shape of ``gradient``; it is never copied, not even where heads interleave."""
    gradient: torch.Tensor
    averages: dict[str, torch.Tensor]
    """The tensor's part of the state."""
    beta: float
    """Factor of the averages in the step."""
    group: dict[str, Any]
    """The parameter group: lr, weight_decay, clip_threshold, eps."""

    @property
    def is_matrix(self) -> bool:
        return len(self.piece.shape) == 2

    def average_squares(self) -> dict[str, torch.Tensor]:
        """Return what the step adds to each average; over a split dimension the rank's part of it, else the whole."""
        squares = self.gradient.square().add_(self.group["eps"]).reshape(_local_shape(self.piece, self.gradient))
        if not self.is_matrix:
            return {"exp_avg_sq": squares}
        return {key: squares.sum(dim) / self.piece.shape[dim] for dim, key in enumerate(_AVERAGES)}

    def update(self) -> torch.Tensor:
        """Return the gradient over the root of its estimated mean square, in a new tensor of the gradient's shape."""
        if not self.is_matrix:
            factor = self.averages["exp_avg_sq"].rsqrt()
        else:
            row, column = self.averages["exp_avg_sq_row"], self.averages["exp_avg_sq_col"]
            # Either has the same mean, that of all squares; where rows are split, only the columns' average is whole.
            mean = (column if self.split_dim == 0 else row).mean()
            factor = (row / mean).rsqrt_().unsqueeze(-1) * column.rsqrt()
        return factor.view_as(self.gradient).mul_(self.gradient)

    def move(self, square_sum: torch.Tensor) -> None:
        """Clip the update, of which ``square_sum`` [] is the whole tensor's sum of squares, and apply it."""
        rate, weight_decay, update = self.group["lr"], self.group["weight_decay"], self.update()
        root_mean_square = (square_sum / math.prod(self.piece.shape)).sqrt_()
        update.div_((root_mean_square / self.group["clip_threshold"]).clamp_(min=1.0)).mul_(rate)
        if weight_decay != 0:
            self.parameter.add_(self.parameter, alpha=-weight_decay * rate)
        self.parameter.sub_(update)


def _zero_averages(piece: HfPiece, local: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = _local_shape(piece, local)
    shapes = {"exp_avg_sq": shape} if len(shape) == 1 else {"exp_avg_sq_row": shape[:1], "exp_avg_sq_col": shape[1:]}
    return {key: torch.zeros(size, dtype=torch.float32, device=local.device) for key, size in shapes.items()}


def _local_shape(piece: HfPiece, local: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the rank's share as a Hugging Face tensor: heads no longer interleaved."""
    shape = list(piece.shape)
    if piece.shard_dim is not None:
        shape[piece.shard_dim] = local.numel() * shape[piece.shard_dim] // math.prod(shape)
    return tuple(shape)
