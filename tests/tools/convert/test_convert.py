"""Checkpoints from one format into the other and back: every tensor, one at a time, complete or not at all."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.hf_mapping import checkpoint_tensors
from reflectron.engine.weights.dist_reader import DistSource
from reflectron.engine.weights.readers import RandomSource, SafetensorsSource
from reflectron.engine.weights.writers import write_safetensors, write_weights
from reflectron.tools import cli

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 37,
    "rms_norm_eps": 1e-6,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}


def architecture(name: str) -> Architecture:
    return parse_architecture(SIZES | MODELS[name])


def random_tensors(arch: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    pieces = [piece for tensor in checkpoint_tensors(arch) for piece in tensor.pieces]
    return {piece.name: torch.randn(piece.shape, generator=random).to(dtype) for piece in pieces}


def save_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A Hugging Face folder without a tokenizer; returns its tensors."""
    tensors = random_tensors(architecture(name), dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES | MODELS[name]), encoding="utf-8")
    (folder / "NOTICE").write_text("kept\n", encoding="utf-8")
    return tensors


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = save_checkpoint(name, tmp_path / "hf", dtype)
    assert cli.main(["convert", "hf-to-dist", str(tmp_path / "hf"), str(tmp_path / "dist")]) == 0
    assert not list((tmp_path / "dist").glob("*.safetensors"))
    assert cli.main(["convert", "dist-to-hf", str(tmp_path / "dist"), str(tmp_path / "back")]) == 0
    assert_same(read_all(tmp_path / "back"), original)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["NOTICE", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_ranges_are_those_of_the_whole_tensor(name: str, tmp_path: Path) -> None:
    tensors = save_checkpoint(name, tmp_path / "hf")
    (tmp_path / "dist").mkdir()
    arch = architecture(name)
    write_weights(SafetensorsSource(tmp_path / "hf"), arch, torch.float32, tmp_path / "dist", max_file_bytes=4000)
    assert len(list((tmp_path / "dist").glob("*.distcp"))) > 2
    source = DistSource(tmp_path / "dist", arch)
    for key, tensor in tensors.items():
        for dim in range(tensor.ndim):
            for start, stop in ((0, 2), (1, 5), (3, 99), (50, 99)):
                begin, end = min(start, tensor.shape[dim]), min(stop, tensor.shape[dim])
                found = source.read(key, tuple(tensor.shape), dim, start, stop)
                assert torch.equal(found, tensor.narrow(dim, begin, end - begin))


def test_several_files_have_an_index(tmp_path: Path) -> None:
    tensors = save_checkpoint("llama", tmp_path / "hf")
    write_safetensors(SafetensorsSource(tmp_path / "hf"), architecture("llama"), torch.float32, tmp_path, 4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


class WatchedSource(RandomSource):
    """Knows how many bytes of its tensors are still held by someone."""

    def __init__(self) -> None:
        super().__init__(seed=1, std=0.02)
        self.held = self.most = 0

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = super().read(name, shape, dim, start, stop)
        self.held += tensor.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(tensor, self._release, tensor.nbytes)
        return tensor

    def _release(self, size: int) -> None:
        self.held -= size


@pytest.mark.parametrize("write", [write_weights, write_safetensors])
def test_no_more_than_a_parameter_is_held(write: Any, tmp_path: Path) -> None:
    arch, source = architecture("llama"), WatchedSource()
    write(source, arch, torch.float32, tmp_path)
    largest = max(torch.Size(tensor.shape).numel() for tensor in checkpoint_tensors(arch)) * 4
    total = sum(torch.Size(tensor.shape).numel() for tensor in checkpoint_tensors(arch)) * 4
    assert source.most <= largest < total / 4


def test_a_type_can_be_chosen_and_must_be_where_tensors_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = save_checkpoint("llama", tmp_path / "hf")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    words = ["convert", "hf-to-dist", str(tmp_path / "hf"), str(tmp_path / "dist")]
    assert cli.main(words) == 2
    assert "model.norm.weight is torch.float16" in capsys.readouterr().err
    assert cli.main([*words, "--dtype", "bfloat16"]) == 0
    source = DistSource(tmp_path / "dist", architecture("llama"))
    assert source.dtype("model.norm.weight") == torch.bfloat16


def test_an_existing_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint("llama", tmp_path / "hf")
    assert cli.main(["convert", "hf-to-dist", str(tmp_path / "hf"), str(tmp_path / "hf")]) == 2
    assert capsys.readouterr().err.endswith("exists, expected the name of a new folder\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / ".metadata").write_bytes(b"no"), ".metadata cannot be read"),
        (lambda folder: edit_config(folder, num_hidden_layers=4), "expected [4, 16]"),
        (lambda folder: edit_config(folder, model_type="qwen2"), "linear_qkv.bias: it holds another architecture"),
    ],
)
def test_what_is_damaged_is_named(damage: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    save_checkpoint("llama", tmp_path / "hf")
    assert cli.main(["convert", "hf-to-dist", str(tmp_path / "hf"), str(tmp_path / "dist")]) == 0
    damage(tmp_path / "dist")
    capsys.readouterr()
    assert cli.main(["convert", "dist-to-hf", str(tmp_path / "dist"), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "back").exists()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
