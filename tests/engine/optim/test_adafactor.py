"""Adafactor on fused parameters of one rank against transformers' on the separate Hugging Face tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor as HfAdafactor

from reflectron.engine.optim.adafactor import Adafactor

STEPS = 5
# A tall third and a flat fourth gradient make the update clipped and not clipped.
GRADIENT_SCALE = (1.0, 1.0, 10.0, 0.01, 1.0)
GROUPS, QUERIES, KEY, HIDDEN, FFN = 3, 4, 2, 10, 7


@dataclass(frozen=True)
class Piece:
    """Stands for ``HfPiece``, whose module takes seconds to import."""

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    view: Callable[[torch.Tensor], torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def interleaved(name: str, start: int, rows: int, *columns: int) -> Piece:
    def view(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(GROUPS, QUERIES + 2 * KEY, *columns)[:, start : start + rows]

    return Piece(name, (GROUPS * rows, *columns), 0, view)


def half(name: str, index: int) -> Piece:
    return Piece(name, (FFN, HIDDEN), 0, lambda tensor: tensor.view(2, -1, HIDDEN)[index])


def qkv(*columns: int) -> list[Piece]:
    parts = (("q", 0, QUERIES), ("k", QUERIES, KEY), ("v", QUERIES + KEY, KEY))
    return [interleaved(name, start, rows, *columns) for name, start, rows in parts]


SHAPES = [
    ((GROUPS * (QUERIES + 2 * KEY), HIDDEN), qkv(HIDDEN)),
    ((2 * FFN, HIDDEN), [half("gate", 0), half("up", 1)]),
    ((HIDDEN, FFN), [Piece("down", (HIDDEN, FFN), 1, whole)]),
    ((GROUPS * (QUERIES + 2 * KEY),), qkv()),
    ((HIDDEN,), [Piece("norm", (HIDDEN,), None, whole)]),
]
MATRICES = 3
PIECES = [pieces for _, pieces in SHAPES]


def initial_parameters() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=random) for shape, _ in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Return gradients of uneven size, with a row of zeros as a token that did not occur."""
    random = torch.Generator().manual_seed(100 + step)
    result = []
    for shape, _ in SHAPES:
        gradient = torch.randn(shape, generator=random) * torch.randn(shape[:1], generator=random).exp().view(
            -1, *[1] * (len(shape) - 1)
        )
        gradient[0] = 0
        result.append(gradient * GRADIENT_SCALE[step])
    return result


def build(parameters: list[torch.Tensor], **options: Any) -> Adafactor:
    """Two groups, as with weight decay only on matrices."""
    groups = [{"params": parameters[:MATRICES]}, {"params": parameters[MATRICES:], "weight_decay": 0.0}]
    defaults = {"lr": 0.3, "decay_rate": -0.8, "clip_threshold": 1.0, "weight_decay": 0.1}
    return Adafactor(groups, [PIECES[:MATRICES], PIECES[MATRICES:]], **(defaults | options), tensor_group=None)


def run(optimizer: Adafactor, steps: range) -> None:
    for step in steps:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def split(pieces: list[Piece], tensor: torch.Tensor) -> list[torch.Tensor]:
    return [piece.view(tensor).reshape(piece.shape).clone() for piece in pieces]


def transformers_result(**options: Any) -> list[torch.Tensor]:
    """The separate Hugging Face tensors after ``STEPS`` steps of transformers' optimizer."""
    tensors = [split(pieces, value) for pieces, value in zip(PIECES, initial_parameters(), strict=True)]
    matrices = [tensor for part in tensors[:MATRICES] for tensor in part]
    vectors = [tensor for part in tensors[MATRICES:] for tensor in part]
    options = {"lr": 0.3, "weight_decay": 0.1, "scale_parameter": False, "relative_step": False} | options
    optimizer = HfAdafactor([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **options)
    for step in range(STEPS):
        for pieces, parameters, gradient in zip(PIECES, tensors, gradients(step), strict=True):
            for parameter, part in zip(parameters, split(pieces, gradient), strict=True):
                parameter.grad = part
        optimizer.step()
    return matrices + vectors


def separate(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part for pieces, value in zip(PIECES, parameters, strict=True) for part in split(pieces, value)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"decay_rate": -0.5},
        {"decay_rate": -1.0, "lr": 5e-5},
        {"clip_threshold": 0.3},
        {"clip_threshold": 1e9},
    ],
    ids=str,
)
def test_equals_transformers_on_separate_tensors(options: dict[str, float]) -> None:
    parameters: list[torch.Tensor] = [torch.nn.Parameter(value) for value in initial_parameters()]
    run(build(parameters, **options), range(STEPS))
    for mine, theirs in zip(separate(parameters), transformers_result(**options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_parameters_replaced_after_construction_are_the_ones_that_move() -> None:
    placeholders = [value.bfloat16() for value in initial_parameters()]
    optimizer = build(placeholders)
    copies = initial_parameters()
    for group, values in zip(optimizer.param_groups, (copies[:MATRICES], copies[MATRICES:]), strict=True):
        for index, value in enumerate(values):
            group["params"][index] = value
    run(optimizer, range(STEPS))
    for mine, theirs in zip(separate(copies), transformers_result(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert set(optimizer.state) == set(copies)


def test_resumed_run_equals_the_uninterrupted_one() -> None:
    straight = initial_parameters()
    run(build(straight), range(STEPS))

    resumed = initial_parameters()
    first = build(resumed)
    run(first, range(3))
    second = build(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, range(3, STEPS))
    for mine, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(mine, theirs)


def test_state_is_initialized_in_the_shapes_of_the_separate_tensors() -> None:
    parameters = initial_parameters()
    optimizer = build(parameters)
    optimizer.initialize_state()
    state = optimizer.state[parameters[0]]
    assert state["step"] == 0
    assert {key: tuple(value.shape) for key, value in state["q"].items()} == {
        "exp_avg_sq_row": (GROUPS * QUERIES,),
        "exp_avg_sq_col": (HIDDEN,),
    }
    assert optimizer.state[parameters[3]]["k"]["exp_avg_sq"].shape == (GROUPS * KEY,)


def test_rows_that_pad_the_vocabulary_take_no_part() -> None:
    random = torch.Generator().manual_seed(2)
    padded = torch.randn(8, HIDDEN, generator=random)
    plain = padded[:5].clone()
    padded[5:] = 0
    options = {"lr": 0.3, "decay_rate": -0.8, "clip_threshold": 1.0, "weight_decay": 0.1, "tensor_group": None}
    optimizers = [
        Adafactor([{"params": [tensor]}], [[[Piece("embedding", (5, HIDDEN), 0, whole)]]], **options)
        for tensor in (padded, plain)
    ]
    for _ in range(2):
        padded.grad = torch.randn(8, HIDDEN, generator=random)
        plain.grad = padded.grad[:5].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(padded[:5], plain)
    assert not padded[5:].any()


def test_parameter_without_gradient_stays_and_keeps_its_step() -> None:
    parameters = initial_parameters()
    optimizer = build(parameters)
    parameters[2].grad = gradients(0)[2]
    optimizer.step()
    for index, (parameter, before) in enumerate(zip(parameters, initial_parameters(), strict=True)):
        assert torch.equal(parameter, before) == (index != 2)
        assert optimizer.state[parameter]["step"] == (index == 2)
