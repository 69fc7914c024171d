"""The norm of a gradient whose parts are split over different process groups, and clipping by it.

The test starts this file itself as the two ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reflectron.engine.parallel.launch import spawn_local

RANKS, CLIP, RATE = 2, 0.5, 0.1


def gradients(seed: int, count: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4 + i, generator=random) for i in range(count)]


def split(rank: int) -> list[torch.Tensor]:
    """A rank's share of the parameters that both ranks split."""
    return gradients(1 + rank, 3)


def replicated() -> list[torch.Tensor]:
    """Parameters of which each rank has all."""
    return gradients(0, 4)


def rank_main(folder: Path) -> None:
    """Measure, clip and update with one group, and with two, and write norm and parameters of each."""
    from reflectron.engine.parallel.cpu_backend import redirect_cuda_to_cpu

    redirect_cuda_to_cpu()
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer

    from reflectron.engine.optim.optimizer import gradient_axes, squared_gradient_norm, update

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    alone = [dist.new_group([member]) for member in range(RANKS)][rank]
    config = OptimizerConfig(optimizer="sgd", lr=RATE, clip_grad=CLIP)

    def part(grads: list[torch.Tensor], group: dist.ProcessGroup | None) -> FP32Optimizer:
        parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.main_grad = grad.clone()  # type: ignore[attr-defined]
        made = FP32Optimizer(torch.optim.SGD(parameters, lr=RATE), config, lambda _: None)
        made.grad_stats_parallel_group, made.tp_group = group, alone
        return made

    mine = replicated()[rank::RANKS]
    optimizers = {
        "one": part([*split(rank), *mine], dist.group.WORLD),
        "two": ChainedOptimizer([part(split(rank), dist.group.WORLD), part(replicated(), alone)]),
    }
    found = {}
    for name, optimizer in optimizers.items():
        square = squared_gradient_norm(optimizer).item()
        update(optimizer, square**0.5)
        parameters = [p.detach().tolist() for group in optimizer.param_groups for p in group["params"]]
        found[name] = {"square": square, "parameters": parameters, "axes": len(gradient_axes(optimizer))}
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_groups_give_the_norm_of_one(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    assert spawn_local(command, RANKS, threads_per_process=1, log_dir=tmp_path) == 0
    whole = [*split(0), *split(1), *replicated()]
    square = sum(grad.square().sum().item() for grad in whole)
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"found_{rank}.json").read_text())
        assert (found["one"]["axes"], found["two"]["axes"]) == (1, 2)
        expected = {"one": [*split(rank), *replicated()[rank::RANKS]], "two": [*split(rank), *replicated()]}
        for name, grads in expected.items():
            assert found[name]["square"] == pytest.approx(square, rel=1e-6)
            for parameter, grad in zip(found[name]["parameters"], grads, strict=True):
                torch.testing.assert_close(torch.tensor(parameter), -RATE * CLIP / square**0.5 * grad)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
