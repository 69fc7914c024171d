"""Ranges of named tensors from files, from a seed and with rows for new tokens; damaged files are named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reflectron.engine.weights.readers import RandomSource, SafetensorsSource, TensorSource, WithAddedTokens

EMBEDDING, PROJECTION = "model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"
SHAPES = {EMBEDDING: (7, 4), PROJECTION: (4, 6), "model.norm.weight": (4,)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A checkpoint in a single file."""
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    """The same in two files with an index."""
    weights = tensors()
    save_file({EMBEDDING: weights.pop(EMBEDDING)}, tmp_path / FIRST)
    save_file(weights, tmp_path / SECOND)
    weight_map = {EMBEDDING: FIRST, **dict.fromkeys(weights, SECOND)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return tmp_path


def assert_ranges(source: TensorSource, expected: dict[str, torch.Tensor]) -> None:
    """Whole tensors, ranges of either dimension, and ranges that end or begin past the end."""
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        assert torch.equal(source.read(name, shape, None, 0, 0), tensor)
        for dim in range(tensor.ndim):
            for start, stop in ((0, 2), (1, 3), (2, 99), (50, 99)):
                begin, end = min(start, shape[dim]), min(stop, shape[dim])
                assert torch.equal(source.read(name, shape, dim, start, stop), tensor.narrow(dim, begin, end - begin))


def test_ranges_of_one_file(one_file: Path) -> None:
    assert_ranges(SafetensorsSource(one_file), tensors())


def test_ranges_of_two_files(two_files: Path) -> None:
    assert_ranges(SafetensorsSource(str(two_files)), tensors())


def test_ranges_of_a_random_initialisation() -> None:
    source = RandomSource(seed=3, std=0.5)
    whole = {name: source.read(name, shape, None, 0, 0) for name, shape in SHAPES.items()}
    assert_ranges(RandomSource(seed=3, std=0.5), whole)
    assert whole["model.norm.weight"].eq(1).all()
    assert not torch.equal(whole[EMBEDDING], RandomSource(4, 0.5).read(EMBEDDING, (7, 4), None, 0, 0))
    assert source.read("model.layers.0.self_attn.q_proj.bias", (5,), None, 0, 0).eq(0).all()


@pytest.mark.parametrize("start", [0, 5, 8, 10, 99])
def test_new_tokens_are_means(one_file: Path, start: int) -> None:
    expected = tensors()
    old = expected[EMBEDDING]
    # Token 6 is a spare row of the file, 8 and 9 are tags, one spelt with a new token, and 7 is no tag.
    expected[EMBEDDING] = torch.cat((old[:6], old[[0, 2]].mean(0)[None], old.double().mean(0).float().expand(3, 4)))
    expected[EMBEDDING][8] = old[[1, 1, 3]].mean(0)
    expected[EMBEDDING][9] = torch.stack((old[1], expected[EMBEDDING][7])).mean(0)
    source = WithAddedTokens(SafetensorsSource(one_file), 7, {6: [0, 2], 8: [1, 1, 3], 9: [1, 7]})

    found = source.read(EMBEDDING, (10, 4), 0, start, start + 5)
    assert torch.equal(found, expected[EMBEDDING][start : start + 5])
    assert torch.equal(source.read(PROJECTION, (4, 6), 1, 0, 3), expected[PROJECTION][:, :3])


def cut_off(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off(FIRST), f"/{FIRST} cannot be read: Error while deserializing header: "),
        (
            lambda folder: (folder / FIRST).write_bytes(b""),
            f"/{FIRST} cannot be read: Error while deserializing header",
        ),
        (lambda folder: (folder / FIRST).unlink(), f"/{FIRST} cannot be read: No such file or directory"),
        (
            lambda folder: save_file({}, folder / FIRST),
            f"/{FIRST} cannot be read: File does not contain tensor {EMBEDDING}",
        ),
        (cut_off("model.safetensors.index.json"), "/model.safetensors.index.json is not JSON: "),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
            "/model.safetensors.index.json is not JSON: maximum recursion depth",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": [["a", "b"]]}'),
            "/model.safetensors.index.json: weight_map is [['a', 'b']], expected each tensor with its file",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"metadata": {}}'),
            "/model.safetensors.index.json: weight_map is None, expected each tensor with its file",
        ),
    ],
)
def test_damaged_file_is_named(two_files: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(two_files)
    with pytest.raises(ValueError, match=r"download or copy it again$") as error:
        SafetensorsSource(two_files).read(EMBEDDING, SHAPES[EMBEDDING], None, 0, 0)
    assert str(error.value).startswith(f"{two_files}{message}")
    assert "\n" not in str(error.value)


def test_truncated_single_file_is_named(one_file: Path) -> None:
    cut_off("model.safetensors")(one_file)
    with pytest.raises(ValueError, match=r"download or copy it again$") as error:
        SafetensorsSource(one_file)
    assert str(error.value).startswith(f"{one_file}/model.safetensors cannot be read: ")


def test_a_truncated_file_is_found_before_any_tensor_is_read(two_files: Path) -> None:
    source = SafetensorsSource(two_files)
    source.open_all()
    cut_off(FIRST)(two_files)
    with pytest.raises(ValueError, match=f"{FIRST} cannot be read"):
        SafetensorsSource(two_files).open_all()


def test_weights_of_another_model_are_refused(one_file: Path) -> None:
    source = SafetensorsSource(one_file)
    with pytest.raises(ValueError, match="belong together") as error:
        source.read("lm_head.weight", (7, 4), 0, 0, 3)
    assert str(error.value) == (
        f"{one_file} has no tensor lm_head.weight: its config.json and its weights do not belong together"
    )
    with pytest.raises(ValueError, match="has shape") as error:
        source.read(EMBEDDING, (8, 4), 0, 0, 3)
    assert str(error.value) == (
        f"{one_file}/model.safetensors: {EMBEDDING} has shape [7, 4], expected [8, 4] by config.json"
    )


def test_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no model\.safetensors .*; other formats become safetensors by transformers'"
    ):
        SafetensorsSource(tmp_path)
