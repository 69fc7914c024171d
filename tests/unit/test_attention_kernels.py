"""Attention back ends on packed rows: every adapter with a plain kernel of its interface, and real ones where they run.

No kernel for CUDA runs on the CPU. Their adapters do here, around a function that has the kernel's signature, computes
the definition from the cumulative lengths alone, and leaves what they do not cover unwritten, as those kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from reflectron.engine.data.microbatch import Segments, segments_of
from reflectron.engine.model.attention_check import AttentionProblem, attention_errors, attention_problem
from reflectron.engine.model.attention_kernels import (
    AttentionKernel,
    AttentionShape,
    flash_varlen,
    sdpa,
    torch_varlen,
    transformer_engine,
)

SHAPE = AttentionShape(num_attention_heads=6, num_query_groups=2, head_dim=16, softmax_scale=0.3, whole_segments=True)
LENGTHS = (1, 3, 40, 1, 17)
# Chunks of segments whose earlier tokens other ranks hold, and whole ones.
CHUNKS = (1, 29, 43, 2, 17)
CPU = torch.device("cpu")


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> torch.Tensor:
    """Causal, aligned at the last key."""
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.diff().max() == longest, "kernels compute no query or key beyond it"
    bounds = [(*q, *k) for q, k in zip(pairs(cu_seqlens_q), pairs(cu_seqlens_k), strict=True)]
    output = torch.full_like(query, torch.nan)
    group = query.shape[1] // key.shape[1]
    for q_start, q_end, k_start, k_end in bounds:
        k, v = (x[k_start:k_end].repeat_interleave(group, dim=1) for x in (key, value))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", query[q_start:q_end], k)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        output[q_start:q_end] = torch.einsum("hqk,khd->qhd", probabilities, v)
    return output


def pairs(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    return list(pairwise(cu_seqlens.tolist()))


def flash_attn_varlen_func(q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, **lengths: Any) -> Any:
    """flash-attn 2 and 3; the caller names all but the tensors, for version 4 has another order."""
    assert causal
    return plain_varlen(q, k, v, **lengths, softmax_scale=softmax_scale)


def flash_attn_varlen_func_with_logsumexp(*args: Any, **kwargs: Any) -> Any:
    """flash-attn 4."""
    return flash_attn_varlen_func(*args, **kwargs), torch.empty(0)


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
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_attn_of_torch_2_11(*args: Any, scale: float, window_size: tuple[int, int] = (-1, -1)) -> Any:
    return varlen_attn(*args, scale=scale, window_size=window_size, enable_gqa=args[0].shape[1] != args[1].shape[1])


class DotProductAttention:
    """transformer-engine's, whose output has the heads in one dimension."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
        softmax_scale: float,
    ) -> None:
        assert (attention_dropout, qkv_format) == (0.0, "thd")
        self.heads, self.mask, self.scale = (num_attention_heads, num_gqa_groups), attn_mask_type, softmax_scale

    def __call__(self, query: Any, key: Any, value: Any, *, qkv_format: str, **lengths: Any) -> Any:
        assert qkv_format == "thd"
        assert (query.shape[1], key.shape[1]) == self.heads
        cu_seqlens_q, cu_seqlens_k = lengths["cu_seqlens_q"], lengths.pop("cu_seqlens_kv")
        # padding_causal alone aligns the mask at the first key.
        assert self.mask == "padding_causal_bottom_right" or (
            self.mask == "padding_causal" and torch.equal(cu_seqlens_q, cu_seqlens_k)
        )
        lengths |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": lengths.pop("max_seqlen_kv")}
        return plain_varlen(query, key, value, **lengths, softmax_scale=self.scale).flatten(1)


ADAPTERS: dict[str, Callable[[AttentionShape], AttentionKernel]] = {
    "sdpa": sdpa,
    "flash_attn": lambda shape: flash_varlen(flash_attn_varlen_func, shape),
    "flash_attn_4": lambda shape: flash_varlen(flash_attn_varlen_func_with_logsumexp, shape),
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
def test_every_adapter_computes_the_definition(adapter: str, groups: int, whole_segments: bool, padding: int) -> None:
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
