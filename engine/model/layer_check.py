"""Whether fused layers compute what plain ones do: tried at the start of a run, with the model's sizes.

Kernels that are compiled at their first call need a compiler, and extensions the torch that they were built for; a
machine shows only in a call whether it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from reflectron.engine.model.rope import cosines_and_sines, rotary_tables, rotate
from reflectron.engine.text import one_line

_TOKENS = 16
# Roundings of bfloat16 are below a hundredth; what is wrong is wrong by a large share.
_MOST = 0.05

Compute = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Of a layer on a tensor-parallel rank; the defaults are of no model in particular."""

    hidden: int = 128
    """Width of the residual stream."""
    ffn: int = 256
    """Width of the gated MLP."""
    heads: int = 4
    """Query heads."""
    groups: int = 2
    """Key heads."""
    head_dim: int = 32
    """Width of a head."""
    eps: float = 1e-5
    """Of the norms."""


def liger_disagreement(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence why Liger's kernels cannot be trusted on this machine, or None."""

    def check() -> str | None:
        from reflectron.engine.model import liger

        frequencies = 1 / torch.arange(1, sizes.head_dim // 2 + 1, device=device)
        positions = torch.arange(_TOKENS, device=device) * 7
        table = cosines_and_sines(positions, frequencies)
        cos_sin = rotary_tables(positions, frequencies, dtype)
        heads = [(_TOKENS, 1, count, sizes.head_dim) for count in (sizes.heads, sizes.groups)]
        cases: tuple[tuple[str, Compute, Compute, Sequence[tuple[int, ...]]], ...] = (
            (
                "norm",
                lambda x, weight: (liger.rms_norm(x, weight, sizes.eps),),
                lambda x, weight: (_rms_norm(x, weight, sizes.eps),),
                [(_TOKENS, 1, sizes.hidden), (sizes.hidden,)],
            ),
            ("SwiGLU", lambda x: (liger.swiglu(x),), _swiglu, [(_TOKENS, 1, 2 * sizes.ffn)]),
            (
                "rotation",
                lambda q, k: liger.rotate(q, k, table),
                lambda *qk: tuple(rotate(x.squeeze(1), *cos_sin).unsqueeze(1) for x in qk),
                heads,
            ),
        )
        reasons = (_difference(*case, dtype, device) for case in cases)
        return next((reason for reason in reasons if reason), None)

    return _run(check)


def transformer_engine_disagreement(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence why transformer-engine's linear layers cannot be trusted on this machine, or None."""

    def check() -> str | None:
        from transformer_engine.pytorch import LayerNormLinear

        layer = LayerNormLinear(
            sizes.hidden, sizes.ffn, eps=sizes.eps, bias=False, normalization="RMSNorm", params_dtype=dtype
        )
        weight, norm_weight = layer.weight, layer.layer_norm_weight
        return _difference(
            "norm and linear layer",
            lambda x: (layer(x),),
            lambda x: (linear(_rms_norm(x, norm_weight, sizes.eps), weight),),
            [(_TOKENS, 1, sizes.hidden)],
            dtype,
            device,
        )

    return _run(check)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _swiglu(gate_and_up: Tensor) -> tuple[Tensor, ...]:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return (silu(gate) * up,)


def _run(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as failure:  # whatever a kernel that does not know this machine raises
        return f"fails: {one_line(failure)}"


def _difference(
    name: str,
    fused: Compute,
    plain: Compute,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """How far outputs and gradients are apart, where that is too far."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]
    found, expected = _outcome(fused, inputs), _outcome(plain, inputs)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    # NaN, too, is not below it.
    return None if error <= _MOST else f"computes another {name} than torch: relative error {error:.1e}"


def _outcome(compute: Compute, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    # As in a model, where what comes in is the result of something and may be overwritten.
    outputs = compute(*(leaf * 1 for leaf in leaves))
    kept = [output.detach().float() for output in outputs]
    torch.autograd.backward(outputs, [output.detach().clone() for output in outputs])
    return kept + [leaf.grad.float() for leaf in leaves if leaf.grad is not None]
