"""Attention backends on packed rows: every adapter, with a plain kernel of its interface.

No kernel for CUDA runs on the CPU. Their adapters do here, around ``varlen_kernel`` behind the kernel's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reflectron.engine.data.microbatch import Segments, segments_of, to_device
from reflectron.engine.model.backends.attention_kernels import (
    AttentionKernel,
    AttentionShape,
    attention_kernel,
    flash_varlen,
    sdpa,
    torch_varlen,
    transformer_engine,
)
from reflectron.engine.model.backends.checks import AttentionProblem, attention_errors, attention_problem
from testkit.varlen_kernel import DotProductAttention, flash_attn_varlen_func, with_logsumexp

SHAPE = AttentionShape(num_attention_heads=6, num_query_groups=2, head_dim=16, softmax_scale=0.3, whole_segments=True)
LENGTHS = (1, 3, 40, 1, 17)
# Chunks of segments whose earlier tokens other ranks hold, and whole ones.
CHUNKS = (1, 29, 43, 2, 17)
LENGTH_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
CPU = torch.device("cpu")


def varlen_attn(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """torch 2.12 and 2.13."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = dict(zip(LENGTH_NAMES, (cu_seq_q, cu_seq_k, max_q, max_k), strict=True))
    return flash_attn_varlen_func(query, key, value, **lengths, softmax_scale=scale, causal=True)


def varlen_attn_of_torch_2_11(*args: Any, scale: float, window_size: tuple[int, int] = (-1, -1)) -> Any:
    return varlen_attn(*args, scale=scale, window_size=window_size, enable_gqa=args[0].shape[1] != args[1].shape[1])


ADAPTERS: dict[str, Callable[[AttentionShape], AttentionKernel]] = {
    "sdpa": sdpa,
    "flash_attn": lambda shape: flash_varlen(flash_attn_varlen_func, shape),
    "flash_attn_4": lambda shape: flash_varlen(with_logsumexp, shape),
    "torch_varlen": lambda shape: torch_varlen(varlen_attn, shape),
    "torch_varlen_2_11": lambda shape: torch_varlen(varlen_attn_of_torch_2_11, shape),
    "transformer_engine": lambda shape: transformer_engine(DotProductAttention, shape),
}


def problem_of(shape: AttentionShape, padding: int) -> AttentionProblem:
    key_lengths = LENGTHS if shape.whole_segments else CHUNKS
    return attention_problem(shape, LENGTHS, key_lengths, padding, torch.float64, CPU)


@pytest.mark.parametrize("padding", [0, 150])
@pytest.mark.parametrize("whole_segments", [True, False], ids=["whole", "chunks"])
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_computes_the_definition(
    monkeypatch: pytest.MonkeyPatch, adapter: str, groups: int, whole_segments: bool, padding: int
) -> None:
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    shape = replace(SHAPE, num_query_groups=groups, whole_segments=whole_segments)
    errors = attention_errors(ADAPTERS[adapter](shape), problem_of(shape, padding), torch.float64)
    assert max(errors.values()) < 1e-12, errors


def wrong_scale(shape: AttentionShape) -> AttentionKernel:
    return sdpa(replace(shape, softmax_scale=1.1 * shape.softmax_scale))


def aligned_at_the_first_key(shape: AttentionShape) -> AttentionKernel:
    def first_keys(query: Any, key: Any, value: Any, segments: Segments) -> torch.Tensor:
        starts = [0, *torch.tensor(segments.key_lengths).cumsum(0).tolist()]
        places = torch.cat(
            [torch.arange(start, start + n) for start, n in zip(starts, segments.query_lengths, strict=False)]
        )
        same = segments_of(segments.query_lengths, segments.query_lengths, len(query))
        return sdpa(shape)(query, key[places], value[places], same)

    return first_keys


def without_padding(shape: AttentionShape) -> AttentionKernel:
    """A kernel that is not told of the padding leaves it unwritten."""

    def attend(query: Any, key: Any, value: Any, segments: Segments) -> torch.Tensor:
        real = len(segments.query_lengths) + 1
        cu_seqlens = {"cu_seqlens_q": segments.cu_seqlens_q[:real], "cu_seqlens_k": segments.cu_seqlens_k[:real]}
        return flash_varlen(flash_attn_varlen_func, shape)(query, key, value, replace(segments, **cu_seqlens))

    return attend


@pytest.mark.parametrize("wrong", [wrong_scale, aligned_at_the_first_key, without_padding])
def test_the_check_sees_what_is_wrong(wrong: Callable[[AttentionShape], AttentionKernel]) -> None:
    shape = replace(SHAPE, whole_segments=False)
    errors = attention_errors(wrong(shape), problem_of(shape, 60), torch.float64)
    assert max(errors.values()) > 0.01, errors


def test_padding_is_covered_in_short_segments() -> None:
    segments = segments_of([5, 300], [9, 300], 5 + 300 + 260)
    assert segments.cu_seqlens_q.tolist() == [0, 5, 305, 433, 561, 565]
    assert segments.cu_seqlens_k.tolist() == [0, 9, 309, 437, 565, 569]
    assert (segments.max_seqlen_q, segments.max_seqlen_k) == (300, 300)
    assert segments_of([5], [5], 70).max_seqlen_q == 65


@pytest.mark.parametrize("groups", [2, 6])
def test_torchs_own_kernel_takes_the_arguments(groups: int) -> None:
    """Shapes alone, forward and backward; the arithmetic is CUDA's."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.11 or newer")
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("needs torch 2.11 or newer")
    kernel = attention_kernel("torch_varlen", replace(SHAPE, num_query_groups=groups))
    segments = to_device(segments_of(LENGTHS, CHUNKS, 70), torch.device("meta"))
    query, key, value = (
        torch.empty(tokens, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for tokens, heads in ((70, 6), (sum(CHUNKS) + 8, groups), (sum(CHUNKS) + 8, groups))
    )
    output = kernel(query, key, value, segments)
    assert output.shape == query.shape
    output.backward(output)
    for x in (query, key, value):
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["sdpa", "torch_varlen"])
def test_no_layer_waits_for_the_device(backend: str) -> None:
    """On the device "meta" nothing can be read back."""
    if backend == "torch_varlen":
        pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.11 or newer")
    from megatron.core.transformer import TransformerConfig

    from reflectron.engine.model.attention import PackedCausalAttention, PackedRows
    from reflectron.engine.model.rope import rotary_tables

    meta, alone = torch.device("meta"), SimpleNamespace(size=lambda: 1)
    config = TransformerConfig(num_layers=1, hidden_size=96, num_attention_heads=6, num_query_groups=2, kv_channels=16)
    groups: Any = SimpleNamespace(tp=alone, cp=alone)
    attention = PackedCausalAttention(config, 1, None, "self", 0.25, groups, backend)
    positions = torch.empty(70, dtype=torch.int64, device=meta)
    rows = PackedRows(
        segments=to_device(segments_of(LENGTHS, LENGTHS, 70), meta),
        position_ids=positions,
        rotary=rotary_tables(positions, torch.empty(8, device=meta), torch.bfloat16),
    )
    query, key, value = (
        torch.empty(70, 1, heads, 16, dtype=torch.bfloat16, device=meta, requires_grad=True) for heads in (6, 2, 2)
    )
    output = attention(query, key, value, None, packed_seq_params=rows)
    assert output.shape == (70, 1, 96)
    output.backward(output)
    assert query.grad is not None
