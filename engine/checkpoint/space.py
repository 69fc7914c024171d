"""How many bytes a run still has to write, before it begins."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from reflectron.engine.checkpoint.hf_table import checkpoint_tensors
from reflectron.engine.choices import assert_never
from reflectron.engine.config import Config
from reflectron.engine.files import free_bytes, gib
from reflectron.engine.model.families import Architecture

# For the index and the framing of the tensors, beside 2 % of their bytes.
SPARE_BYTES = 1 << 20


def with_framing(tensor_bytes: int) -> int:
    """Bytes of files that hold tensors of so many bytes."""
    return int(tensor_bytes * 1.02) + SPARE_BYTES


def export_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes that a Hugging Face checkpoint with weights of ``dtype`` takes."""
    return with_framing(_parameters(arch) * dtype.itemsize)


def checkpoint_bytes(config: Config, arch: Architecture) -> int:
    """Bytes that one training checkpoint takes: weights, float32 copies of bfloat16 ones, and AdamW's moments.

    Adafactor's averages are rows and columns, which the framing's share covers.
    """
    a_parameter = 6 if config.model.dtype == "bfloat16" else 4
    if config.optimizer.name == "adamw":
        moments = (config.optimizer.exp_avg_dtype, config.optimizer.exp_avg_sq_dtype)
        a_parameter += sum(getattr(torch, name).itemsize for name in moments)
    elif config.optimizer.name != "adafactor":
        assert_never(config.optimizer.name)
    return with_framing(_parameters(arch) * a_parameter)


def lack_of_space(folder: Path, needed: dict[str, int]) -> str:
    """Why ``needed``, bytes by what they are for, do not fit on the disk of ``folder``; empty when they do."""
    free, total = free_bytes(folder), sum(needed.values())
    if total <= free:
        return ""
    parts = " and ".join(f"{gib(size)} for {what}" for what, size in needed.items())
    return f"{folder} needs {parts}, and {gib(free)} are free on its disk: make room or choose another output_dir"


def _parameters(arch: Architecture) -> int:
    return sum(math.prod(piece.shape) for tensor in checkpoint_tensors(arch) for piece in tensor.pieces)
