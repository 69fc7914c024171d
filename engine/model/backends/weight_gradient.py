"""Weight gradients of megatron-core's linear layers, added to their float32 sum by the matrix product that makes them.

Otherwise each product is written in the model's type, read again and added to ``main_grad``: half as much memory
traffic again, and a rounding in between. With ``gradient_accumulation_fusion`` megatron-core calls a compiled extension
of Apex's for it, by a global name (0.16.1); torch's ``addmm`` does the same and takes its place here.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import layers

from reflectron.kernels.products import add_product, as_factor, without_autocast


class AddmmExtension:
    """What megatron-core uses of ``fused_weight_gradient_mlp_cuda`` where ``main_grad`` is float32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """main_grad += grad_output^T inputs, summed in float32: [out, in] += [tokens, out]^T [tokens, in]."""
        # Autocast would round the factors, and the sum with them.
        with without_autocast(main_grad.device):
            add_product(main_grad, as_factor(grad_output).t(), as_factor(inputs))


def use_weight_gradient(name: str) -> None:
    """Have megatron-core call the extension that ``backends.weight_gradient`` names; ``torch`` calls none."""
    if name == "addmm":
        layers.fused_weight_gradient_mlp_cuda = AddmmExtension
        layers._grad_accum_fusion_available = True
    elif name == "apex":
        import fused_weight_gradient_mlp_cuda

        layers.fused_weight_gradient_mlp_cuda = fused_weight_gradient_mlp_cuda
