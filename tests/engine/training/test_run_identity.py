"""What makes two runs the same: every setting that changes the curve, and the content of what files hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflectron.engine.checkpoint.folder import check_same_run
from reflectron.engine.config import Config, DataConfig, DataFile
from reflectron.engine.data.store import build_store
from reflectron.engine.data.tokenization import PARSER_VERSION
from reflectron.engine.training.run import NOT_IDENTITY, _settings, prepare, run_identity, run_length, sample_order
from reflectron.engine.weights import identity as weights
from reflectron.engine.weights.identity import weights_identity
from reflectron.tools.load_config import load_config
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
MODEL = GOLDEN / "llama_before"


def run_config(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    settings = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(MODEL), "dtype": "float32"},
        "tokenizer": {"path": str(GOLDEN / "tokenizer_before")},
        "data": {"train": [{"path": str(GOLDEN / "samples.jsonl")}], "max_length": 448, "workers": 1},
        "batch": {"tokens_per_microbatch": 1024},
    }
    # JSON is YAML.
    path.write_text(json.dumps(settings), encoding="utf-8")
    return load_config(str(path), list(overrides))


def identity(folder: Path, *overrides: str) -> dict[str, Any]:
    config = run_config(folder, *overrides)
    return run_identity(config, prepare(config, progress=False))


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Dotted key, and the dictionary and name by which its value can be set."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], dict):
            yield from leaves(value[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values, name


def test_every_setting_is_part_of_the_identity_unless_it_is_listed() -> None:
    """So a setting that is new is part of it, until someone decides otherwise."""
    files = (DataFile(path="a"),)
    values = dataclasses.asdict(Config(data=DataConfig(train=files, validation=files)))
    before = json.dumps(_settings(values))
    listed = set()
    for key, holder, name in list(leaves(values)):
        parts = key.split(".")
        above = {".".join(parts[: i + 1]) for i in range(len(parts))} & NOT_IDENTITY
        listed |= above
        was, holder[name] = holder[name], "another value"
        changed = json.dumps(_settings(values)) != before
        holder[name] = was
        assert changed != bool(above), key
    assert listed == NOT_IDENTITY, "a name that is no setting"


def test_what_is_trained_on_counts_by_its_content(tmp_path: Path) -> None:
    first = identity(tmp_path)
    elsewhere = tmp_path / "moved" / "under another name"
    shutil.copytree(MODEL, elsewhere)
    shutil.copy(GOLDEN / "samples.jsonl", tmp_path / "copy.jsonl")
    moved = [f"model.path={elsewhere}", f"data.train[0].path={tmp_path / 'copy.jsonl'}", "data.workers=2"]
    assert identity(tmp_path, *moved) == first
    content = bytearray((elsewhere / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (elsewhere / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^model.path \(SHA-256 of the weights\) is '.*', expected '.*' as in the run"
    ):
        check_same_run(first, identity(tmp_path, *moved), Path("x"))


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("data.train[0].split=test", "data.train.split is ['test'], expected ['train']"),
        ("data.train[0].revision=v2", "data.train.revision is ['v2'], expected [None]"),
        ("data.train[0].repeat=3", "data.train.repeat is [3.0], expected [1.0]"),
        ("data.max_length=449", "data.max_length is 449, expected 448"),
        ("mask.strategy=all", "mask.strategy is 'all', expected 'block'"),
        ("batch.global_batch_size=7", "batch.global_batch_size is 7, expected 512"),
        ("train.steps=20", "train.steps is 20, expected None"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate is 1.0, expected 5e-05"),
    ],
)
def test_another_setting_is_refused_by_its_key(tmp_path: Path, override: str, refusal: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{re.escape(refusal)} as in the run that x holds: .*checkpoint.resume=never"
    ):
        check_same_run(identity(tmp_path), identity(tmp_path, override), Path("x"))


def test_a_run_of_an_older_version_is_refused_where_it_would_draw_otherwise(tmp_path: Path) -> None:
    now = identity(tmp_path)
    older = {key: value for key, value in now.items() if key != "random draws (version)"}
    with pytest.raises(ValueError, match=r"^random draws \(version\) is 2, expected 1 as in the run that x holds"):
        check_same_run(older, now, Path("x"))


def test_what_records_come_to_is_pinned(tmp_path: Path) -> None:
    """A change here needs another PARSER_VERSION, or runs of before would be continued with other samples."""
    config = run_config(tmp_path)
    inputs = prepare(config, progress=False)
    assert inputs.train is not None
    digest = hashlib.sha256()
    for sample in map(inputs.train.__getitem__, range(len(inputs.train))):
        digest.update(sample.kind.encode())
        for part in (sample.input_ids, sample.supervised, sample.blocks):
            digest.update(part.astype(np.int32).tobytes())
    assert (PARSER_VERSION, digest.hexdigest()[:16]) == (2, "d1e7ba38dc1c6be0")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a checkpoint that is too large to be read whole."""
    monkeypatch.setattr(weights, "_READ_WHOLE", 0)


def cut(content: bytearray) -> bytearray:
    return content[: len(content) // 2]


def another_header(content: bytearray) -> bytearray:
    content[12] ^= 1
    return content


def trained(content: bytearray) -> bytearray:
    """Every number a little different."""
    header = int.from_bytes(content[:8], "little")
    numbers = np.frombuffer(content, np.float32, offset=8 + header) + np.float32(1e-3)
    return content[: 8 + header] + bytearray(numbers.tobytes())


def one_tensor(content: bytearray) -> bytearray:
    header = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + header])
    start, end = entries["model.layers.1.mlp.down_proj.weight"]["data_offsets"]
    start, end = 8 + header + start, 8 + header + end
    content[start:end] = bytes(end - start)
    return content


@pytest.mark.parametrize("change", [cut, another_header, trained, one_tensor])
@pytest.mark.usefixtures("sampled")
def test_large_checkpoints_are_told_apart_by_pieces(tmp_path: Path, change: Callable[[bytearray], bytearray]) -> None:
    before = weights_identity(str(MODEL))
    (tmp_path / "model.safetensors").write_bytes(change(bytearray((MODEL / "model.safetensors").read_bytes())))
    assert weights_identity(str(tmp_path)) != before
    shutil.copy(MODEL / "model.safetensors", tmp_path)
    assert weights_identity(str(tmp_path)) == before


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x10" + bytes(7) + b"{" * 16, (99).to_bytes(8, "little")])
@pytest.mark.usefixtures("sampled")
def test_damaged_weights_have_an_identity_too(tmp_path: Path, header: bytes) -> None:
    """They are refused where they are read."""
    (tmp_path / "model.safetensors").write_bytes(header + b"x" * 5000)
    assert len(weights_identity(str(tmp_path))) == 64


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors cannot be read: No such file"):
        weights_identity(str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train[0].repeat=0.01", "train.epochs=1"], "the run has 0 steps: train.epochs 1 of data.train list no"),
        (["train.epochs=.inf"], "train.epochs is inf, expected number"),
        (["data.train[0].repeat=.inf"], r"data.train\[0\].repeat is inf, expected number"),
        (["data.max_length=16", "data.max_reject_share=1"], "data.max_length is 16, expected more: no sample is left"),
        (["data.train[0].path=bad.jsonl", "data.max_reject_share=1"], "data.train has no sample: every record was rej"),
    ],
)
def test_a_run_without_a_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"query": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        prepare(run_config(tmp_path, *overrides), progress=False)


def test_a_small_share_is_a_run_over_more_epochs(tmp_path: Path) -> None:
    config = run_config(tmp_path, "data.train[0].repeat=0.01", "train.epochs=100")
    store = prepare(config, progress=False).train
    assert store is not None
    assert run_length(config, sample_order(store, config.data.train, config.seed))[0] == 1


def test_two_writers_of_a_store_do_not_meet(tmp_path: Path) -> None:
    """The second waits for the first and uses what it made; threads here, processes in ``test_job_lock``."""
    config = run_config(tmp_path)
    inputs = prepare(config, progress=False)
    built: list[str] = []

    def build() -> None:
        store = build_store(config.data, config.data.train, inputs.model.tokenizer, tmp_path / "store")
        built.append(store.fingerprint)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 4
    assert len(set(built)) == 1
    assert [path.suffix for path in (tmp_path / "store").iterdir()].count(".arrow") == 1
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix in (".lock", ".tmp")]


def test_a_device_or_a_pipe_among_the_weights_is_not_read(tmp_path: Path) -> None:
    import os

    from reflectron.engine.model.hf_config import read_hf_config
    from reflectron.engine.weights.identity import weights_identity

    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"content")
    alone = weights_identity(str(tmp_path))
    (tmp_path / "device.distcp").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.distcp")
    assert weights_identity(str(tmp_path)) == alone
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is no regular file"):
        read_hf_config(tmp_path)
