"""Causal attention over packed rows: every segment attends to itself only.

A pack is one row of T tokens; ``PackedRows`` says where its segments (teacher and student views) lie and which position
each token has in its original sequence. The core attention rotates queries and keys by these positions, and hands them
to the kernel of the chosen backend. A context-parallel rank has a share of the tokens: it gathers the keys and values
of all and computes the rows of its own queries only.

T tokens of a pack, C context-parallel ranks, h heads, g key-value heads, d width of a head; h and g are local to a
tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from reflectron.engine.config import AttentionBackend
from reflectron.engine.data.microbatch import Segments
from reflectron.engine.model.backends.attention_kernels import AttentionShape, attention_kernel
from reflectron.engine.model.rope import rotate


@dataclass
class PackedRows(PackedSeqParams):
    """Where the segments of a pack lie, in the form that megatron-core hands to every layer.

    ``qkv_format`` is ``sbhd``: the core attention gets [T / C, 1, heads, d] and lays them out for its kernel itself.
    """

    qkv_format: str = "sbhd"
    segments: Segments | None = None
    """Segments of this rank's tokens, on the device."""
    position_ids: torch.Tensor | None = None
    """[T / C] int64 on the device."""
    key_index: torch.Tensor | None = None
    """With context parallelism, where each key lies among the tokens of all ranks."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and sines by which the core attention rotates; None where that has been done before."""


class PackedCausalAttention(torch.nn.Module):
    """The core attention of a layer; it takes megatron-core's core-attention arguments and the name of a backend.

    It rotates queries and keys itself, so that ``recompute_modules: [core_attn]`` makes the rotated ones again, too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float,
        pg_collection: ProcessGroupCollection,
        backend: AttentionBackend,
        **_: Any,
    ) -> None:
        super().__init__()
        self.context_group = pg_collection.cp
        assert config.kv_channels is not None
        assert config.num_query_groups is not None
        shape = AttentionShape(
            num_attention_heads=config.num_attention_heads // pg_collection.tp.size(),
            num_query_groups=config.num_query_groups // pg_collection.tp.size(),
            head_dim=config.kv_channels,
            softmax_scale=softmax_scale,
            whole_segments=self.context_group.size() == 1,
        )
        self.attend = attention_kernel(backend, shape)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> torch.Tensor:
        """Attend: ``query`` [T / C, 1, h, d], ``key`` and ``value`` [T / C, 1, g, d] -> [T / C, 1, h * d]."""
        rows = packed_seq_params
        assert rows is not None, "every forward needs the segments of its pack"
        assert rows.segments is not None
        assert (rows.key_index is None) == (self.context_group.size() == 1), "context-parallel ranks share every pack"
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if rows.rotary is not None:
            query, key = rotate(query, *rows.rotary), rotate(key, *rows.rotary)
        if rows.key_index is not None:
            key, value = self._gather(key, value, rows.key_index)
        return self.attend(query, key, value, rows.segments).reshape(query.shape[0], 1, -1)

    def _gather(
        self, key: torch.Tensor, value: torch.Tensor, key_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values of all ranks' tokens, chunk by chunk: [len(key_index), g, d] each."""
        mine = torch.cat((key, value), dim=-1)
        everyones = gather_from_sequence_parallel_region(mine, group=self.context_group)
        # A token's keys serve two chunks at most, so that its gradient is the same whichever is added first.
        gathered = everyones.index_select(0, key_index)
        return gathered[..., : key.shape[-1]], gathered[..., key.shape[-1] :]
