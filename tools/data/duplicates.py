"""Files of records come in; which record repeats which earlier one goes out.

A record is kept unless its texts equal those of an earlier record but for whitespace, or its word shingles have at
least the threshold's Jaccard similarity with those of an earlier record that is kept. The similarity is exact: MinHash
only proposes pairs. Memory is less than a kilobyte a record; the shingles lie in a temporary file.

D readable records of all files, in their order.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import RecordChunk, map_chunks, read_chunks
from reflectron.tools.data.corpus import texts, words
from reflectron.tools.data.minhash import Bands, band_keys, choose_bands, jaccard, shingle

_RECORDS_PER_CHUNK = 1024
_NO_SHINGLES = np.empty(0, dtype=np.uint32)


@dataclass(frozen=True)
class Similarity:
    """What counts as a near duplicate."""

    threshold: float = 0.7
    """Least Jaccard similarity, above 0; above 1 only exact duplicates are looked for."""
    words_per_shingle: int = 5
    """Words of a shingle."""
    permutations: int = 128
    """Of MinHash; more of them miss less and take longer."""

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"--threshold is {self.threshold}, expected above 0 (above 1: exact duplicates only)")
        for name, value in (("words", self.words_per_shingle), ("permutations", self.permutations)):
            if value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")

    @property
    def exact_only(self) -> bool:
        """Whether near duplicates are left alone."""
        return self.threshold > 1


@dataclass(frozen=True, eq=False)
class Duplicates:
    """The verdict on D records."""

    file: np.ndarray
    """int64 [D]: number of the record's file."""
    index: np.ndarray
    """int64 [D]: its 0-based number in that file."""
    line: np.ndarray
    """int64 [D]: its 1-based line or row."""
    kept: np.ndarray
    """int64 [D]: the kept record that stands for it; itself where it is kept."""
    similarity: np.ndarray
    """float64 [D]: exact Jaccard similarity with that record; 1 for itself and for exact duplicates of it."""
    exact: np.ndarray
    """bool [D]: equal to the kept record but for whitespace."""
    unreadable: tuple[tuple[int, int, int, str], ...]
    """File, index, line and reason of every record that is none of the D."""

    def is_kept(self) -> np.ndarray:
        """bool [D]."""
        return self.kept == np.arange(len(self.kept))

    def groups(self) -> Iterator[tuple[int, list[int]]]:
        """Every kept record that has duplicates, with them, in order."""
        repeated = np.flatnonzero(~self.is_kept())
        members: dict[int, list[int]] = defaultdict(list)
        for record in repeated.tolist():
            members[int(self.kept[record])].append(record)
        yield from sorted(members.items())


@dataclass(frozen=True, eq=False)
class _Signed:
    """The readable records of a chunk, and the reasons of the others by their offset."""

    digests: np.ndarray
    keys: np.ndarray
    shingles: np.ndarray
    lengths: np.ndarray
    unreadable: dict[int, str]


@dataclass(frozen=True)
class _Signer:
    """Reads a chunk's texts; the same in this process and in a worker."""

    columns: tuple[str, ...]
    similarity: Similarity
    cut: Bands

    def __call__(self, chunk: RecordChunk) -> _Signed:
        digests: list[bytes] = []
        split: list[list[str]] = []
        unreadable: dict[int, str] = {}
        for offset, record in enumerate(chunk.records()):
            try:
                found = texts(record, self.columns)
            except BadRecord as error:
                unreadable[offset] = str(error)
                continue
            squeezed = "\n".join(" ".join(text.value.split()) for text in found)
            digests.append(hashlib.blake2b(squeezed.encode(), digest_size=16).digest())
            if not self.similarity.exact_only:
                split.append(words(squeezed))
        shingles, offsets = shingle(split, self.similarity.words_per_shingle)
        return _Signed(
            digests=np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2),
            keys=band_keys(shingles, offsets, self.cut),
            shingles=shingles,
            lengths=np.diff(offsets),
            unreadable=unreadable,
        )


def find_duplicates(
    files: Sequence[DataFile], columns: Sequence[str], similarity: Similarity, scratch: Path, workers: int
) -> Duplicates:
    """Read all files once and decide on every record.

    Args:
        columns: compare these only; all when empty.
        scratch: folder of the temporary file.
        workers: processes; 0 means one per core. The result does not depend on it.

    Raises:
        ValueError: when a file cannot be read, or has no readable record.
    """
    cut = choose_bands(min(similarity.threshold, 1.0), similarity.permutations)
    signer = _Signer(tuple(columns), similarity, cut)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as stream:
        signed, places, unreadable = _sign(files, signer, workers, stream)
        kept = first = _first_equal(signed.digests)
        jaccards = np.ones(len(first))
        if not similarity.exact_only:
            offsets = np.concatenate([[0], np.cumsum(signed.lengths)])
            shingles = np.memmap(stream, dtype=np.uint32, mode="r")

            def compare(left: int, right: int) -> float:
                return jaccard(*(shingles[offsets[i] : offsets[i + 1]] for i in (left, right)))

            kept, jaccards = _first_similar(first, signed.keys, similarity.threshold, compare)
    file, index, line = places.T
    return Duplicates(file, index, line, kept, jaccards, first == kept, tuple(unreadable))


def _sign(
    files: Sequence[DataFile], signer: _Signer, workers: int, stream: IO[bytes]
) -> tuple[_Signed, np.ndarray, list[tuple[int, int, int, str]]]:
    """All files' records as one ``_Signed``, whose shingles go to ``stream``, with the place of each: int64 [D, 3]."""
    parts: list[_Signed] = []
    places: list[tuple[int, int, int]] = []
    unreadable: list[tuple[int, int, int, str]] = []
    for number, file in enumerate(files):
        for chunk, signed in map_chunks(signer, read_chunks(file, _RECORDS_PER_CHUNK), workers):
            stream.write(signed.shingles.tobytes())
            parts.append(replace(signed, shingles=_NO_SHINGLES))
            for offset, line in enumerate(chunk.lines):
                place = (number, chunk.first_index + offset, line)
                if offset in signed.unreadable:
                    unreadable.append((*place, signed.unreadable[offset]))
                else:
                    places.append(place)
        if not places or places[-1][0] != number:
            reason = unreadable[-1][-1]
            raise ValueError(f"{file.path}: no record with a text, expected at least one; the last says {reason!r}")
    stream.flush()
    together = _Signed(
        digests=np.concatenate([part.digests for part in parts]),
        keys=np.concatenate([part.keys for part in parts]),
        shingles=_NO_SHINGLES,
        lengths=np.concatenate([part.lengths for part in parts]),
        unreadable={},
    )
    return together, np.array(places, dtype=np.int64), unreadable


def _first_equal(digests: np.ndarray) -> np.ndarray:
    """int64 [D]: the first record with the same digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    in_order = digests[order]
    starts = np.flatnonzero(np.r_[True, (in_order[1:] != in_order[:-1]).any(axis=1)])
    first = np.empty(len(order), dtype=np.int64)
    # The sort is stable, so the first of a run is the earliest record.
    first[order] = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    return first


def _first_similar(
    first: np.ndarray, keys: np.ndarray, threshold: float, compare: Callable[[int, int], float]
) -> tuple[np.ndarray, np.ndarray]:
    """The kept record for each record, int64 [D], and their similarity, float64 [D].

    Records are taken in order, and compared with the kept ones that share a key: with the most similar, where several
    are similar enough, and with the earliest of these.
    """
    distinct = np.flatnonzero(first == np.arange(len(first)))
    buckets = _buckets(keys[distinct])
    kept, similarity = np.arange(len(first)), np.ones(len(first))
    kept_in: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero((buckets >= 0).any(axis=1)).tolist():
        record = int(distinct[row])
        own = [bucket for bucket in buckets[row].tolist() if bucket >= 0]
        proposed = sorted({other for bucket in own for other in kept_in[bucket]})
        best, most = max(((other, compare(other, record)) for other in proposed), key=lambda x: x[1], default=(-1, 0.0))
        if most >= threshold:
            kept[record], similarity[record] = best, most
        else:
            for bucket in own:
                kept_in[bucket].append(record)
    return kept[first], similarity[first]


def _buckets(keys: np.ndarray) -> np.ndarray:
    """int64, shaped as ``keys``: a number for each key that several records share in a band, -1 for the others."""
    buckets = np.full(keys.shape, -1, dtype=np.int64)
    count = 0
    for band in range(keys.shape[1]):
        _, bucket, members = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared = members[bucket] > 1
        buckets[shared, band] = count + bucket[shared]
        count += len(members)
    return buckets
