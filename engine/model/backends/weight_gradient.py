"""Weight gradients of megatron-core's linear layers, added to their float32 sum by the matrix product that makes them.

Otherwise each product is written in the model's type, read again and added to ``main_grad``: half as much memory
traffic again, and a rounding in between. With ``gradient_accumulation_fusion`` megatron-core calls a compiled extension
of Apex's for it, by a global name (0.16.1); torch's ``addmm`` does the same and takes its place here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from typing_extensions import assert_never

from reflectron.engine.config import WeightGradientBackend
from reflectron.kernels.products import add_product, as_factor, without_autocast


class AddmmExtension:
    """The part that megatron-core uses of ``fused_weight_gradient_mlp_cuda`` where ``main_grad`` is float32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """Add grad_output^T inputs to ``main_grad``, summed in float32: [out, in] += [tokens, out]^T [tokens, in]."""
        # Autocast would round the factors, and the sum with them.
        with without_autocast(main_grad.device):
            add_product(main_grad, as_factor(grad_output).t(), as_factor(inputs))


def gradient_extension(backend: WeightGradientBackend) -> Any | None:
    """Return the extension that ``backend`` names; None for ``torch``, which adds afterwards."""
    match backend:
        case "torch":
            return None
        case "addmm":
            return AddmmExtension
        case "apex":
            import fused_weight_gradient_mlp_cuda

            return fused_weight_gradient_mlp_cuda
    assert_never(backend)


def use_weight_gradient(backend: WeightGradientBackend) -> None:
    """Have megatron-core call the extension of ``backend``, if it has one."""
    extension = gradient_extension(backend)
    if extension is not None:
        layers.fused_weight_gradient_mlp_cuda = extension
        layers._grad_accum_fusion_available = True
