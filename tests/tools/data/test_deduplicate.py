"""Deduplication against a plain comparison of all pairs, and that every record ends up in one place."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflectron.tools import cli
from reflectron.tools.bench.data import write_corpus
from reflectron.tools.data.corpus import words
from reflectron.tools.data.deduplicate import Bands, band_keys, choose_bands, jaccard, shingle


def write_rows(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def deduplicate(data: Sequence[str], out: Path, *more: str) -> list[dict[str, Any]]:
    """Run the command; returns the groups."""
    assert cli.main(["data", "deduplicate", *data, "--out", str(out), *more]) == 0
    return read_rows(out / "groups.jsonl")


def shingle_set(text: str, n: int = 5) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))}


def variants(generator: random.Random, count: int) -> list[str]:
    """Texts of which many are others with some words replaced."""
    vocabulary = [f"w{i}" for i in range(500)]
    texts: list[str] = []
    for _ in range(count):
        drawn = generator.choices(vocabulary, k=generator.randint(3, 60))
        if texts and generator.random() < 0.6:
            drawn = generator.choice(texts).split()
            for _ in range(generator.randint(0, 3)):
                drawn[generator.randrange(len(drawn))] = generator.choice(vocabulary)
        texts.append(" ".join(drawn))
    return texts


def test_shingles_are_those_of_the_words() -> None:
    texts = ["a b c d e f g", "A, b!", "a b c d e f g a b c d e"]
    shingles, offsets = shingle([words(text) for text in texts], 5)
    sets = [shingles[offsets[i] : offsets[i + 1]] for i in range(3)]
    assert [len(found) for found in sets] == [3, 1, 7]
    assert [jaccard(sets[0], found) for found in sets] == [1.0, 0.0, 3 / 7]


def test_two_texts_share_a_minimum_as_often_as_their_jaccard_similarity() -> None:
    generator = np.random.default_rng(0)
    for shared in (20, 100, 180):
        union = generator.choice(1 << 32, size=200, replace=False).astype(np.uint32)
        left, right = np.sort(union[: 100 + shared // 2]), np.sort(union[100 - shared // 2 :])
        offsets = np.cumsum([0, len(left), len(right)])
        keys = band_keys(np.concatenate([left, right]), offsets, Bands(bands=2000, rows=1))
        # Three standard deviations of 2000 draws are at most 0.034.
        assert (keys[0] == keys[1]).mean() == pytest.approx(jaccard(left, right), abs=0.035)


def test_keys_do_not_depend_on_the_texts_beside() -> None:
    shingles, offsets = shingle([words(text) for text in variants(random.Random(0), 1500)], 5)
    assert offsets[-1] > 1 << 15
    keys = band_keys(shingles, offsets, Bands(3, 4))
    for i in (0, 777, 1499):
        alone = shingles[offsets[i] : offsets[i + 1]]
        assert (band_keys(alone, np.array([0, len(alone)]), Bands(3, 4)) == keys[i]).all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_bands_seldom_miss_a_pair_at_the_threshold(threshold: float) -> None:
    cut = choose_bands(threshold, 128)
    assert cut.bands * cut.rows <= 128
    assert 1 - (1 - (threshold + 0.05) ** cut.rows) ** cut.bands > 0.9


def test_against_all_pairs(tmp_path: Path) -> None:
    texts = variants(random.Random(0), 300)
    sets = list(map(shingle_set, texts))
    data = write_rows(tmp_path / "x.jsonl", [{"content": text} for text in texts])
    groups = deduplicate([data], tmp_path, "--threshold", "0.6")
    removed = {member["index"]: (group["kept"]["index"], member) for group in groups for member in group["duplicates"]}
    kept: list[int] = []
    near = missed = 0
    for index, text in enumerate(texts):
        shared = {other: len(sets[other] & sets[index]) for other in kept}
        likeness = {other: n / (len(sets[other]) + len(sets[index]) - n) for other, n in shared.items()}
        if index not in removed:
            missed += max(likeness.values(), default=0.0) >= 0.6
            kept.append(index)
            continue
        original, member = removed[index]
        near += member["kind"] == "near"
        assert member["jaccard"] == round(likeness[original], 4)
        assert member["kind"] == ("exact" if text == texts[original] else "near")
    assert near > 30
    assert missed <= 0.02 * near


def test_every_record_ends_up_kept_or_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(f"w{i}" for i in range(60))
    first = tmp_path / "first.jsonl"
    lines = [json.dumps({"content": text}) for text in (long, "Other words", long.replace(" ", " \n"))]
    first.write_text("\n".join([*lines, "{oops"]), encoding="utf-8")
    second = write_rows(
        tmp_path / "second.jsonl", [{"content": "other words"}, {"content": long.replace("w59", "end")}]
    )
    out = tmp_path / "out"
    groups = deduplicate([str(first), second], out)
    assert groups == [
        {
            "kept": {"file": str(first), "line": 1, "index": 0},
            "duplicates": [
                {"file": str(first), "line": 3, "index": 2, "kind": "exact", "jaccard": 1.0},
                {"file": second, "line": 2, "index": 1, "kind": "near", "jaccard": round(55 / 57, 4)},
            ],
        },
        {
            "kept": {"file": str(first), "line": 2, "index": 1},
            "duplicates": [{"file": second, "line": 1, "index": 0, "kind": "near", "jaccard": 1.0}],
        },
    ]
    assert (out / "kept" / "first.jsonl").read_text().splitlines() == lines[:2]
    assert (out / "removed" / "first.jsonl").read_text().splitlines() == [lines[2], "{oops"]
    assert (out / "kept" / "second.jsonl").read_bytes() == b""
    assert [(row["line"], row["reason"].split(":")[0]) for row in read_rows(out / "rejects.jsonl")] == [(4, "bad JSON")]
    assert "4 records, 2 kept, 1 exact and 0 near duplicates, 1 unreadable" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"kept", "removed", "groups.jsonl", "rejects.jsonl"}
    (exact,) = deduplicate([str(first), second], out, "--threshold", "1.1")
    assert [member["kind"] for member in exact["duplicates"]] == ["exact"]


def test_a_file_without_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "x.jsonl", [{"n": 1}])
    assert cli.main(["data", "deduplicate", data, "--out", str(tmp_path / "out")]) == 2
    assert "no record with a text, expected at least one" in capsys.readouterr().err


@pytest.mark.slow
def test_planted_duplicates_are_found_by_any_number_of_workers(tmp_path: Path) -> None:
    planted = write_corpus(tmp_path, 6000)
    data = str(tmp_path / "documents.jsonl")
    groups = [deduplicate([data], tmp_path / w, "--workers", w) for w in ("1", "3")]
    assert groups[0] == groups[1]
    kinds = [member["kind"] for group in groups[0] for member in group["duplicates"]]
    # A task that two documents hold makes one more exact duplicate.
    assert planted.exact <= kinds.count("exact") <= planted.exact + planted.contaminated
    assert kinds.count("near") >= 0.98 * planted.near
    assert (tmp_path / "1/kept/documents.jsonl").read_bytes() == (tmp_path / "3/kept/documents.jsonl").read_bytes()


@pytest.mark.slow
def test_bench_rows_can_be_read_alone(tmp_path: Path) -> None:
    words = ["--documents", "2000", "--peer-documents", "0", "--workers", "1", "--out", str(tmp_path)]
    assert cli.main(["bench", "corpus", *words]) == 0
    cleaning, comparing = read_rows(tmp_path / "rows.jsonl")
    assert (cleaning["command"], cleaning["found"]) == ("decontaminate", {"contaminated": 2})
    assert (comparing["command"], comparing["found"]["exact"]) == ("deduplicate", 100)
    for row in (cleaning, comparing):
        assert row["documents"] == row["planted"]["documents"] == 2000
        assert (row["metric"], row["unit"]) == ("time", "s")
        assert row["p50"] > 0
        assert row["processor_seconds"] > 0
        assert 0.01 < row["peak_memory_gib"] < 4
        assert row["versions"]["numpy"] == np.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
