"""Matrix products of the distillation head outside its kernels: bf16 factors summed in fp32 where cuBLAS offers it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off: it would round the factors of products that have to be exact. Meta tensors know none."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def as_factor(matrix: Tensor) -> Tensor:
    """Return the matrix in the type that ``product`` takes: bf16 where the device can sum it in fp32, else fp32 or
    fp64.

    fp16 goes to fp32 everywhere, because a gradient dz would fall below its range.
    """
    if matrix.dtype == torch.bfloat16 and matrix.is_cuda and torch.__version__ >= "2.8":
        return matrix  # out_dtype exists since torch 2.8, on CUDA only
    return matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two factors, summed in fp32 (fp64 for fp64)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def store_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write out = a b of two factors, summed in fp32 and rounded once."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add total += a b of two factors with an fp32 total (fp64 for fp64), without a second array of its size.

    Before torch 2.10 addmm refuses bf16 factors with an fp32 total (pytorch pull request 167931); an array it is then.
    """
    if a.dtype == torch.bfloat16 and torch.__version__ < "2.10":
        total.add_(product(a, b))
    elif a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)
