"""Norm, SwiGLU and rotation by Liger's Triton kernels, in the places where megatron-core has its own.

Each kernel reads its inputs and writes its outputs once, in the forward and in the backward, and keeps for the backward
no more than its inputs; plain torch makes a tensor of every intermediate and keeps most of them. On the CPU the kernels
run in Triton's interpreter (``TRITON_INTERPRET=1``), in float32: the interpreter multiplies the raw bits of bfloat16
(Triton 3.7).

T tokens of this rank, H hidden, F width of the gated MLP on this rank, h heads, g key-value heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.ops import rms_norm as kernels_of_norm
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from megatron.core.transformer.attention import SelfAttention
from triton import knobs, language

from reflectron.engine.model.norm import RMSNorm

if knobs.runtime.interpret:
    # The kernel takes it from libdevice, a library for GPUs. Looked up in the call, when the interpreter has its own.
    kernels_of_norm.rsqrt = lambda x: language.math.rsqrt(x)


class LigerRMSNorm(RMSNorm):
    """``RMSNorm`` in one kernel: the same parameter, and the same roundings as in transformers' Llama.

    It keeps its input and a float32 a row. The gradient of the output is overwritten with that of the input: a norm is
    followed by a linear layer or the loss, which make a tensor for it that nothing else reads.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shape and type of ``x``."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide ``x`` [..., H] by its root mean square and multiply it by ``weight`` [H]."""
    return LigerRMSNormFunction.apply(x, weight, _scalar(eps), _scalar(0.0), "llama", True)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Multiply the SiLU of the first half by the second: [T, 1, 2 F] -> [T, 1, F].

    The halves are read where they lie, and so are their gradients written; keeps ``gate_and_up`` and nothing else.
    """
    return LigerFusedGateUpSiLUMulFunction.apply(gate_and_up.squeeze(1)).unsqueeze(1)


class LigerSelfAttention(SelfAttention):
    """``SelfAttention`` that rotates queries and keys in one kernel, before they reach the core attention.

    It takes ``cosines_and_sines`` as ``rotary_pos_emb``; all layers share it, and it is all that the rotation keeps.
    """

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> Any:
        """Attend as ``SelfAttention.forward`` does, without its own rotation."""
        self._cos_sin = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return query and key, rotated, and the value; megatron-core rotates right after this call (0.16.1)."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return *rotate(query, key, self._cos_sin), value


def rotate(query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys token by token, computed in float32.

    Where ``query`` or ``key`` is contiguous it is overwritten: no operation before it keeps its result.

    Args:
        query: [T, 1, h, D].
        key: [T, 1, g, D].
        cos_sin: [2, T, D / 2] float32, of each token's own position.

    Returns:
        Both rotated, in their shapes.
    """
    heads_first = (query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3))
    rotated = LigerRopeFunction.apply(*heads_first, cos_sin[0], cos_sin[1], None, 1, query.shape[-1])
    return rotated[0].permute(2, 0, 1, 3), rotated[1].permute(2, 0, 1, 3)


def _scalar(value: float) -> Any:
    """Wrap a number as a kernel's argument: the interpreter does not make it the scalar that Liger's kernels expect."""
    if not knobs.runtime.interpret:
        return value
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    return language.tensor(TensorHandle(np.array([value], dtype=np.float32), language.float32), language.float32)
