"""A plain-torch kernel for packed rows with the interface of flash-attn's, to run on the CPU what calls those for CUDA.

It stands in for the modules ``flash_attn`` and ``transformer_engine.pytorch``. Like them it knows segments by their
cumulative lengths alone, aligns the causal mask at the last key, and leaves what they do not cover unwritten.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    """[T, h, d], [S, g, d], [S, g, d] -> [T, h, d]; lengths by name, for flash-attn 4 has them in another order."""
    assert causal
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.diff().max() <= longest, "kernels compute no query or key beyond it"
    # A backward of its own would write no gradient there either.
    output = torch.full_like(q, torch.nan)
    group = q.shape[1] // k.shape[1]
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_end), (k_start, k_end) in bounds:
        keys, values = (x[k_start:k_end].repeat_interleave(group, dim=1) for x in (k, v))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[q_start:q_end], keys)
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        output[q_start:q_end] = torch.einsum("hqk,khd->qhd", probabilities, values)
    return output


def with_logsumexp(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As flash-attn 4 returns it."""
    return flash_attn_varlen_func(*args, **kwargs), torch.empty(0)


class DotProductAttention:
    """transformer-engine's (2.11), whose output has the heads in one dimension."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        softmax_scale: float | None = None,
    ) -> None:
        assert (attention_dropout, qkv_format) == (0.0, "thd")
        assert softmax_scale is not None
        self.heads, self.mask, self.scale = (num_attention_heads, num_gqa_groups), attn_mask_type, softmax_scale
        self.width = kv_channels

    def __call__(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: None = None,
        cu_seqlens_kv_padded: None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> torch.Tensor:
        assert qkv_format == "thd"
        assert (query_layer.shape[1], key_layer.shape[1]) == self.heads
        assert query_layer.shape[2] == value_layer.shape[2] == self.width
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert max_seqlen_q is not None
        assert max_seqlen_kv is not None
        # padding_causal alone aligns the mask at the first key.
        assert self.mask == "padding_causal_bottom_right" or (
            self.mask == "padding_causal" and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        )
        # Without the plain fallback, no kernel of its own takes more queries than keys.
        assert max_seqlen_q <= max_seqlen_kv
        assert os.environ["NVTE_UNFUSED_ATTN"] == "0"
        return flash_attn_varlen_func(
            query_layer,
            key_layer,
            value_layer,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_kv,
            softmax_scale=self.scale,
            causal=True,
        ).flatten(1)
