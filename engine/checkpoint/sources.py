"""Where weights come from: a Hugging Face checkpoint on disk, or a seeded random initialisation.

A ``TensorSource`` answers for a range of one dimension of a named tensor, so that each rank reads the slices that it
holds and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from reflectron.engine.checkpoint.hf_table import EMBEDDING, OUTPUT_LAYER

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorSource(Protocol):
    """Named tensors that can be read in parts."""

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` along ``dim`` of tensor ``name``, or all of it when ``dim`` is None.

        ``shape`` is the shape that the model expects of the whole tensor; a range past its end is cut short.

        Raises:
            ValueError: when there is no such tensor or its shape is another.
        """
        ...


class SafetensorsSource:
    """A checkpoint folder with ``model.safetensors`` or an index of several files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise _unreadable(index, error) from None
        if single.exists():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        raise ValueError(
            f"{self.folder} has no model.safetensors and no model.safetensors.index.json; other formats become "
            f"safetensors by transformers' save_pretrained"
        )

    def open_all(self) -> None:
        """Open every file, so that a missing or truncated one is found before training.

        Raises:
            ValueError: naming the file.
        """
        for file in sorted(set(self._file_of.values())):
            self._open(file)

    def _open(self, file: str) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(self.folder / file, error) from None
        return self._files[file]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(
                f"{self.folder} has no tensor {name}: its config.json and its weights do not belong together"
            )
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(name)
        except SafetensorError as error:
            raise _unreadable(self.folder / file, error) from None

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor with this name.

        Raises:
            ValueError: when there is none, or its type is none that weights have.
        """
        spelled = self._slice(name).get_dtype()
        if spelled not in SAFETENSORS_DTYPES:
            raise ValueError(f"{self.folder}: {name} is {spelled}, expected {', '.join(SAFETENSORS_DTYPES)}")
        return SAFETENSORS_DTYPES[spelled]

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        tensor = self._slice(name)
        found = tuple(tensor.get_shape())
        if found != shape:
            file = self.folder / self._file_of[name]
            raise ValueError(f"{file}: {name} has shape {list(found)}, expected {list(shape)} by config.json")
        if dim is None:
            return tensor[:]
        return tensor[(slice(None),) * dim + (slice(min(start, found[dim]), min(stop, found[dim])),)]


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read: {error}; download or copy it again")


class RandomSource:
    """A fresh initialisation: norms 1, biases 0, all else normal with ``std``.

    Each tensor is drawn whole from its own generator, keyed by the seed and its name, so that the weights do not depend
    on the parallel layout.
    """

    def __init__(self, seed: int, std: float, device: torch.device | str = "cpu") -> None:
        """``device``: where numbers are drawn; another kind of device draws others."""
        self.seed, self.std, self.device = seed, std, device

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        tensor = self._draw(name, shape)
        if dim is None:
            return tensor
        start, stop = min(start, shape[dim]), min(stop, shape[dim])
        return tensor.narrow(dim, start, stop - start)

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self.device)
        if name.endswith(".bias"):
            return torch.zeros(shape, device=self.device)
        key = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(key[:8], "big") >> 1)
        return torch.empty(shape, device=self.device).normal_(0.0, self.std, generator=generator)


class WithAddedTokens:
    """A source whose vocabulary grew: each new token's embedding is the mean of its sub-tokens' (the reference's rule).

    Args:
        source: the checkpoint before the addition.
        vocab_size: its rows.
        sub_tokens: id of each new token -> ids that spelt it before.
    """

    def __init__(self, source: TensorSource, vocab_size: int, sub_tokens: Mapping[int, Sequence[int]]) -> None:
        self.source, self.vocab_size, self.sub_tokens = source, vocab_size, sub_tokens

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``; rows past the old vocabulary that are no new token are zero."""
        if name not in (EMBEDDING, OUTPUT_LAYER):
            return self.source.read(name, shape, dim, start, stop)
        assert dim == 0, "embeddings are read by rows"
        old_shape = (self.vocab_size, *shape[1:])
        stop = min(stop, shape[0])
        known = self.source.read(name, old_shape, 0, min(start, self.vocab_size), min(stop, self.vocab_size))
        rows = known.new_zeros(max(stop - start, 0), *shape[1:])
        rows[: len(known)] = known
        for token, spelling in self.sub_tokens.items():
            if start <= token < stop:
                parts = [self.source.read(name, old_shape, 0, part, part + 1) for part in spelling]
                rows[token - start] = torch.cat(parts).mean(dim=0)
        return rows
