"""A run comes in, the tokens that it will train on go out, before it trains; and the steps that reach so many tokens.

Tokens are those that enter the model: teacher views, student views and generation samples, without padding, counted by
the code that makes the batches. A student's view gets shorter as the mask rate rises with the share of the run that is
done, so the count depends on the run's length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflectron.engine.config import Config

if TYPE_CHECKING:
    from reflectron.engine.data.sampler import SampleOrder
    from reflectron.engine.data.store import TokenStore

# Tokens are nearly proportional to steps, so that two or three are enough.
_MOST_TRIALS = 8


def samples_of_run(config: Config, store: TokenStore) -> int:
    """Samples that a run trains on, repeats counted."""
    from reflectron.engine.training.run import run_length, sample_order

    order = sample_order(store, config.data.train, config.seed)
    steps, epochs = run_length(config, order)
    return order.total_samples(epochs) if epochs else steps * config.batch.global_batch_size


def tokens_of_run(config: Config, store: TokenStore) -> int:
    """Tokens that enter the model in a whole run."""
    from reflectron.engine.training.run import run_length, sample_order

    order = sample_order(store, config.data.train, config.seed)
    return _tokens(config, store, order, *run_length(config, order))


def steps_for_tokens(config: Config, store: TokenStore, tokens: int) -> int:
    """Steps of the run whose tokens come nearest to ``tokens``, as far as a few trials find it."""
    from reflectron.engine.training.run import run_length, sample_order

    order = sample_order(store, config.data.train, config.seed)
    counted: dict[int, int] = {}
    steps, _ = run_length(config, order)
    while steps not in counted and len(counted) < _MOST_TRIALS:
        counted[steps] = _tokens(config, store, order, steps, None)
        steps = max(round(steps * tokens / counted[steps]), 1)
    return min(counted, key=lambda steps: abs(counted[steps] - tokens))


def _tokens(config: Config, store: TokenStore, order: SampleOrder, steps: int, epochs: float | None) -> int:
    from reflectron.engine.data.batch_source import StoreSource
    from reflectron.engine.data.global_batch import count_tokens

    source = StoreSource(store, order, config, total_steps=steps, epochs=epochs)
    return sum(count_tokens(source.samples(step).views).total for step in range(steps))
