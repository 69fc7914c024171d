"""The head over 1, 2 and 4 vocabulary shards, on gloo processes that run this file."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import Divergence, HeadLoss, PairRows, Rows

HIDDEN, COLUMNS = 8, 24


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_shards_equal_the_whole_vocabulary(backend: str, size: int, tmp_path: Path) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    # Gloo ranks hold their tensors on the CPU, so the kernels run in the interpreter.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, str(tmp_path / "store"), backend, str(size)]
    ranks = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ranks.returncode == 0, ranks.stderr


def make_problem(dtype: torch.dtype, vocab_size: int) -> tuple[list[Tensor], PairRows, Rows]:
    """Rows whose labels are the first and last column of each of four shards, and ignored ones."""
    rng = torch.Generator().manual_seed(vocab_size)
    edges = [column for start in range(0, COLUMNS, 6) for column in (start, start + 5) if column < vocab_size]
    labels = torch.tensor([*edges, vocab_size - 1, -100])
    n = len(labels)
    shapes = ((COLUMNS, HIDDEN), (n, HIDDEN), (n, HIDDEN), (n, HIDDEN))
    inputs = [torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    weights = torch.rand(4, n, generator=rng)
    weights[:, 1] = 0
    pairs = PairRows(inputs[1], inputs[2], labels, labels.flip(0), *weights[:3])
    return inputs, pairs, Rows(inputs[3], labels.roll(1), weights[3])


def run_shard(
    inputs: list[Tensor], pairs: PairRows, rows: Rows, group: dist.ProcessGroup, options: dict
) -> tuple[HeadLoss, list[Tensor]]:
    """Loss, and gradients put together again: shards of the matrix gathered, partial hidden gradients summed."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shard = inputs[0].detach().chunk(size)[rank].requires_grad_()
    main_grad = torch.zeros(shard.shape, dtype=torch.promote_types(shard.dtype, torch.float32))
    out = distillation_head(shard, pairs, rows, tp_group=group, main_grad=main_grad, **options)
    partial = torch.autograd.grad(out.loss, inputs[1:])
    for gradient in partial:
        dist.all_reduce(gradient, group=group)
    shards = [torch.empty_like(main_grad) for _ in range(size)]
    dist.all_gather(shards, main_grad, group=group)
    return out, [torch.cat(shards), *partial]


def check_teacher_weight(group: dist.ProcessGroup, dtype: torch.dtype, vocab_size: int, options: dict) -> None:
    """A teacher with a matrix of its own, wider than the student's, on shards and as a whole."""
    (weight, _, student, hidden), pairs, rows = make_problem(dtype, vocab_size)
    rng = torch.Generator().manual_seed(1)
    shapes = ((len(student), HIDDEN + 3), (COLUMNS, HIDDEN + 3))
    teacher, matrix = (torch.randn(*shape, generator=rng).to(dtype).requires_grad_() for shape in shapes)
    pairs = replace(pairs, teacher_hidden=teacher)
    options = {"vocab_size": vocab_size, **options}
    whole = distillation_head(weight, pairs, rows, teacher_weight=matrix, **options)
    expected = torch.autograd.grad(whole.loss, (weight, matrix, teacher, student, hidden))

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shards = [x.detach().chunk(size)[rank].requires_grad_() for x in (weight, matrix)]
    out = distillation_head(shards[0], pairs, rows, teacher_weight=shards[1], tp_group=group, **options)
    *own, teachers, students, others = torch.autograd.grad(out.loss, (*shards, teacher, student, hidden))
    for partial in (teachers, students, others):
        dist.all_reduce(partial, group=group)
    found = (*own, teachers, students, others)
    expected = (*(x.chunk(size)[rank] for x in expected[:2]), *expected[2:])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for value, true_value in zip((*vars(out).values(), *found), (*vars(whole).values(), *expected), strict=True):
        torch.testing.assert_close(value, true_value, rtol=tolerance, atol=tolerance)


def check(group: dist.ProcessGroup, dtype: torch.dtype, vocab_size: int, options: dict) -> None:
    inputs, pairs, rows = make_problem(dtype, vocab_size)
    whole = distillation_head(inputs[0], pairs, rows, vocab_size=vocab_size, **options)
    expected = torch.autograd.grad(whole.loss, inputs)
    out, gradients = run_shard(inputs, pairs, rows, group, {"vocab_size": vocab_size, **options})
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for value, true_value in zip((*vars(out).values(), *gradients), (*vars(whole).values(), *expected), strict=True):
        torch.testing.assert_close(value, true_value, rtol=tolerance, atol=tolerance)
    losses = [torch.empty_like(out.loss) for _ in range(dist.get_world_size(group))]
    dist.all_gather(losses, out.loss.detach(), group=group)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "the loss differs between ranks"


def worker(rank: int, store: str, backend: str, size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    whole, alone = dist.new_group(list(range(size))), [dist.new_group([owner]) for owner in range(size)]
    # 12 columns leave all of the last shard of two to padding, 13 a part of shard 2 of four and all of shard 3.
    types = (torch.float64, torch.float32) if backend == "reference" else (torch.float32,)
    sizes = (24, 13, 12) if backend == "reference" else (13, 12)
    for dtype, vocab_size, divergence in itertools.product(types, sizes, get_args(Divergence)):
        options = {"divergence": divergence, "jsd_beta": 0.3, "temperature": 1.5, "backend": backend}
        check(whole, dtype, vocab_size, options)
        check_teacher_weight(whole, dtype, vocab_size, options)
    check(alone[rank], types[0], 13, {"backend": backend})

    no_rows = Rows(torch.empty(0, HIDDEN, requires_grad=True), torch.empty(0, dtype=torch.long), torch.empty(0))
    shard = torch.ones(COLUMNS // size, HIDDEN, requires_grad=True)
    loss = distillation_head(shard, rows=no_rows, divergence="jsd", tp_group=whole, backend=backend).loss
    loss.backward()
    assert loss.item() == 0
    assert shard.grad is not None
    assert not shard.grad.any()
    with pytest.raises(ValueError, match=r"expected a torch\.distributed process group"):
        distillation_head(shard, rows=no_rows, tp_group=alone[(rank + 1) % size])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = int(sys.argv[3])
    torch.multiprocessing.start_processes(worker, (sys.argv[1], sys.argv[2], ranks), nprocs=ranks, start_method="fork")
