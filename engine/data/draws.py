"""Random numbers that are a function of a seed and a key alone, on every machine and with every library.

SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) on integers of 64 bits: number i
of a stream is a hash of its key and i, so that nothing is drawn in order and no library's generator is involved.
"""

from __future__ import annotations

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
        """The first ``count`` numbers: uint64, uniform."""
        # Products and sums of arrays wrap around silently, as they shall.
        number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._state)
        number = (number ^ (number >> np.uint64(30))) * np.uint64(_FIRST)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(_SECOND)
        return number ^ (number >> np.uint64(31))

    def order(self, count: int) -> np.ndarray:
        """The numbers 0 to ``count - 1`` in random order, int64: sorted by 64 random bits each."""
        return np.argsort(self.bits(count), kind="stable")
