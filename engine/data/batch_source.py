"""Where the samples of each optimizer step come from.

Packing, weighting and the split over ranks (``global_batch``) ask a ``BatchSource`` and nothing else, so a source that
generates its samples with the model in training needs no change there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from reflectron.engine.config import Config
from reflectron.engine.data.masking import mask_rate, visible_tokens
from reflectron.engine.data.sampler import SampleOrder, SampleRef, mask_draws
from reflectron.engine.data.store import TokenStore
from reflectron.engine.data.views import SampleViews, make_views


@dataclass(frozen=True)
class SampleId:
    """A sample, by where a user finds it."""

    file: str
    """Data file as ``data.train`` names it."""
    record: int
    """0-based record of that file."""

    def __str__(self) -> str:
        return f"{self.file} record {self.record}"


@dataclass(frozen=True, kw_only=True)
class StepSamples:
    """The samples of one optimizer step, over all ranks."""

    views: Sequence[SampleViews]
    """What the model sees of each."""
    mask_rate: float
    """Rate of the dynamic mask that drew them."""


class BatchSource(Protocol):
    """The samples of a run, step by step; every rank asks its own source and all answer alike."""

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        ...

    @property
    def knows_steps_ahead(self) -> bool:
        """Whether the samples of a step depend on its number alone, so that they can be prepared while the step before
        it trains; false where the weights that this step leaves generate them."""
        ...

    def samples(self, step: int) -> StepSamples:
        """Return the samples of 0-based ``step``; nothing of them is read later.

        Raises:
            ValueError: when they cannot be had as the run began with them.
        """
        ...

    def sample_ids(self, step: int) -> list[SampleId]:
        """Return the samples of 0-based ``step`` by name, in the order of ``samples``."""
        ...


class StoreSource:
    """The samples of a token store, in an order that was fixed before the run.

    Args:
        store: tokenised samples.
        order: which samples a step trains on.
        config: mask, batch size and seed.
        total_steps: length of the run; the mask rate is a share of it.
        epochs: passes after which the last batch stops short; None when a number of steps ends the run.
    """

    knows_steps_ahead = True

    def __init__(
        self, store: TokenStore, order: SampleOrder, config: Config, *, total_steps: int, epochs: float | None
    ) -> None:
        self.store, self.order, self.config = store, order, config
        self.total_steps, self.epochs = total_steps, epochs

    def refs(self, step: int) -> list[SampleRef]:
        """Return the listings that 0-based ``step`` takes, in order."""
        return self.order.global_batch(step, self.config.batch.global_batch_size, self.epochs)

    def samples(self, step: int) -> StepSamples:
        """Draw the views of 0-based ``step``.

        Raises:
            ValueError: when the token store was changed meanwhile.
        """
        self.store.check_unchanged()
        rate = mask_rate(step, self.total_steps)
        views = [self._views(ref, rate) for ref in self.refs(step)]
        self.store.check_unchanged()
        return StepSamples(views=views, mask_rate=rate)

    def sample_ids(self, step: int) -> list[SampleId]:
        """Return file and record of each sample of 0-based ``step``, in the order of its global batch."""
        files, store = self.config.data.train, self.store
        samples = [ref.sample for ref in self.refs(step)]
        return [SampleId(files[store.file_index[sample]].path, int(store.record_index[sample])) for sample in samples]

    def _views(self, ref: SampleRef, rate: float) -> SampleViews:
        sample = self.store[ref.sample]
        visible = visible_tokens(sample, self.config.mask, rate, mask_draws(self.config.seed, ref))
        views = make_views(sample, visible)
        # The store is a mapped file; a copy cannot change once it has been checked.
        return replace(views, input_ids=views.input_ids.copy())
