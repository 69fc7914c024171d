"""One rank that trains the run which the reference recorded, its packs shared among all ranks of the job.

``python recorded_run_ranks.py OUT.json`` writes [loss, gradient norm] of each step, of four samples in packs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from reflectron.engine.config import BatchConfig, ParallelConfig
from reflectron.engine.data.global_batch import assemble, share_of_batch
from reflectron.engine.data.packing import CostModel
from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups
from testkit.recorded_run import ACCUMULATED, CONFIG, RUN, tokenized_samples, views_at


def main(out: Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        batch=BatchConfig(global_batch_size=ACCUMULATED, tokens_per_microbatch=768),
        parallel=ParallelConfig(device="cpu", context_parallel_size=int(os.environ["WORLD_SIZE"])),
    )
    groups = start_process_groups(config.parallel, config.seed)
    # These import megatron-core, which must find CUDA redirected.
    from reflectron.engine.training.step import train_step
    from testkit.checkpoint_ranks import Training

    model, samples = Training.build(config, groups, with_weights=True).model, tokenized_samples()
    cost = CostModel(per_token=1.0, per_token_squared=0.0, per_row=0.0)
    steps = []
    for step, learning_rate in enumerate(RUN["lr_used"]):
        recorded = RUN["collated"][ACCUMULATED * step : ACCUMULATED * (step + 1)]
        views = [views_at(samples[name], *(one["mask_rates"] or [0.0])) for one in recorded for name in one["samples"]]
        whole = assemble(views, config, cost, 0.0, groups.dp.rank(), groups.dp.size())
        batch = share_of_batch(whole, groups.cp.rank(), groups.cp.size())
        result = train_step(model.wrapped, model.optimizer, groups, batch, learning_rate)
        steps.append([result.terms.loss, result.grad_norm])
    if groups.is_main:
        out.write_text(json.dumps(steps), encoding="utf-8")
    stop_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
