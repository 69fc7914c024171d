"""A Hugging Face checkpoint folder: what lies beside the weights, how they spread over files, their bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import assert_never

from reflectron.engine.config import Config
from reflectron.engine.data.tokenizer import Tokenizer
from reflectron.engine.files import free_bytes, gib
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import FAMILIES
from reflectron.engine.model.hf_mapping import checkpoint_tensors
from reflectron.engine.model.inputs import ModelInputs
from reflectron.engine.model.rope import attention_factor


def write_description(folder: Path, inputs: ModelInputs, dtype: torch.dtype) -> None:
    """Write everything but the weights: config, tokenizer and generation config.

    Args:
        folder: exists.
        inputs: the model.
        dtype: of its weights.
    """
    inputs.tokenizer.save(folder)
    write_json(folder / "config.json", export_config(inputs, dtype))
    write_json(folder / "generation_config.json", _generation_config(inputs.tokenizer))


# Written anew from the architecture, so that no reader falls back on a default of its own release.
_REPLACED = ("_name_or_path", "original_max_position_embeddings", "partial_rotary_factor", "hidden_act")


def export_config(inputs: ModelInputs, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``config.json`` of the trained model, which means the same to transformers 4.48 to 5 and to vLLM.

    It is the original's with the new vocabulary, type and class. What the releases spell or default differently stands
    there in each of their ways.
    """
    arch, name = inputs.arch, str(dtype).removeprefix("torch.")
    exported = {key: value for key, value in inputs.hf_config.items() if key not in _REPLACED}
    exported |= {
        "architectures": [FAMILIES[arch.family].class_name],
        "vocab_size": arch.vocab_size,
        "num_key_value_heads": arch.num_query_groups,
        "rms_norm_eps": arch.layernorm_epsilon,
        "tie_word_embeddings": arch.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": name,
        "dtype": name,
        **arch.rope.to_hf(attention_factor(arch.rope)),
        **_token_ids(inputs.tokenizer),
    }
    if arch.head_dim * arch.num_attention_heads != arch.hidden_size or exported.get("head_dim") is not None:
        exported["head_dim"] = arch.head_dim
    else:
        exported.pop("head_dim", None)
    return exported


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {**_token_ids(tokenizer), "do_sample": False}


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return BOS, padding and all that ends an answer, alike in both files."""
    # An answer ends with its message; EOS only follows the last one of a conversation.
    stops = [tokenizer.eos_id]
    if "<|endofmessage|>" in tokenizer.tag_ids:
        stops.append(tokenizer.tag_ids["<|endofmessage|>"])
    eos = stops if len(stops) > 1 else stops[0]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as the folder's other files are written."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ExportFiles:
    """How tensors are spread over files."""

    names: tuple[tuple[str, ...], ...]
    """Tensors of each file."""
    total_bytes: int
    """The size of all files."""


def plan_files(sizes: Sequence[tuple[str, int]], max_file_bytes: int) -> ExportFiles:
    """Divide tensors with their bytes into files, in order; one ends before the tensor that would exceed the limit."""
    files: list[list[str]] = [[]]
    in_file = 0
    for name, size in sizes:
        if files[-1] and in_file + size > max_file_bytes:
            files.append([])
            in_file = 0
        files[-1].append(name)
        in_file += size
    return ExportFiles(tuple(tuple(names) for names in files), sum(size for _, size in sizes))


def file_name(index: int, total: int) -> str:
    """Return the name of weights file ``index`` of ``total``, as transformers names them."""
    return "model.safetensors" if total == 1 else f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def write_safetensors_index(files: Sequence[Sequence[str]], total_bytes: int, folder: Path) -> None:
    """Write which of several files holds which tensor."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: file_name(i, len(files)) for i, names in enumerate(files) for name in names},
    }
    write_json(folder / "model.safetensors.index.json", index)


# For the index and the framing of the tensors, beside 2 % of their bytes.
SPARE_BYTES = 1 << 20


def with_framing(tensor_bytes: int) -> int:
    """Return the bytes of files that hold tensors of so many bytes."""
    return int(tensor_bytes * 1.02) + SPARE_BYTES


def export_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes that a Hugging Face checkpoint with weights of ``dtype`` takes."""
    return with_framing(_parameters(arch) * dtype.itemsize)


def checkpoint_bytes(config: Config, arch: Architecture) -> int:
    """Return the bytes that one training checkpoint takes: weights, float32 copies of bfloat16 ones, and AdamW's
    moments.

    Adafactor's averages are rows and columns, which the framing's share covers.
    """
    a_parameter = {"bfloat16": 6, "float32": 4}[config.model.dtype]
    if config.optimizer.name == "adamw":
        moments = (config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype)
        a_parameter += sum(getattr(torch, name).itemsize for name in moments)
    elif config.optimizer.name != "adafactor":
        assert_never(config.optimizer.name)
    return with_framing(_parameters(arch) * a_parameter)


def lack_of_space(folder: Path, needed: dict[str, int]) -> str:
    """Return why ``needed``, bytes by what they are for, do not fit on the disk of ``folder``; empty when they do."""
    free, total = free_bytes(folder), sum(needed.values())
    if total <= free:
        return ""
    parts = " and ".join(f"{gib(size)} for {what}" for what, size in needed.items())
    return f"{folder} needs {parts}, and {gib(free)} are free on its disk: make room or choose another output_dir"


def _parameters(arch: Architecture) -> int:
    return sum(math.prod(piece.shape) for tensor in checkpoint_tensors(arch) for piece in tensor.pieces)
