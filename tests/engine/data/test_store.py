"""A store holds exactly what tokenising gives, is reused, survives kills, damage and full disks, and counts rejects."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reflectron.engine.config import DataConfig, DataFile
from reflectron.engine.data import sources, store
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.store import TokenStore, build_store, open_store
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.tokenizer import Tokenizer, load_tokenizer
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
LINES = (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines()
GOOD = LINES[:24]
DATA = DataConfig(max_length=448, workers=1)
PRELUDE = f"""
import os, resource, signal
from dataclasses import replace
from pathlib import Path
from reflectron.engine.config import DataConfig, DataFile
from reflectron.engine.data import store
from reflectron.engine.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer({str(GOLDEN / "tokenizer_before")!r}, "reflection")
def build(source, folder, workers):
    store.build_store(DataConfig(max_length=448, workers=workers), [DataFile(path=source)], tokenizer, Path(folder))
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(GOLDEN / "tokenizer_before"), "reflection")


def write_lines(path: Path, lines: list[str]) -> DataFile:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataFile(path=str(path))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process; returns when it and all that it started are gone (they hold its output open)."""
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=60)


def assert_holds(built: TokenStore, files: list[DataFile], tokenizer: Tokenizer) -> None:
    """Compare every sample with what tokenising its record gives."""
    index = 0
    for number, file in enumerate(files):
        for record in read_records(file):
            try:
                expected = tokenize(record.conversation(), tokenizer, "reflection", DATA.max_length)
            except BadRecord:
                continue
            sample = built[index]
            assert (built.file_index[index], built.record_index[index]) == (number, record.index)
            assert built.lengths[index] == len(expected.input_ids)
            for name in ("kind", "prefix_end", "final_start"):
                assert getattr(sample, name) == getattr(expected, name)
            for name in ("input_ids", "supervised", "blocks"):
                found, wanted = getattr(sample, name), getattr(expected, name)
                assert found.dtype == wanted.dtype
                np.testing.assert_array_equal(found, wanted)
            index += 1
    assert len(built) == index


def test_store_holds_what_tokenising_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    golden = DataFile(path=str(GOLDEN / "samples.jsonl"))
    other = write_lines(tmp_path / "other.jsonl", [json.dumps({"instruction": "a", "output": "b"})])
    files = [golden, other, golden]
    built = build_store(DATA, files, tokenizer, tmp_path / "store")
    assert_holds(built, files, tokenizer)
    assert len(built) == 24 + 1 + 24
    opened = open_store(DATA, files, tokenizer, tmp_path / "store")
    assert_holds(opened, files, tokenizer)
    assert opened.fingerprint == built.fingerprint
    assert [str(summary) for summary in built.summaries] == [
        f"{golden.path}: 24 samples, 1 too long (4.0%)",
        f"{other.path}: 1 samples",
        f"{golden.path}: 24 samples, 1 too long (4.0%)",
    ]
    assert [row["index"] for row in rejects(tmp_path / "store")] == [24]


def test_samples_are_views_of_the_memory_map(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built = build_store(DATA, [write_lines(tmp_path / "a.jsonl", GOOD)], tokenizer, tmp_path / "store")
    before = pa.total_allocated_bytes()
    for index in range(len(built)):
        sample = built[index]
        for array in (sample.input_ids, sample.supervised, sample.blocks):
            assert not array.flags.owndata
            assert not array.flags.writeable
    assert pa.total_allocated_bytes() == before


def test_second_run_reuses_the_store(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = write_lines(tmp_path / "a.jsonl", [*GOOD, "{"]), tmp_path / "store"
    first = build_store(DATA, [file], tokenizer, folder)
    content = contents(folder)
    (folder / "rejects.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(store, "tokenize", None)
        again = build_store(DATA, [file], tokenizer, folder)
        os.utime(file.path, ns=(1, 1))
        build_store(DATA, [file], tokenizer, folder)
    assert again.fingerprint == first.fingerprint
    assert contents(folder) == content


def test_anything_that_changes_the_ids_changes_the_fingerprint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file, folder = write_lines(tmp_path / "a.jsonl", GOOD), tmp_path / "store"
    prints = [build_store(DATA, [file], tokenizer, folder).fingerprint]
    wider = DataConfig(max_length=449, workers=1)
    prints.append(build_store(wider, [file], tokenizer, folder).fingerprint)
    other = load_tokenizer(str(GOLDEN / "tokenizer_before"), "magicoder")
    magicoder = DataConfig(max_length=448, workers=1, template="magicoder", max_reject_share=1.0)
    prints.append(build_store(magicoder, [file], other, folder).fingerprint)
    assert len(open_store(DATA, [file], tokenizer, folder)) == 24
    write_lines(Path(file.path), GOOD[:12])
    changed = build_store(DATA, [file], tokenizer, folder)
    assert len(changed) == 12
    assert len({*prints, changed.fingerprint}) == 4


def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*GOOD, "", "{}"] * 30)
    for workers in (1, 2):
        data = DataConfig(max_length=448, workers=workers)
        assert len(build_store(data, [file], tokenizer, tmp_path / str(workers))) == 720
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_rejects_are_named_by_file_line_and_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, folder = tmp_path / "a.jsonl", tmp_path / "store"
    bad = [b"{", b"[1]", b'{"x": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", LINES[24].encode()]
    good = [line.encode() for line in GOOD[:2]]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good[0], b"", *bad[:3], b"  ", good[1], *bad[3:]]))
    file, data = DataFile(path=str(path)), DataConfig(max_length=448, max_reject_share=0.75)
    built = build_store(data, [file], tokenizer, folder)
    assert built.record_index.tolist() == [0, 4]
    found = rejects(folder)
    assert [(row["file"], row["line"], row["index"]) for row in found] == [
        (str(path), line, index) for line, index in [(3, 1), (4, 2), (5, 3), (8, 5), (9, 6), (10, 7)]
    ]
    starts = ["bad JSON: Expecting property name", "not an object: found list", "not UTF-8: byte 7 of the line is 0xff"]
    starts += ["bad JSON: ", "bad JSON: Exceeds the limit", "too long: 1910 tokens"]
    assert all(row["reason"].startswith(start) for row, start in zip(found, starts, strict=True))
    assert built.summaries[0].rejected == {"bad JSON": 3, "not an object": 1, "not UTF-8": 1}
    assert (built.summaries[0].too_long, built.summaries[0].samples) == (1, 2)
    with pytest.raises(ValueError, match=r"data\.max_reject_share") as caught:
        build_store(DATA, [file], tokenizer, folder)
    assert str(caught.value) == (
        f"data file {path}: 5 of 8 records are rejected, most for 'bad JSON' (3); all reasons are in "
        f"{folder / 'rejects.jsonl'}; repair the file or raise data.max_reject_share (0.05)"
    )
    assert rejects(folder) == found


def test_samples_that_are_too_long_are_counted_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The papers' data have them: they are no rejects, but a run without any other sample is none."""
    file = write_lines(tmp_path / "a.jsonl", [GOOD[0], *[LINES[24]] * 9])
    data = DataConfig(max_length=448, workers=1, max_reject_share=0.0)
    built = build_store(data, [file], tokenizer, tmp_path / "store")
    assert str(built.summaries[0]) == f"{file.path}: 1 samples, 9 too long (90.0%)"
    assert len(rejects(tmp_path / "store")) == 9
    alone = write_lines(tmp_path / "b.jsonl", [LINES[24]] * 3)
    with pytest.raises(
        ValueError, match=r"data\.max_length is 448, expected more: no sample is left of .*, 3 are longer"
    ):
        build_store(data, [alone], tokenizer, tmp_path / "store")
    assert len(build_store(data, [alone, file], tokenizer, tmp_path / "store")) == 1


def test_special_tokens_in_contents_are_counted_and_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"instruction": "x", "output": text} for text in ("<s>a</s>", "b", "c </s> </s>")]
    file, folder = write_lines(tmp_path / "a.jsonl", [json.dumps(row) for row in rows]), tmp_path / "store"
    eos = {}
    for choice in ("spell_out", "keep"):
        data = DataConfig(max_length=448, workers=1, special_tokens_in_content=choice)
        built = build_store(data, [file], tokenizer, folder)
        (summary,) = built.summaries
        assert str(summary).endswith("3 samples, 2 with special tokens in their contents (</s> 2, <s> 1)")
        named = [json.loads(line) for line in (folder / "special_tokens.jsonl").read_text().splitlines()]
        assert [(row["line"], row["index"]) for row in named] == [(1, 0), (3, 2)]
        assert [row["special_tokens"] for row in named] == [["<s>", "</s>"], ["</s>"]]
        eos[choice] = [int((built[i].input_ids == tokenizer.eos_id).sum()) for i in range(3)]
        assert built[0].special_tokens == ("<s>", "</s>")
    assert eos == {"spell_out": [1, 1, 1], "keep": [2, 1, 3]}


def test_parquet_gives_the_same_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [json.loads(line) for line in LINES]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    file = DataFile(path=str(tmp_path / "a.parquet"))
    built = build_store(DATA, [file], tokenizer, tmp_path / "store")
    golden = DataFile(path=str(GOLDEN / "samples.jsonl"))
    assert_holds(built, [golden], tokenizer)
    (reject,) = rejects(tmp_path / "store")
    assert (reject["line"], reject["index"]) == (25, 24)


def test_hub_dataset_gives_the_same_samples(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = GOLDEN / "samples.jsonl"
    local = datasets.load_dataset("json", data_files=str(golden), split="train", cache_dir=str(tmp_path / "cache"))
    asked = []

    def load_dataset(name: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, split, revision))
        # The rows of a part lie in the files of the whole.
        return local.select(range(10)) if split == "part[:10]" else local

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources._hub_dataset.cache_clear()
    file = DataFile(path="someone/golden", split="part")
    built = build_store(DATA, [file], tokenizer, tmp_path / "store")
    assert_holds(built, [DataFile(path=str(golden))], tokenizer)
    assert asked == [("someone/golden", "part", None)]
    part = build_store(DATA, [replace(file, split="part[:10]", revision="v2")], tokenizer, tmp_path / "store")
    assert asked[1:] == [("someone/golden", "part[:10]", "v2")]
    assert len(part) == 10
    assert part.fingerprint != built.fingerprint
    sources._hub_dataset.cache_clear()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_store_is_built_again(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    file, folder = write_lines(tmp_path / "a.jsonl", GOOD), tmp_path / "store"
    build_store(DATA, [file], tokenizer, folder)
    whole = contents(folder)
    (shard,) = folder.glob("*.arrow")
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "flipped": content, "empty": b"", "foreign": b"x" * 4096}
    shard.write_bytes(damaged[damage])
    if damage != "flipped":
        with pytest.raises(ValueError, match=r"token store file .*\.arrow is damaged .*; delete it"):
            open_store(DATA, [file], tokenizer, folder)
    build_store(DATA, [file], tokenizer, folder)
    assert contents(folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_build_is_completed_by_the_next(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    file = write_lines(tmp_path / "a.jsonl", GOOD * 60)
    folder = tmp_path / "store"
    # The kill comes when the seventh batch is to be written; with two workers, others are still in flight.
    code = f"""
from reflectron.engine.data import shard
written, checksum = [], shard._checksum
def kill_later(batch):
    written.append(batch)
    if len(written) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return checksum(batch)
shard._checksum = kill_later
build({file.path!r}, {str(folder)!r}, {workers})
"""
    assert run(code).returncode == -signal.SIGKILL
    # The lock of the killed one is there, too.
    (left,) = (path for path in folder.iterdir() if path.name != "job.lock")
    assert re.fullmatch(r"a-[0-9a-f]{16}\.arrow\..+\.tmp", left.name)
    assert left.stat().st_size > 0
    with pytest.raises(ValueError, match="does not exist, expected it to be built before"):
        open_store(DATA, [file], tokenizer, folder)
    assert len(build_store(DATA, [file], tokenizer, folder)) == 24 * 60
    build_store(DATA, [file], tokenizer, tmp_path / "untouched")
    assert contents(folder) == contents(tmp_path / "untouched")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", GOOD * 10)
    # A file size limit fails the same write calls as a full disk does; Python ignores SIGXFSZ.
    done = run(f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    build({file.path!r}, {str(tmp_path / "store")!r}, 1)
except OSError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("[Errno 27] ")
    assert "cannot be written: File too large; make room or set data.store_dir" in line
    assert list((tmp_path / "store").iterdir()) == []


def test_unreadable_files_are_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    for name, reason in {
        "missing.jsonl": "data file .*missing.jsonl does not exist",
        "missing.parquet": "data file .*missing.parquet does not exist",
        "folder.jsonl": "data file .* is a folder, expected a file or the id of a hub dataset",
        "a.txt": "data file .*a.txt ends in '.txt', expected one of .jsonl, .json, .ndjson, .parquet",
        "broken.parquet": "data file .*broken.parquet cannot be read: ",
        "empty.jsonl": "data file .*empty.jsonl holds no record",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            build_store(DATA, [DataFile(path=str(tmp_path / name))], tokenizer, tmp_path / "store" / name)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "store" / name).glob("*.tmp"))


def test_unknown_dataset_names_the_file_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data file no/such does not exist, and no dataset 'no/such' with split 'x'"):
        list(read_records(DataFile(path="no/such", split="x")))


def one_file_store(folder: Path, tokenizer: Tokenizer) -> tuple[TokenStore, Path]:
    built = build_store(DATA, [write_lines(folder / "a.jsonl", GOOD)], tokenizer, folder / "store")
    (path,) = (folder / "store").glob("*.arrow")
    built.check_unchanged()
    return built, path


def test_a_store_that_is_cut_short_under_the_run_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built, path = one_file_store(tmp_path, tokenizer)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    with pytest.raises(ValueError, match=rf"{path} was changed .*: it has {size // 2} bytes, expected {size}"):
        built.check_unchanged()


def test_a_store_that_is_written_into_under_the_run_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built, path = one_file_store(tmp_path, tokenizer)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\xfe\xfd")
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"{path} was changed under the run: its content is another"):
        built.check_unchanged()


def test_a_store_that_is_touched_replaced_or_deleted_serves_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built, path = one_file_store(tmp_path, tokenizer)
    os.utime(path, ns=(0, 0))
    built.check_unchanged()
    path.unlink()
    path.write_bytes(b"another")
    built.check_unchanged()
    assert_holds(built, [DataFile(path=str(tmp_path / "a.jsonl"))], tokenizer)


def test_data_that_are_changed_while_they_are_read(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "a.jsonl", GOOD)
    read_chunks = store.read_chunks

    def append_meanwhile(file: DataFile, size: int) -> Any:
        yield from read_chunks(file, size)
        write_lines(Path(file.path), [*GOOD, GOOD[0]])

    monkeypatch.setattr(store, "read_chunks", append_meanwhile)
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read"):
        build_store(DATA, [file], tokenizer, tmp_path / "store")
    assert not list((tmp_path / "store").glob("*.arrow"))
