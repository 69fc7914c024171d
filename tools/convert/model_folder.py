"""A folder with the weights of a model, in any of the formats that this project reads or writes.

That is a Hugging Face checkpoint, the folder that ``convert hf-to-dist`` makes of it, or one checkpoint of a training
run. All of them answer by Hugging Face names, and nothing is read before it is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from reflectron.engine.checkpoint.folder import MANIFEST, check_file, read_manifest
from reflectron.engine.data.tokenizer import Tokenizer, load_tokenizer
from reflectron.engine.files import free_bytes, gib, remove, remove_temporaries, temporary_name
from reflectron.engine.job_lock import take_lock
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture, read_hf_config
from reflectron.engine.model.hf_mapping import EMBEDDING, HfPiece, checkpoint_tensors
from reflectron.engine.model.inputs import ModelInputs, read_model_inputs
from reflectron.engine.weights.dist_metadata import METADATA_FILE
from reflectron.engine.weights.dist_reader import DistSource, open_weights
from reflectron.engine.weights.hf_folder import write_description, write_json
from reflectron.engine.weights.readers import SafetensorsSource
from reflectron.tools.load_config import config_from

# Files that hold weights, in either format.
_WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("*.distcp", METADATA_FILE, "common.pt", "metadata.json"),
)


@dataclass(frozen=True)
class ModelFolder:
    """Opens the weights of a model and what describes them."""

    folder: Path
    arch: Architecture
    weights: SafetensorsSource | DistSource
    """The tensors by Hugging Face name."""
    trained: ModelInputs | None
    """What a training checkpoint's configuration says; None where the folder itself has config and tokenizer."""

    @property
    def pieces(self) -> list[HfPiece]:
        """Return every tensor of the model, in the order of the forward."""
        return [piece for tensor in checkpoint_tensors(self.arch) for piece in tensor.pieces]

    def dtype(self) -> torch.dtype:
        """Return the dtype of all its tensors.

        Raises:
            ValueError: when they differ, naming one.
        """
        expected = self.weights.dtype(EMBEDDING)
        for piece in self.pieces:
            if (found := self.weights.dtype(piece.name)) != expected:
                raise ValueError(f"{self.folder}: {piece.name} is {found}, {EMBEDDING} {expected}; choose with --dtype")
        return expected

    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer.

        Raises:
            ValueError: when the folder has none.
        """
        return self.trained.tokenizer if self.trained else load_tokenizer(str(self.folder), "magicoder")

    def describe(self, target: Path, dtype: torch.dtype) -> None:
        """Write config, tokenizer and everything else that is not a weight into ``target``."""
        if self.trained is not None:
            write_description(target, self.trained, dtype)
        else:
            shutil.copytree(self.folder, target, ignore=shutil.ignore_patterns(*_WEIGHT_FILES), dirs_exist_ok=True)
            name = str(dtype).removeprefix("torch.")
            write_json(target / "config.json", read_hf_config(target) | {"torch_dtype": name, "dtype": name})


def open_model_folder(path: str) -> ModelFolder:
    """Open ``path`` without reading weights; every file of a training checkpoint is checked against its manifest.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder, expected a checkpoint")
    if not (folder / MANIFEST).exists():
        arch = parse_architecture(read_hf_config(folder), path)
        return ModelFolder(folder, arch, open_weights(folder, arch), None)
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        check_file(folder / name, digest)
    inputs = read_model_inputs(config_from(manifest.config, str(folder / MANIFEST)))
    return ModelFolder(folder, inputs.arch, DistSource(folder, inputs.arch), inputs)


def write_model_folder(model: ModelFolder, out: str, dtype: torch.dtype, write: Callable[[Path], None]) -> None:
    """Write the folder ``out``, complete or not at all: the description of ``model``, and what ``write`` puts there.

    Raises:
        ValueError: when ``out`` is there or has no space.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with take_lock(target.with_name(f"{target.name}.lock"), f"folder {out}"):
        if target.exists():
            raise ValueError(f"{out} exists, expected the name of a new folder")
        remove_temporaries(target.parent, target.name)
        partial = target.with_name(temporary_name(target.name, "partial"))
        try:
            _write_model_folder(model, target, partial, dtype, write)
        except BaseException:
            remove(partial)
            raise


def _write_model_folder(
    model: ModelFolder, target: Path, partial: Path, dtype: torch.dtype, write: Callable[[Path], None]
) -> None:
    needed = sum(torch.Size(piece.shape).numel() for piece in model.pieces) * dtype.itemsize
    free = free_bytes(target.parent)
    if needed > free:
        raise ValueError(
            f"{target} needs {gib(needed)}, and {gib(free)} are free on its disk: make room or choose a folder "
            "elsewhere"
        )
    partial.mkdir()
    model.describe(partial, dtype)
    write(partial)
    partial.rename(target)
