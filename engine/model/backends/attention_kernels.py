"""Causal attention over packed rows, one function of queries, keys, values and segments for each backend.

Every kernel gives each query the keys of its own segment up to itself; where a segment has more keys than queries, the
last query meets the last key. Those for CUDA take all segments in one call and compute the padding as segments of its
own; scaled dot product takes a call for each segment and leaves the padding 0. No layer waits for the device or makes
lengths of its own.

T queries, S keys, h heads, g key-value heads, d width of a head.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import assert_never

from reflectron.engine.config import AttentionBackend
from reflectron.engine.data.microbatch import Segments

# (query [T, h, d], key [S, g, d], value [S, g, d], segments) -> [T, h, d]
AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes that a kernel is made for; heads are those of a tensor-parallel rank."""

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    softmax_scale: float
    whole_segments: bool
    """Whether queries and keys of a segment are the same tokens, as without context parallelism."""


def attention_kernel(backend: AttentionBackend, shape: AttentionShape) -> AttentionKernel:
    """Return the kernel of ``backend``.

    Raises:
        ImportError: when its package is missing.
    """
    if backend == "transformer_engine":
        from transformer_engine.pytorch import DotProductAttention

        # Its plain fallback keeps the scores of every segment, padded to the longest.
        os.environ["NVTE_UNFUSED_ATTN"] = "0"
        return transformer_engine(DotProductAttention, shape)
    if backend == "flash_attention_4":
        from flash_attn.cute import flash_attn_varlen_func as flash_attention_4

        return flash_varlen(flash_attention_4, shape)
    if backend == "flash_attention_3":
        from flash_attn_interface import flash_attn_varlen_func as flash_attention_3

        return flash_varlen(flash_attention_3, shape)
    if backend == "flash_attention_2":
        from flash_attn import flash_attn_varlen_func as flash_attention_2

        return flash_varlen(flash_attention_2, shape)
    if backend == "torch_varlen":
        from torch.nn.attention.varlen import varlen_attn

        return torch_varlen(varlen_attn, shape)
    if backend == "sdpa":
        return sdpa(shape)
    assert_never(backend)


def sdpa(shape: AttentionShape) -> AttentionKernel:
    """Return torch's scaled dot product, one call for each segment."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        lengths, key_lengths = segments.query_lengths, segments.key_lengths
        attended = [
            scaled_dot_product_attention(
                q,
                k,
                v,
                None if shape.whole_segments else _ends_aligned(q.shape[2], k.shape[2]),
                is_causal=shape.whole_segments,
                scale=shape.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            for q, k, v in zip(
                _by_segment(query, lengths), _by_segment(key, key_lengths), _by_segment(value, key_lengths), strict=True
            )
        ]
        attended.append(query.new_zeros(1, query.shape[1], query.shape[0] - sum(lengths), query.shape[2]))
        return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)

    return attend


def _ends_aligned(queries: int, keys: int) -> torch.Tensor:
    """Return the causal mask of a segment's last queries, which kernels for the CPU alone write out."""
    # Brings torch's compiler along, which is a tenth of the start of a rank.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(queries, keys)


def _by_segment(x: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Split [tokens, heads, d] into [1, heads, length, d] for each length, without the padding behind them."""
    heads_first = x.transpose(0, 1).unsqueeze(0)
    return heads_first.split([*lengths, x.shape[0] - sum(lengths)], dim=2)[: len(lengths)]


def flash_varlen(function: Callable[..., Any], shape: AttentionShape) -> AttentionKernel:
    """Adapt ``flash_attn_varlen_func`` of flash-attn 2 (from 2.1, which aligns the mask at the last key), 3 and 4."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        result = function(
            query,
            key,
            value,
            cu_seqlens_q=segments.cu_seqlens_q,
            cu_seqlens_k=segments.cu_seqlens_k,
            max_seqlen_q=segments.max_seqlen_q,
            max_seqlen_k=segments.max_seqlen_k,
            softmax_scale=shape.softmax_scale,
            causal=True,
        )
        # Version 4 and early builds of 3 return the logsumexp as well.
        attended: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return attended

    return attend


def torch_varlen(function: Callable[..., Any], shape: AttentionShape) -> AttentionKernel:
    """Adapt ``torch.nn.attention.varlen.varlen_attn`` (torch 2.11 and newer), causal by a window of (-1, 0)."""
    options: dict[str, Any] = {"scale": shape.softmax_scale, "window_size": (-1, 0)}
    # torch 2.11 has no such switch and takes grouped queries without.
    if "enable_gqa" in inspect.signature(function).parameters:
        options["enable_gqa"] = shape.num_query_groups != shape.num_attention_heads

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        attended: torch.Tensor = function(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_k,
            segments.max_seqlen_q,
            segments.max_seqlen_k,
            **options,
        )
        return attended

    return attend


def transformer_engine(module_class: Callable[..., Any], shape: AttentionShape) -> AttentionKernel:
    """Adapt transformer-engine's ``DotProductAttention``, which takes cuDNN's or flash-attn's kernels as fits."""
    # Held by the closure alone: as a submodule it would add an entry to every checkpoint (its _extra_state).
    module = module_class(
        shape.num_attention_heads,
        shape.head_dim,
        num_gqa_groups=shape.num_query_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        # Aligned at the last key; for whole segments both are the same, and more kernels do the first.
        attn_mask_type="padding_causal" if shape.whole_segments else "padding_causal_bottom_right",
        softmax_scale=shape.softmax_scale,
    )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
        attended: torch.Tensor = module(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=segments.cu_seqlens_q,
            cu_seqlens_kv=segments.cu_seqlens_k,
            # cuDNN makes a plan for each bound that it has not met before, and computes no more for a larger one.
            max_seqlen_q=_power_of_two(segments.max_seqlen_q),
            max_seqlen_kv=_power_of_two(segments.max_seqlen_k),
        )
        return attended.view(query.shape)

    return attend


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
