"""Exclude exact and near duplicates of records, and list their groups.

A record is kept unless its texts equal those of an earlier record but for whitespace, or its word shingles have at
least the threshold's Jaccard similarity with those of an earlier record that is kept. The similarity is exact: MinHash
with locality-sensitive hashing only proposes pairs. Broder 1997: two sets agree in one minimum of a random permutation
with the probability of their Jaccard similarity J. A key is made of the minima of a band of ``rows`` permutations, so
texts share one of ``bands`` keys with probability 1 - (1 - J**rows)**bands (Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, section 3.4). Memory is less than a kilobyte a record; the shingles lie in a temporary file.

D readable records of all files, in their order; S shingles of all their texts one after another; P = bands * rows
permutations.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import RecordChunk, read_chunks, read_records
from reflectron.engine.data.workers import map_chunks
from reflectron.tools.data.corpus import as_line, new_file, texts, word_hash, words, write_row

_RECORDS_PER_CHUNK = 1024
_NO_SHINGLES = np.empty(0, dtype=np.uint32)
# Multiplication by it spreads a 64-bit number (Knuth); odd, so that it loses nothing modulo 2**64.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
# Shingles whose permutations are held at a time: they stay in the processor's cache.
_BLOCK = 1 << 14
# Weight of a missed pair against one proposed in vain.
_MISSED = 10.0


@dataclass(frozen=True)
class Similarity:
    """Defines what counts as a near duplicate."""

    threshold: float = 0.7
    """Least Jaccard similarity, above 0; above 1 only exact duplicates are looked for."""
    words_per_shingle: int = 5
    """Words of a shingle."""
    permutations: int = 128
    """Permutations of MinHash; more of them miss less and take longer."""

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"--threshold is {self.threshold}, expected above 0 (above 1: exact duplicates only)")
        for name, value in (("words", self.words_per_shingle), ("permutations", self.permutations)):
            if value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")

    @property
    def exact_only(self) -> bool:
        """Whether near duplicates are kept."""
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
        """Return which records are kept, bool [D]."""
        return self.kept == np.arange(len(self.kept))

    def groups(self) -> Iterator[tuple[int, list[int]]]:
        """Yield every kept record that has duplicates, with them, in order."""
        repeated = np.flatnonzero(~self.is_kept())
        members: dict[int, list[int]] = defaultdict(list)
        for record in repeated.tolist():
            members[int(self.kept[record])].append(record)
        yield from sorted(members.items())


def deduplicate_files(
    files: Mapping[str, DataFile], columns: Sequence[str], similarity: Similarity, out: Path, workers: int
) -> None:
    """Write every record to ``kept/`` or ``removed/``, as it was read, and the groups to ``groups.jsonl``.

    Of a group the first record is kept, in the order of the files.

    Args:
        files: by the name under which their records are written.
        columns: compare these only; all when empty.
        workers: processes; 0 means one per core.

    Raises:
        ValueError: when a file cannot be read, or has no readable record.
    """
    found = find_duplicates(list(files.values()), columns, similarity, out, workers)
    _write_groups(found, list(files.values()), out)
    _split_files(found, files, out)
    groups = sum(1 for _ in found.groups())
    print(f"{groups} groups of duplicates; kept/, removed/, groups.jsonl and rejects.jsonl are in {out}")


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


def _sign(
    files: Sequence[DataFile], signer: _Signer, workers: int, stream: IO[bytes]
) -> tuple[_Signed, np.ndarray, list[tuple[int, int, int, str]]]:
    """Sign all files' records; their shingles go to ``stream``, and the place of each is returned as int64 [D, 3]."""
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
    """Return the first record with the same digest, int64 [D]."""
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
    """Return the kept record for each record, int64 [D], and their similarity, float64 [D].

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
    """Number the keys that several records share in a band: int64, shaped as ``keys``, -1 for the others."""
    buckets = np.full(keys.shape, -1, dtype=np.int64)
    count = 0
    for band in range(keys.shape[1]):
        _, bucket, members = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        shared = members[bucket] > 1
        buckets[shared, band] = count + bucket[shared]
        count += len(members)
    return buckets


@dataclass(frozen=True)
class Bands:
    """Tells how the permutations are cut into keys."""

    bands: int
    rows: int


def choose_bands(threshold: float, permutations: int) -> Bands:
    """Return the cut whose chance of proposing a pair is nearest to a step at ``threshold``.

    What counts is the area between the step and the curve, and that above the threshold ten times: a missed pair stays
    missed, one that is proposed in vain costs a comparison.
    """
    similarity = (np.arange(1000) + 0.5) / 1000
    wanted = similarity >= threshold
    weight = np.where(wanted, _MISSED, 1.0)
    cuts = [Bands(permutations // rows, rows) for rows in range(1, permutations + 1)]

    def error(cut: Bands) -> float:
        return float((weight * np.abs(wanted - (1 - (1 - similarity**cut.rows) ** cut.bands))).sum())

    return min(cuts, key=error)


def shingle(split: Sequence[list[str]], words_per_shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the word n-grams of texts, as 32-bit hashes; a text of less than n words is one shingle.

    Args:
        split: the words of each text.

    Returns:
        uint32 [S], sorted and distinct within each text, and int64 [D + 1], where each text's begin and end.
    """
    hash_of = {word: word_hash(word) for word in {word for found in split for word in found}}
    parts = []
    for found in split:
        hashes = np.array([hash_of[word] for word in found], dtype=np.uint64)
        windows = max(len(hashes) - words_per_shingle + 1, 1)
        total = np.zeros(windows, dtype=np.uint64)
        for i in range(min(words_per_shingle, len(hashes))):
            total = total * _SPREAD + hashes[i : i + windows]
        parts.append(np.unique((total * _SPREAD >> np.uint64(32)).astype(np.uint32)))
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    return np.concatenate([np.empty(0, np.uint32), *parts]), offsets


def band_keys(shingles: np.ndarray, offsets: np.ndarray, cut: Bands) -> np.ndarray:
    """Return keys of texts, uint64 [D, bands]: equal in a band when all minima of its permutations are.

    A permutation is x -> (a x + b) mod 2**32 with an odd a, the same for every call.

    Args:
        shingles: uint32 [S].
        offsets: int64 [D + 1]; no text may be empty.
    """
    generator = np.random.PCG64(0)
    a, b = generator.random_raw(2 * cut.bands * cut.rows).astype(np.uint32).reshape(2, cut.bands, cut.rows, 1)
    keys = np.zeros((len(offsets) - 1, cut.bands), dtype=np.uint64)
    first = 0
    while first < len(keys):
        # As many texts as fit, at least one.
        last = max(int(np.searchsorted(offsets, offsets[first] + _BLOCK, side="right")) - 1, first + 1)
        block, starts = shingles[offsets[first] : offsets[last]], offsets[first:last] - offsets[first]
        for band in range(cut.bands):
            key = np.zeros(last - first, dtype=np.uint64)
            for row in range(cut.rows):
                minima = np.minimum.reduceat((a[band, row] | np.uint32(1)) * block + b[band, row], starts)
                key = (key ^ minima) * _SPREAD
            keys[first:last, band] = key
        first = last
    return keys


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Return shared shingles / all shingles of two texts, each sorted and distinct."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _split_files(found: Duplicates, files: Mapping[str, DataFile], out: Path) -> None:
    """Read every file again and put its records where they belong, and print the counts."""
    is_kept = found.is_kept()
    for number, (name, file) in enumerate(files.items()):
        own = found.file == number
        keep = set(found.index[own & is_kept].tolist())
        with new_file(out / "kept" / f"{name}.jsonl") as kept, new_file(out / "removed" / f"{name}.jsonl") as removed:
            for record in read_records(file):
                (kept if record.index in keep else removed).write(as_line(record))
        exact = int((own & ~is_kept & found.exact).sum())
        near = int((own & ~is_kept & ~found.exact).sum())
        unreadable = sum(place[0] == number for place in found.unreadable)
        print(
            f"{file.path}: {len(keep) + exact + near + unreadable} records, {len(keep)} kept, {exact} exact and {near} "
            "near duplicates" + (f", {unreadable} unreadable" if unreadable else "")
        )


def _write_groups(found: Duplicates, files: Sequence[DataFile], out: Path) -> None:
    def place(record: int) -> dict[str, Any]:
        index, line = int(found.index[record]), int(found.line[record])
        return {"file": files[found.file[record]].path, "line": line, "index": index}

    with new_file(out / "groups.jsonl") as stream:
        for kept, duplicates in found.groups():
            members = [
                {
                    **place(record),
                    "kind": "exact" if found.exact[record] else "near",
                    "jaccard": round(float(found.similarity[record]), 4),
                }
                for record in duplicates
            ]
            write_row(stream, {"kept": place(kept), "duplicates": members})
    with new_file(out / "rejects.jsonl") as stream:
        for number, index, line, reason in found.unreadable:
            write_row(stream, {"file": files[number].path, "line": line, "index": index, "reason": reason})
