"""The lengths of a training set, from its files or an assumed distribution, and the loads of typical steps.

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
from typing_extensions import assert_never

from reflectron.engine.config import Config
from reflectron.engine.data.packing import microbatch_multiple, packing_sizes, plan_packs
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.training.flops import decoder_shape, forward_cost, training_cost, training_flops

if TYPE_CHECKING:
    from reflectron.engine.data.store import TokenStore
    from reflectron.engine.data.tokenization import TokenizedSample
    from reflectron.engine.data.views import SampleViews

PHASES = ((0.0, 0.33), (0.33, 0.67), (0.67, 1.0))

Distribution = Literal["papers", "oss-instruct", "evol-instruct"]


@dataclass(frozen=True, kw_only=True)
class SampleLengths:
    """The lengths of a training set's samples."""

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
    """Says where the lengths are from."""

    def steps(self, config: Config) -> int:
        """Count the optimizer steps of a run."""
        if config.train.steps:
            return config.train.steps
        return math.ceil(float(self.repeat.sum()) * config.train.epochs / config.batch.global_batch_size)


@dataclass(frozen=True)
class BatchLengths:
    """A global batch with the mean lengths of its phase."""

    teacher: np.ndarray
    student: np.ndarray
    rows: np.ndarray
    reflection: np.ndarray


def typical_batch(samples: SampleLengths, phase: int, size: int) -> BatchLengths:
    """Pick ``size`` samples at even distances in the list of all samples sorted by length; the same at every call."""
    order = np.lexsort((samples.teacher, samples.reflection))
    listed = np.cumsum(samples.repeat[order])
    chosen = order[np.searchsorted(listed, (np.arange(size) + 0.5) / size * listed[-1])]
    return BatchLengths(
        samples.teacher[chosen], samples.student[phase][chosen], samples.rows[chosen], samples.reflection[chosen]
    )


@dataclass(frozen=True)
class _Kind:
    """The samples of one file in an assumed distribution."""

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
# sequence, and what follows it, of which the answer has loss tokens. Of instruction data, the answer's share.
_SHARES = {"user": 0.12, "e": 0.22, "t": 0.20, "c": 0.30, "final": 0.16}
_FINAL_ANSWER, _ANSWER = 0.12, 0.70
DISTRIBUTION_NOTES = [
    "Papers' lengths: 371 MB of JSON are 156.5k instruction samples, 92.7 MB 12.4k of ReflectionSeq-DS; 3 characters a "
    "token after 5 % for JSON; the 10.3k of ReflectionSeq-GPT are as long as DS's; log-normal with a spread of 0.6 and "
    "0.4; reflection listed twice.",
    "A reflection sample: first turn 12 %, executions 22 %, text 20 %, code 30 %, final turn 16 % (its answer 12 %); "
    "70 % of an instruction sample are loss tokens.",
    "Magicoder's lengths: log-normal with a mean of 480 tokens, a guess.",
]


def assumed_samples(name: Distribution, config: Config) -> SampleLengths:
    """Draw a documented distribution with a fixed seed: log-normal within ``data.max_length``, of a given mean."""
    random = np.random.default_rng(0)
    kinds = _DISTRIBUTIONS[name]
    teacher = np.concatenate([_lengths(kind, config.data.max_length, random) for kind in kinds])
    counts = [kind.count for kind in kinds]
    reflection = np.repeat([kind.reflection for kind in kinds], counts)
    pairs = teacher * _FINAL_ANSWER
    rows = np.where(reflection, teacher * (_SHARES["t"] + _SHARES["c"]) + 2 * pairs, teacher * _ANSWER)
    shares = np.array([_student_share(config, (low + high) / 2) for low, high in PHASES])
    return SampleLengths(
        teacher=teacher,
        student=(shares[:, None] * teacher * reflection).astype(np.int64),
        rows=rows.astype(np.int64),
        reflection=reflection,
        repeat=np.repeat(np.array([kind.repeat for kind in kinds], np.float64), counts),
        source=f"assumed distribution {name!r}, {len(teacher):,} samples",
    )


def _lengths(kind: _Kind, longest: int, random: np.random.Generator) -> np.ndarray:
    """Draw int [count] within the limits, their mean that of ``kind`` as far as ``longest`` allows."""
    shape = np.exp(random.normal(0.0, kind.spread, kind.count))
    scale, lengths = kind.mean, shape
    for _ in range(8):
        lengths = np.clip(shape * scale, _SHORTEST, longest)
        scale *= kind.mean / float(lengths.mean())
    return lengths.astype(np.int64)


def _student_share(config: Config, rate: float) -> float:
    """Return the share of a reflection sample's tokens that the student sees."""
    strategy, final = config.mask.strategy, _SHARES["final"]
    match strategy:
        case "none":
            return 0.0  # the teacher's view serves both
        case "all":
            return final
        case "block":
            hidden = config.mask.order[: 1 + (rate >= PHASES[0][1]) + (rate >= PHASES[1][1])]
            return final + sum(_SHARES[block] for block in "tce" if block not in hidden)
        case "sequential_block" | "random_block" | "sequential_token" | "random_token":
            return final + (1 - rate) * sum(_SHARES[block] for block in "tce")
    assert_never(strategy)


def samples_of(store: TokenStore, config: Config) -> SampleLengths:
    """Measure a tokenised training set, its views made as a run makes them."""
    count = len(store)
    student, rows = np.zeros((len(PHASES), count), np.int64), np.zeros(count, np.int64)
    reflection = np.zeros(count, bool)
    for index in range(count):
        sample = store[index]
        reflection[index] = sample.kind != "generation"
        for phase, (low, high) in enumerate(PHASES):
            views = _views_at(sample, index, (low + high) / 2, config)
            student[phase, index], rows[index] = len(views.student_positions), views.logit_rows
            if not reflection[index]:
                break
    return SampleLengths(
        teacher=store.lengths.astype(np.int64),
        student=student,
        rows=rows,
        reflection=reflection,
        repeat=np.array([file.repeat for file in config.data.train])[store.file_index],
        source=f"{count:,} samples of data.train",
    )


# ---- samples of random tokens, to measure with ----

_ROUNDS = 3
"""Times that text, code and execution follow each other in a synthetic sample."""


def synthetic_samples(count: int, config: Config, vocab_size: int) -> list[TokenizedSample]:
    """Return ``count`` samples of random tokens, the same at every call.

    Their lengths are those of the distribution ``papers`` at even distances from the sorted list, so that a few samples
    stand for all.
    """
    batch = typical_batch(assumed_samples("papers", config), 0, count)
    random = np.random.default_rng(config.seed)
    return [
        _synthetic_sample(int(length), bool(reflection), random, vocab_size)
        for length, reflection in zip(batch.teacher, batch.reflection, strict=True)
    ]


def _synthetic_sample(length: int, reflection: bool, random: np.random.Generator, vocab_size: int) -> TokenizedSample:
    """Return a sample of ``length`` random tokens with the structure of a real one."""
    from reflectron.engine.data.tokenization import TokenizedSample

    input_ids = random.integers(0, vocab_size, length).astype(np.int32)
    supervised = np.zeros(length, bool)
    if not reflection:
        supervised[-round(_ANSWER * length) :] = True
        return TokenizedSample("generation", input_ids, supervised, np.empty((0, 3), np.int32), 0, -1)
    start = max(3, round(_SHARES["user"] * length))
    blocks = []
    position = start
    for _ in range(_ROUNDS):
        for kind, letter in enumerate("tce"):
            end = position + max(1, round(_SHARES[letter] * length / _ROUNDS))
            blocks.append((kind, position, end))
            supervised[position:end] = kind != 2
            position = end
    # <|assistant|> before the sequence, <|endofmessage|> behind it.
    supervised[start - 1] = supervised[position] = True
    final_start = length - 2 - max(1, round(_FINAL_ANSWER * length))
    assert position + 1 < final_start, "the shares leave room for the second user turn"
    supervised[final_start:] = True
    return TokenizedSample("reflection", input_ids, supervised, np.array(blocks, np.int32), position + 1, final_start)


def views_at(samples: Sequence[TokenizedSample], rate: float, config: Config) -> list[SampleViews]:
    """Return what teacher and student see of each sample at a mask rate."""
    return [_views_at(sample, index, rate, config) for index, sample in enumerate(samples)]


def _views_at(sample: TokenizedSample, index: int, rate: float, config: Config) -> SampleViews:
    from reflectron.engine.data.masking import visible_tokens
    from reflectron.engine.data.sampler import SampleRef, mask_draws
    from reflectron.engine.data.views import make_views

    draws = mask_draws(config.seed, SampleRef(0, index, 0))
    return make_views(sample, visible_tokens(sample, config.mask, rate, draws))


def instant_views(lengths: Sequence[int], vocab_size: int) -> list[SampleViews]:
    """Return instruction and reflection samples in turn, however short; a student sees its sample's second half."""
    from reflectron.engine.data.tokenization import TokenizedSample
    from reflectron.engine.data.views import make_views

    random, found = np.random.default_rng(0), []
    for index, length in enumerate(lengths):
        final, places = length - length // 6, np.arange(length)
        ids = random.integers(0, vocab_size, length, dtype=np.int32)
        none, supervised = np.empty((0, 3), np.int32), places >= length // 8
        if index % 2:
            sample = TokenizedSample("reflection", ids, supervised, none, final, final)
            found.append(make_views(sample, places >= length // 2))
        else:
            found.append(make_views(TokenizedSample("generation", ids, supervised, none, 0, -1), None))
    return found


# ---- steps ----


def over_phases(values: Sequence[float]) -> float:
    """Return the mean over a run's steps of a number that each phase has one of."""
    return sum(value * (high - low) for value, (low, high) in zip(values, PHASES, strict=True))


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """A typical step, packed as the engine packs it; means over microbatches."""

    microbatches: int
    """Count on one replica."""
    sequence_length: int
    pairs: float
    """Pairs of tokens that attend to each other in a microbatch."""
    segment_length: float
    """Tokens of the segment that the mean pair lies in."""
    rows: float
    """Loss rows of a microbatch."""
    tokens: int
    """Tokens of the global batch, without padding."""
    useful_flops: float
    """Operations of the global batch, without what is computed again."""


def pack_load(arch: Architecture, config: Config, batch: BatchLengths, replicas: int) -> StepLoad:
    """Pack ``batch`` into a step.

    Raises:
        ValueError: when a sample exceeds the budget of a microbatch.
    """
    # Padding of the vocabulary and recomputation would change the balance by little, and packs could not be shared.
    cost = training_cost(decoder_shape(arch, Config()), "none")
    budget, multiple = packing_sizes(config)
    plan = plan_packs(
        batch.teacher,
        batch.student,
        batch.rows,
        tokens_per_microbatch=budget,
        data_parallel_size=replicas,
        cost=cost,
        microbatch_multiple=microbatch_multiple(config.parallel),
        pad_to_multiple=multiple,
    )
    views = np.concatenate([batch.teacher, batch.student]).astype(np.float64)
    rows, microbatches = int(batch.rows.sum()), len(plan.microbatches[0])
    return StepLoad(
        microbatches=microbatches,
        sequence_length=plan.sequence_length,
        pairs=float((views * (views + 1) / 2).sum()) / (microbatches * replicas),
        segment_length=float((views**2).sum() / views.sum()),
        rows=rows / (microbatches * replicas),
        tokens=int(views.sum()),
        useful_flops=training_flops(cost, views, rows),
    )


def reference_flops(arch: Architecture, batch: BatchLengths) -> float:
    """Count the reference's operations: both views at full length, layers computed twice, logits of every token.

    Padding costs nothing here: the published batches hold one sample.
    """
    cost = forward_cost(decoder_shape(arch, Config()))
    views = np.concatenate([batch.teacher, batch.teacher[batch.reflection]]).astype(np.float64)
    layers = cost.per_token * views.sum() + cost.per_token_squared * (views**2).sum()
    return float(4 * layers + 3 * cost.per_row * views.sum())
