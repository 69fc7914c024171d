"""Adafactor on tensors that two ranks split, against the whole tensors on one.

The test starts this file itself as the two ranks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reflectron.engine.optim.adafactor import Adafactor
from reflectron.engine.parallel.launch import spawn_local

RANKS, STEPS, HIDDEN = 2, 5, 6
OPTIONS = {"lr": 0.3, "decay_rate": -0.8, "clip_threshold": 1.0, "weight_decay": 0.1}


@dataclass(frozen=True)
class Piece:
    """Stands for ``HfPiece``, whose module takes seconds to import."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    view: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fused:
    """A parameter: shape of a rank's part, and the tensors in it."""

    local_shape: tuple[int, ...]
    pieces: list[Piece]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def interleaved(start: int, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Two groups a rank, each of 4 query rows, 2 key rows, 2 value rows."""
    return lambda tensor: tensor.view(2, 8, *tensor.shape[1:])[:, start : start + rows]


def qkv(kind: str, *columns: int) -> Fused:
    parts = (("q", 0, 4), ("k", 4, 2), ("v", 6, 2))
    return Fused(
        (16, *columns),
        [Piece(f"{name}.{kind}", (4 * rows, *columns), 0, interleaved(start, rows)) for name, start, rows in parts],
    )


def half(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.view(2, -1, HIDDEN)[index]


PARAMETERS = [
    Fused((4, HIDDEN), [Piece("one padded row", (7, HIDDEN), 0, whole)]),
    Fused((4, HIDDEN), [Piece("second rank all padding", (3, HIDDEN), 0, whole)]),
    qkv("weight", HIDDEN),
    qkv("bias"),
    Fused((10, HIDDEN), [Piece("gate", (10, HIDDEN), 0, half(0)), Piece("up", (10, HIDDEN), 0, half(1))]),
    Fused((HIDDEN, 5), [Piece("down", (HIDDEN, 10), 1, whole)]),
    Fused((HIDDEN,), [Piece("norm", (HIDDEN,), None, whole)]),
    Fused((3, HIDDEN), [Piece("replicated matrix", (3, HIDDEN), None, whole)]),
]
PIECES = [piece for fused in PARAMETERS for piece in fused.pieces]


def whole_tensors(seed: int) -> dict[str, torch.Tensor]:
    """By name; rows of uneven size."""
    random = torch.Generator().manual_seed(seed)
    return {
        piece.name: torch.randn(piece.shape, generator=random)
        * torch.randn(piece.shape[0], generator=random).exp().view(-1, *[1] * (len(piece.shape) - 1))
        for piece in PIECES
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    """A tall third and a flat fourth gradient make the update clipped and not clipped."""
    scale = (1.0, 1.0, 10.0, 0.01, 1.0)[step]
    return {name: value * scale for name, value in whole_tensors(100 + step).items()}


def slot(piece: Piece, local: torch.Tensor, rank: int) -> tuple[torch.Tensor, slice | tuple[slice, slice]]:
    """A rank's real part of a tensor: the view in its parameter and where that lies in the whole tensor."""
    view = piece.view(local)
    if piece.shard_dim is None:
        return view, slice(None)
    if piece.shard_dim == 1:
        return view, (slice(None), slice(rank * view.shape[1], (rank + 1) * view.shape[1]))
    rows = view.numel() // (piece.shape[1] if len(piece.shape) == 2 else 1)
    real = min(rows, max(0, piece.shape[0] - rank * rows))
    return view if real == rows else view[:real], slice(rank * rows, rank * rows + real)


def scatter(tensors: dict[str, torch.Tensor], rank: int, padding: float) -> list[torch.Tensor]:
    """A rank's fused parameters."""
    result = [torch.full(fused.local_shape, padding) for fused in PARAMETERS]
    for fused, local in zip(PARAMETERS, result, strict=True):
        for piece in fused.pieces:
            view, place = slot(piece, local, rank)
            view.copy_(tensors[piece.name][place].reshape(view.shape))
    return result


def gather(parameters_of_rank: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole tensors again."""
    result = {piece.name: torch.zeros(piece.shape) for piece in PIECES}
    for rank, parameters in enumerate(parameters_of_rank):
        for fused, local in zip(PARAMETERS, parameters, strict=True):
            for piece in fused.pieces:
                view, place = slot(piece, local, rank)
                result[piece.name][place] = view.reshape(result[piece.name][place].shape)
    return result


def rank_main(folder: Path) -> None:
    """Train this rank's parameters and write them, with the number of collectives of each step."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    parameters = scatter(whole_tensors(1), rank, padding=0.0)
    pieces: Any = [[fused.pieces for fused in PARAMETERS]]
    optimizer = Adafactor([{"params": parameters}], pieces, **OPTIONS, tensor_group=dist.group.WORLD)
    collectives, all_reduce = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        collectives[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    for step in range(STEPS):
        collectives.append(0)
        # Gradients of padded rows would do harm if they took part.
        for parameter, gradient in zip(parameters, scatter(gradients(step), rank, padding=1e3), strict=True):
            parameter.grad = gradient
        optimizer.step()
    torch.save((parameters, collectives), folder / f"result_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def one_process_result() -> dict[str, torch.Tensor]:
    tensors = whole_tensors(1)
    pieces: Any = [[[Piece(piece.name, piece.shape, piece.shard_dim, whole)] for piece in PIECES]]
    optimizer = Adafactor([{"params": list(tensors.values())}], pieces, **OPTIONS, tensor_group=None)
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            tensors[name].grad = gradient
        optimizer.step()
    return tensors


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    assert spawn_local(command, RANKS, threads_per_process=1, log_dir=tmp_path) == 0
    results = [torch.load(tmp_path / f"result_{rank}.pt") for rank in range(RANKS)]
    parameters_of_rank = [parameters for parameters, _ in results]

    assert [collectives for _, collectives in results] == [[2] * STEPS] * RANKS
    gathered, expected = gather(parameters_of_rank), one_process_result()
    for name, value in expected.items():
        torch.testing.assert_close(
            gathered[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    first, second = parameters_of_rank
    assert not second[0][3:].any()
    assert not second[1].any()
    for index in (-1, -2):
        assert torch.equal(first[index], second[index])


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
