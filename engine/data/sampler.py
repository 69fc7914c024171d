"""Which samples each step of a run trains on, and the random numbers that decide it.

Random numbers are a function of a seed and a key alone, on every machine and with every library: SplitMix64 (Steele,
Lea, Flood: Fast splittable pseudorandom number generators, 2014) on 64-bit integers, where number i of a stream is a
hash of its key and i. Epochs follow each other in one endless stream of samples, and a global batch is the next piece
of it. The stream depends on the seed and the repeats only: not on batch size, data-parallel size, workers or budget,
nor on where a run was resumed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# To be raised when the same seed draws other numbers: a run in progress is then refused rather than changed.
DRAWS_VERSION = 2

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(number: int) -> int:
    number = ((number ^ (number >> 30)) * _FIRST) & _MASK64
    number = ((number ^ (number >> 27)) * _SECOND) & _MASK64
    return number ^ (number >> 31)


class Draws:
    """The numbers of one key.

    Args:
        seed: of the run, 0 or more.
        key: what is drawn, numbers of 0 or more; streams of different keys, or of keys of different lengths, have
            nothing in common.
    """

    def __init__(self, seed: int, *key: int) -> None:
        state = _mix(len(key) + 1)
        for word in (seed, *key):
            # Words beyond 64 bits are taken in pieces.
            while True:
                state = _mix((state + _GOLDEN + (word & _MASK64)) & _MASK64)
                word >>= 64
                if not word:
                    break
            state = _mix(state ^ _GOLDEN)
        self._state = state

    def bits(self, count: int) -> np.ndarray:
        """Return the first ``count`` numbers: uint64, uniform."""
        # Products and sums of arrays wrap around silently, as they shall.
        number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._state)
        number = (number ^ (number >> np.uint64(30))) * np.uint64(_FIRST)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(_SECOND)
        return number ^ (number >> np.uint64(31))

    def order(self, count: int) -> np.ndarray:
        """Return the numbers 0 to ``count - 1`` in random order, int64: sorted by 64 random bits each."""
        return np.argsort(self.bits(count), kind="stable")


# What is drawn. Streams of one seed differ by their keys, (purpose, ...).
_SHUFFLE, _SHARE, _MASK = 0, 1, 2


@dataclass(frozen=True)
class SampleRef:
    """One listing of a sample."""

    epoch: int
    """0-based pass over the data."""
    sample: int
    """Index in the (concatenated) token store."""
    occurrence: int
    """Which listing of this sample in the epoch, 0-based."""


class SampleOrder:
    """The endless stream of samples, with access to any step of it.

    An epoch lists each sample of a file ``floor(repeat)`` times; with a fraction f left, a share f of the file's
    samples is listed once more, drawn anew each epoch from this file alone, whatever other files there are. Where f
    times their number is not whole, epochs differ by one sample so that after every epoch the file's total is right to
    half a sample. All listings of an epoch are shuffled together.

    Args:
        repeat: float [files], listings of each sample of a file per epoch.
        file_index: int [samples], the file of each sample.
        seed: 0 or more.
    """

    def __init__(self, repeat: Sequence[float], file_index: np.ndarray, seed: int) -> None:
        self._seed = seed
        whole = [math.floor(times) for times in repeat]
        self._whole = np.array(whole, np.int64)[file_index]
        # (file, fraction, its samples)
        self._shares = [
            (file, times - whole[file], np.flatnonzero(file_index == file))
            for file, times in enumerate(repeat)
            if times > whole[file]
        ]
        self._mean_epoch_length = float(np.sum(np.array(repeat)[file_index]))
        # A batch may reach over the end of an epoch, so two are in use at a time.
        self._epoch = functools.lru_cache(maxsize=2)(self._list_epoch)

    def epoch_length(self, epoch: int) -> int:
        """Return the samples that ``epoch`` lists."""
        return self._epoch_start(epoch + 1) - self._epoch_start(epoch)

    def total_samples(self, epochs: float) -> int:
        """Return the samples of a run of ``epochs`` passes; of a last, partial one the share is rounded, and is at
        least one."""
        whole = math.floor(epochs)
        part = epochs - whole
        rest = max(1, _round_half_up(part * self.epoch_length(whole))) if part else 0
        return self._epoch_start(whole) + rest

    def total_steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the steps of a run of ``epochs`` passes; the last global batch may be smaller."""
        return math.ceil(self.total_samples(epochs) / global_batch_size)

    def global_batch(self, step: int, global_batch_size: int, epochs: float | None = None) -> list[SampleRef]:
        """Return the samples of 0-based ``step``, in stream order; none after the end of the run.

        Args:
            step: updates before this one.
            global_batch_size: samples of a step.
            epochs: end of the run, at which its last batch stops short; None if a number of steps ends the run.
        """
        start = step * global_batch_size
        stop = start + global_batch_size
        if epochs is not None:
            stop = min(stop, self.total_samples(epochs))
        epoch = self._epoch_at(start)
        refs: list[SampleRef] = []
        while start + len(refs) < stop:
            sample, occurrence = self._epoch(epoch)
            skip = start + len(refs) - self._epoch_start(epoch)
            take = slice(skip, skip + stop - start - len(refs))
            pairs = zip(sample[take].tolist(), occurrence[take].tolist(), strict=True)
            refs += [SampleRef(epoch, s, o) for s, o in pairs]
            epoch += 1
        return refs

    def _epoch_start(self, epoch: int) -> int:
        """Return the samples in all epochs before ``epoch``."""
        shares = sum(_round_half_up(fraction * len(samples) * epoch) for _, fraction, samples in self._shares)
        return int(self._whole.sum()) * epoch + shares

    def _epoch_at(self, index: int) -> int:
        """Return the epoch that holds sample ``index`` of the stream."""
        epoch = int(index / self._mean_epoch_length)
        while self._epoch_start(epoch) > index:
            epoch -= 1
        while self._epoch_start(epoch + 1) <= index:
            epoch += 1
        return epoch

    def _list_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample and occurrence of each listing of ``epoch``, in order: int [epoch_length], twice."""
        times = self._whole.copy()
        for file, fraction, samples in self._shares:
            per_epoch = fraction * len(samples)
            count = _round_half_up(per_epoch * (epoch + 1)) - _round_half_up(per_epoch * epoch)
            times[samples[Draws(self._seed, _SHARE, epoch, file).order(len(samples))[:count]]] += 1
        sample = np.repeat(np.arange(len(times)), times)
        occurrence = np.arange(len(sample)) - np.repeat(np.cumsum(times) - times, times)
        order = Draws(self._seed, _SHUFFLE, epoch).order(len(sample))
        return sample[order], occurrence[order]


def mask_draws(seed: int, ref: SampleRef) -> Draws:
    """Return what the random mask strategies draw for one listing of a sample.

    Keyed by (seed, epoch, sample, occurrence), so that a resumed or re-partitioned run draws the same.
    """
    return Draws(seed, _MASK, ref.epoch, ref.sample, ref.occurrence)


def _round_half_up(number: float) -> int:
    return math.floor(number + 0.5)
