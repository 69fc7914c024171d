"""One rank of the job of ``test_nonfinite.py``: two replicas, and a gradient that is NaN on the second of them alone.

``python nonfinite_ranks.py RUN.yaml RESULT.json``; the main rank writes what every step said.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
from reflectron.engine.training.run import open_run_inputs, prepare
from reflectron.engine.training.trainer import Trainer
from reflectron.tools.load_config import load_config

RECURRING, PASSING = 2, 3


def main(path: str, result: str) -> None:
    config = load_config(path, [])
    if os.environ["RANK"] == "0":
        prepare(config, progress=False)
    groups = start_process_groups(config.parallel, config.seed)
    trainer = Trainer(config, open_run_inputs(config), groups)
    seen = {"step": 1, "backwards": 0}

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen["backwards"] += 1
        first = seen["backwards"] == 1
        wrong = seen["step"] == RECURRING or (seen["step"] == PASSING and first)
        return gradient * torch.nan if wrong else gradient

    if torch.distributed.get_rank() == 1:
        # A norm's: a matrix product may add its gradient to the sum itself, past every hook.
        trainer.model.chunks[0].decoder.layers[1].pre_mlp_layernorm.weight.register_hook(spoil)
    steps: list[dict[str, Any]] = []
    weights = [[p.detach().clone() for p in trainer.model.chunks[0].parameters()]]
    for row in trainer.steps(print):
        seen.update(step=row.step + 1, backwards=0)
        weights.append([p.detach().clone() for p in trainer.model.chunks[0].parameters()])
        steps.append(
            {
                "skipped": row.skipped,
                "changed": not all(map(torch.equal, weights[-2], weights[-1])),
                "findings": [str(finding) for finding in trainer.findings],
                "samples": [list(finding.samples) for finding in trainer.findings],
                "in_a_row": trainer.skipped.in_a_row,
            }
        )
    if groups.is_main:
        Path(result).write_text(json.dumps(steps), encoding="utf-8")
    stop_process_groups()


if __name__ == "__main__":
    main(*sys.argv[1:])
