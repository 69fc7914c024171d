"""How far each back end is from the definition: rows of errors against float64, beside those of the plain one.

A back end passes where its error is at most ``MOST_OF_PLAIN`` times that of the plain back end in the same type, on
the same random inputs; the plain one where its error is that of the type's rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from reflectron.engine.config import Config, ModelConfig, ParallelConfig
from reflectron.engine.model.backends.attention_kernels import attention_kernel, sdpa
from reflectron.engine.model.backends.checks import attention_errors, attention_problem
from reflectron.engine.model.backends.choose import CANDIDATES, Use, attention_shape
from reflectron.engine.model.hf_config import parse_architecture

MOST_OF_PLAIN = 1.2
# Beside it, in units of the type's rounding: two kernels that round in another order differ by that.
TINY = 0.1
# For the plain one, likewise: sums of products are float32 in either type, and only float32's rounding shows them.
PLAIN_ERROR = {"bfloat16": 1.5, "float32": 10.0}

# query heads, key-value heads, width of a head, context-parallel chunks
ATTENTION_CASES: dict[str, tuple[int, int, int, bool]] = {
    "heads of 128": (8, 8, 128, False),
    "heads of 64, grouped": (8, 2, 64, False),
    "heads of 128, grouped, chunks": (8, 2, 128, True),
}
# Segments of one token, below, at and beyond the tiles of kernels; more keys than queries where a rank has a chunk.
_LENGTHS = (1, 127, 300, 1, 64, 129, 2)
_KEYS_OF_CHUNKS = (1, 254, 430, 77, 64, 300, 3)
_PADDING = 144


def attention_parity(
    device: torch.device,
    dtype: str,
    cases: Iterable[str] = tuple(ATTENTION_CASES),
    backends: Iterable[str] = tuple(CANDIDATES["attention"]),
) -> list[dict[str, Any]]:
    """Rows of back ends of ``backends.attention`` on some of ``ATTENTION_CASES``.

    Returns:
        Of each pair a row for the output and for each gradient; a single one with ``reason`` where the back end cannot
        be used.
    """
    return [row for case in cases for backend in backends for row in _attention_rows(case, backend, device, dtype)]


def _attention_rows(case: str, backend: str, device: torch.device, dtype: str) -> list[dict[str, Any]]:
    heads, groups, head_dim, chunks = ATTENTION_CASES[case]
    use = Use(
        Config(
            model=ModelConfig(dtype="float32" if dtype == "float32" else "bfloat16"),
            parallel=ParallelConfig(context_parallel_size=2 if chunks else 1),
        ),
        parse_architecture(
            {
                "model_type": "llama",
                "hidden_size": heads * head_dim,
                "intermediate_size": 8,
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
                "num_hidden_layers": 1,
                "vocab_size": 8,
            }
        ),
        device,
    )
    row = {"part": "attention", "case": case, "backend": backend, "dtype": dtype}
    if reason := CANDIDATES["attention"][backend](use):
        return [row | {"reason": reason}]
    torch_dtype, shape = getattr(torch, dtype), attention_shape(use)
    keys = _KEYS_OF_CHUNKS if chunks else _LENGTHS
    problem = attention_problem(shape, _LENGTHS, keys, _PADDING, torch_dtype, device)
    plain = attention_errors(sdpa(shape), problem, torch_dtype)
    errors = plain if backend == "sdpa" else attention_errors(attention_kernel(backend, shape), problem, torch_dtype)
    return compared(row, errors, plain, is_plain=backend == "sdpa")


def compared(
    row: dict[str, Any], errors: dict[str, float], plain: dict[str, float], is_plain: bool
) -> list[dict[str, Any]]:
    """``row`` once for each tensor, with its error, that of the plain back end, and whether it passes."""
    rounding = torch.finfo(getattr(torch, row["dtype"])).eps
    if is_plain:
        limits = dict.fromkeys(plain, PLAIN_ERROR[row["dtype"]] * rounding)
    else:
        limits = {name: MOST_OF_PLAIN * error + TINY * rounding for name, error in plain.items()}
    return [
        row | {"tensor": name, "error": error, "plain_error": plain[name], "passed": error <= limits[name]}
        for name, error in errors.items()
    ]
