"""A plain-torch kernel for packed rows with the interface of flash-attn's, to run on the CPU what calls those for CUDA.

It stands in for the module ``flash_attn``. Like that one it knows segments by their cumulative lengths alone, aligns
the causal mask at the last key, and leaves what they do not cover unwritten.
"""

from __future__ import annotations

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
