"""Where weights come from: a Hugging Face checkpoint on disk, or a seeded random initialisation.

A ``TensorSource`` answers for a range of one dimension of a named tensor, so that each rank reads the slices that it
holds and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from reflectron.engine.files import printable, read_object
from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER
from reflectron.engine.weights.identity import INDEX_FILE, SINGLE_FILE

_ROWS_AT_A_TIME = 4096
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class TensorSource(Protocol):
    """Named tensors that can be read in parts."""

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """Return the rows ``start`` to ``stop`` along ``dim`` of tensor ``name``, or all of it when ``dim`` is None.

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
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if not index.exists() and not single.exists():
            raise ValueError(
                f"{self.folder} has no {SINGLE_FILE} and no {INDEX_FILE}; other formats become "
                f"safetensors by transformers' save_pretrained"
            )
        file_of = _weight_map(index) if index.exists() else {}
        if file_of and single.exists() and set(file_of.values()) != {single.name}:
            # transformers takes the single file, vLLM the index.
            raise ValueError(
                f"{self.folder} holds weights twice, in {SINGLE_FILE} and in the files of {INDEX_FILE}, and programs "
                "differ in which they load; remove one of the two"
            )
        return file_of or dict.fromkeys(self._open(single.name).keys(), single.name)

    def names(self) -> list[str]:
        """Return the names of all tensors that transformers would load: those of all files that the index names.

        Raises:
            ValueError: when a file is missing or damaged, or the index and the files disagree.
        """
        found: dict[str, str] = {}
        for file in sorted(set(self._file_of.values())):
            for name in self._open(file).keys():
                if name in found:
                    raise ValueError(f"{self.folder}: {printable(name, 100)} is in {found[name]} and in {file}")
                found[name] = file
        for name, file in self._file_of.items():
            if found.get(name) != file:
                raise ValueError(
                    f"{self.folder / INDEX_FILE}: {printable(name, 100)} is not in {printable(file, 100)}; "
                    "the index belongs to other files: download or copy the folder again"
                )
        return list(found)

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
        """Return the type of the tensor with this name.

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


def _weight_map(index: Path) -> dict[str, str]:
    """Return which tensor is in which file beside ``index``."""
    try:
        weight_map = read_object(index).get("weight_map")
    except OSError as error:
        raise _unreadable(index, error) from None
    except ValueError as error:
        raise ValueError(f"{error}; download or copy it again") from None
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index}: weight_map is {printable(weight_map, 100)}, expected each tensor with its file; download or "
            "copy it again"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {printable(name, 100)} is in {file!r}, expected the name of a file beside it")
    if not weight_map:
        raise ValueError(f"{index}: weight_map is empty, expected the files of the tensors")
    return weight_map


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
    """A source whose vocabulary grew, input and output rows alike.

    The embedding of each new tag is the mean of its sub-tokens' (the reference's rule). Any other new row is the mean
    of all old ones, around which ``resize_token_embeddings`` of transformers 4.46 and later draws it, with 1e-9 times
    their covariance.

    Args:
        source: the checkpoint before the addition.
        vocab_size: its rows.
        sub_tokens: id of each new tag -> ids that spelt it before.
    """

    def __init__(self, source: TensorSource, vocab_size: int, sub_tokens: Mapping[int, Sequence[int]]) -> None:
        self.source, self.vocab_size, self.sub_tokens = source, vocab_size, sub_tokens
        self._mean_of: dict[str, torch.Tensor] = {}

    def read(self, name: str, shape: tuple[int, ...], dim: int | None, start: int, stop: int) -> torch.Tensor:
        """See ``TensorSource``."""
        if name not in (EMBEDDING, OUTPUT_LAYER):
            return self.source.read(name, shape, dim, start, stop)
        assert dim == 0, "embeddings are read by rows"
        old_shape = (self.vocab_size, *shape[1:])
        stop = min(stop, shape[0])
        known = self.source.read(name, old_shape, 0, min(start, self.vocab_size), min(stop, self.vocab_size))
        rows = known.new_zeros(max(stop - start, 0), *shape[1:])
        rows[: len(known)] = known
        for token in range(max(start, self.vocab_size), stop):
            if token not in self.sub_tokens:
                rows[token - start] = self._mean(name, old_shape)
        for token, spelling in self.sub_tokens.items():
            if start <= token < stop:
                parts = [self._old_row(name, old_shape, part) for part in spelling]
                rows[token - start] = torch.cat(parts).mean(dim=0)
        return rows

    def _old_row(self, name: str, old_shape: tuple[int, ...], token: int) -> torch.Tensor:
        """Return [1, H]; a sub-token may itself be new."""
        if token >= self.vocab_size:
            return self._mean(name, old_shape)[None]
        return self.source.read(name, old_shape, 0, token, token + 1)

    def _mean(self, name: str, old_shape: tuple[int, ...]) -> torch.Tensor:
        """Return [H], the mean of all old rows in their type; the same on every rank, whichever rows it holds."""
        if name not in self._mean_of:
            total = torch.zeros(old_shape[1:], dtype=torch.float64)
            for start in range(0, self.vocab_size, _ROWS_AT_A_TIME):
                rows = self.source.read(name, old_shape, 0, start, start + _ROWS_AT_A_TIME)
                total += rows.to("cpu", torch.float64).sum(dim=0)
            self._mean_of[name] = (total / self.vocab_size).to(rows)
        return self._mean_of[name]


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
