"""Lengths of a training set in, from its files or as an assumed distribution; out come the loads of typical steps.

The mask rate rises over a run and the students' views shrink with it. A run is looked at in three phases of equal
length, as the strategy ``block`` has them, each at the rate in its middle.

n samples, 3 phases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from reflectron.engine.config import Config

if TYPE_CHECKING:
    from reflectron.engine.data.store import TokenStore

PHASES = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0))

Distribution = Literal["papers", "oss-instruct", "evol-instruct"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A training set by its lengths."""

    teacher: np.ndarray
    """int [n], tokens of the teacher's view, or of a generation sample."""
    student: np.ndarray
    """int [3, n], tokens of the student's view in each phase; 0 without a student."""
    rows: np.ndarray
    """int [n], rows of both views that need logits."""
    reflection: np.ndarray
    """bool [n], samples with a student."""
    repeat: np.ndarray
    """float [n], times that an epoch lists the sample."""
    source: str
    """Where the lengths are from."""

    def steps(self, config: Config) -> int:
        """Optimizer steps of a run."""
        if config.train.steps:
            return config.train.steps
        return math.ceil(float(self.repeat.sum()) * config.train.epochs / config.batch.global_batch_size)


@dataclass(frozen=True)
class Batch:
    """A global batch with the mean lengths of its phase."""

    teacher: np.ndarray
    student: np.ndarray
    rows: np.ndarray
    reflection: np.ndarray


def typical_batch(samples: Samples, phase: int, size: int) -> Batch:
    """``size`` samples at even distances in the list of all samples sorted by length; the same at every call."""
    order = np.lexsort((samples.teacher, samples.reflection))
    listed = np.cumsum(samples.repeat[order])
    chosen = order[np.searchsorted(listed, (np.arange(size) + 0.5) / size * listed[-1])]
    return Batch(
        samples.teacher[chosen], samples.student[phase][chosen], samples.rows[chosen], samples.reflection[chosen]
    )


@dataclass(frozen=True)
class _Kind:
    """Samples of one file of an assumed distribution."""

    count: int
    mean: float
    """Tokens."""
    spread: float
    """Standard deviation of the logarithm."""
    repeat: int
    reflection: bool


# Instruction data is 371 MB of JSON with 156.5k samples and ReflectionSeq-DS 92.7 MB with 12.4k; about 3 characters are
# a token, and 5 % of JSON is taken for keys and escapes. ReflectionSeq-GPT, 10.3k samples, is assumed to be like DS.
_TOKENS_PER_BYTE = 0.95 / 3
_REFLECTION_MEAN = 92.7e6 * _TOKENS_PER_BYTE / 12_400
_DISTRIBUTIONS: dict[str, tuple[_Kind, ...]] = {
    "papers": (
        _Kind(156_500, 371e6 * _TOKENS_PER_BYTE / 156_500, 0.6, 1, False),
        _Kind(12_400, _REFLECTION_MEAN, 0.4, 2, True),
        _Kind(10_300, _REFLECTION_MEAN, 0.4, 2, True),
    ),
    # Magicoder's two stages: their means are guesses below its limits of 1216 and 1024 tokens (arXiv 2312.02120).
    "oss-instruct": (_Kind(75_197, 480, 0.4, 1, False),),
    "evol-instruct": (_Kind(110_000, 480, 0.5, 1, False),),
}
_SHORTEST = 48
# Assumed shares of a reflection sample's tokens: the first user turn, the three types of blocks of the reflection
# sequence, and what follows it, of which the answer bears a loss. Of instruction data, the answer's share.
_SHARES = {"user": 0.12, "e": 0.22, "t": 0.20, "c": 0.30, "final": 0.16}
_FINAL_ANSWER, _ANSWER = 0.12, 0.70
DISTRIBUTION_NOTES = [
    "Papers' lengths: 371 MB of JSON are 156.5k instruction samples, 92.7 MB 12.4k of ReflectionSeq-DS; 3 characters a "
    "token after 5 % for JSON; the 10.3k of ReflectionSeq-GPT are as long as DS's; log-normal with a spread of 0.6 and "
    "0.4; reflection listed twice.",
    "A reflection sample: first turn 12 %, executions 22 %, text 20 %, code 30 %, final turn 16 % (its answer 12 %); "
    "70 % of an instruction sample bear a loss.",
    "Magicoder's lengths: log-normal with a mean of 480 tokens, a guess.",
]


def assumed_samples(name: Distribution, config: Config) -> Samples:
    """A documented distribution, drawn with a fixed seed: log-normal within ``data.max_length``, of a given mean."""
    random = np.random.default_rng(0)
    kinds = _DISTRIBUTIONS[name]
    teacher = np.concatenate([_lengths(kind, config.data.max_length, random) for kind in kinds])
    counts = [kind.count for kind in kinds]
    reflection = np.repeat([kind.reflection for kind in kinds], counts)
    pairs = teacher * _FINAL_ANSWER
    rows = np.where(reflection, teacher * (_SHARES["t"] + _SHARES["c"]) + 2 * pairs, teacher * _ANSWER)
    shares = np.array([_student_share(config, (low + high) / 2) for low, high in PHASES])
    return Samples(
        teacher=teacher,
        student=(shares[:, None] * teacher * reflection).astype(np.int64),
        rows=rows.astype(np.int64),
        reflection=reflection,
        repeat=np.repeat(np.array([kind.repeat for kind in kinds], np.float64), counts),
        source=f"assumed distribution {name!r}, {len(teacher):,} samples",
    )


def _lengths(kind: _Kind, longest: int, random: np.random.Generator) -> np.ndarray:
    """int [count] within the limits, their mean that of ``kind`` as far as ``longest`` allows."""
    shape = np.exp(random.normal(0.0, kind.spread, kind.count))
    scale, lengths = kind.mean, shape
    for _ in range(8):
        lengths = np.clip(shape * scale, _SHORTEST, longest)
        scale *= kind.mean / float(lengths.mean())
    return lengths.astype(np.int64)


def _student_share(config: Config, rate: float) -> float:
    """Of a reflection sample's tokens that the student sees."""
    strategy, final = config.mask.strategy, _SHARES["final"]
    if strategy == "none":
        return 0.0  # the teacher's view serves both
    if strategy == "all":
        return final
    if strategy == "block":
        hidden = config.mask.order[: 1 + (rate >= PHASES[0][1]) + (rate >= PHASES[1][1])]
        return final + sum(_SHARES[block] for block in "tce" if block not in hidden)
    return final + (1 - rate) * sum(_SHARES[block] for block in "tce")


def samples_of(store: TokenStore, config: Config) -> Samples:
    """The samples of a tokenised training set, their views made as a run makes them."""
    from reflectron.engine.data.masking import visible_tokens
    from reflectron.engine.data.sampler import SampleRef, mask_draws
    from reflectron.engine.data.views import make_views

    count = len(store)
    student, rows = np.zeros((len(PHASES), count), np.int64), np.zeros(count, np.int64)
    reflection = np.zeros(count, bool)
    for index in range(count):
        sample = store[index]
        reflection[index] = sample.kind != "generation"
        for phase, (low, high) in enumerate(PHASES):
            draws = mask_draws(config.seed, SampleRef(0, index, 0))
            views = make_views(sample, visible_tokens(sample, config.mask, (low + high) / 2, draws))
            student[phase, index], rows[index] = len(views.student_positions), views.logit_rows
            if not reflection[index]:
                break
    return Samples(
        teacher=store.lengths.astype(np.int64),
        student=student,
        rows=rows,
        reflection=reflection,
        repeat=np.array([file.repeat for file in config.data.train])[store.file_index],
        source=f"{count:,} samples of data.train",
    )


def over_phases(values: Sequence[float]) -> float:
    """Mean over a run's steps of a number that each phase has one of."""
    return sum(value * (high - low) for value, (low, high) in zip(values, PHASES, strict=True))
