"""Loss terms on held-out samples, with the student at the end of the mask schedule.

The rate is 1 whatever the training has reached, so that values along a run are of the same task: the answer without the
reflection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reflectron.engine.config import Config
from reflectron.engine.data.global_batch import assemble, share_of_batch
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.packing import CostModel
from reflectron.engine.data.sampler import SampleRef, mask_draws
from reflectron.engine.data.store import TokenStore
from reflectron.engine.data.views import make_views
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.train_step import LossTerms, forward_backward, reduce_terms


def validate(
    chunks: Sequence[torch.nn.Module], store: TokenStore, config: Config, cost: CostModel, groups: ParallelGroups
) -> LossTerms:
    """Loss terms over all samples of ``store`` as one global batch; every rank calls it and gets the same."""
    samples = [store[index] for index in range(len(store))]
    draws = (mask_draws(config.seed, SampleRef(0, index, 0)) for index in range(len(store)))
    views = [
        make_views(sample, visible_tokens(sample, config.mask, 1.0, drawn))
        for sample, drawn in zip(samples, draws, strict=True)
    ]
    whole = assemble(views, config, cost, 1.0, groups.data.rank(), groups.data.size())
    batch = share_of_batch(whole, groups.context.rank(), groups.context.size())
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        sums = forward_backward(chunks, groups, batch, forward_only=True)
    for chunk in chunks:
        chunk.train()
    return reduce_terms(sums, batch, groups)
