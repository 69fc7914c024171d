"""Whether an attention kernel computes what it should: its errors on random packed rows, against float64.

The start of a run compares a kernel for CUDA with torch's scaled dot product on a few hundred tokens, so that one that
is wrong on this machine, or does not run at all, is never trained with.

Whether fused layers compute what plain ones do: tried at the start of a run, with the model's sizes.

Kernels that are compiled at their first call need a compiler, and extensions the torch that they were built for; a
machine shows only in a call whether it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from reflectron.engine.data.microbatch import Segments, segments_of, to_device
from reflectron.engine.model.backends.attention_kernels import AttentionKernel, AttentionShape, attention_kernel, sdpa
from reflectron.engine.model.rope import cosines_and_sines, rotary_tables, rotate
from reflectron.engine.text import one_line

# Segments of the check at the start: one token, a part of a tile, a tile and a bit; behind them padding.
_LENGTHS, _PADDING = (1, 5, 130, 64), 40
# A wrong mask or scale is wrong by a large share of the values, rounding is not.
_MOST_OF_SDPA = 3.0


@dataclass(frozen=True)
class AttentionProblem:
    """Packed rows, the gradient of their output, and what is right: all in float64 on a device."""

    shape: AttentionShape
    segments: Segments
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """query [T, h, d], key [S, g, d], value [S, g, d]; representable in the type that is tested."""
    output_gradient: torch.Tensor
    """[T, h, d], 0 on padding, as in training."""
    expected: dict[str, torch.Tensor]
    """Output and the gradients of the inputs."""


def attention_problem(
    shape: AttentionShape,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    padding: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionProblem:
    """Random values, the same on every call."""
    segments = segments_of(query_lengths, key_lengths, sum(query_lengths) + padding)
    queries, keys = sum(query_lengths) + padding, sum(key_lengths) + padding
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, heads: int) -> torch.Tensor:
        values = torch.randn(tokens, heads, shape.head_dim, generator=generator, dtype=torch.float32)
        return values.to(dtype).double().to(device)

    heads, groups = shape.num_attention_heads, shape.num_query_groups
    inputs = (random(queries, heads), random(keys, groups), random(keys, groups))
    output_gradient = random(queries, heads)
    output_gradient[sum(query_lengths) :] = 0
    found = _attention_outcome(lambda q, k, v, s: plain_attention(q, k, v, s, shape), inputs, output_gradient, segments)
    return AttentionProblem(shape, to_device(segments, device), inputs, output_gradient, found)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, shape: AttentionShape
) -> torch.Tensor:
    """The definition, segment by segment: [T, h, d], 0 on padding."""
    group = shape.num_attention_heads // shape.num_query_groups
    output, query_start, key_start = torch.zeros_like(query), 0, 0
    for length, keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        q = query[query_start : query_start + length].transpose(0, 1)
        k, v = (x[key_start : key_start + keys].repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
        future = torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(keys - length + 1)
        scores = (shape.softmax_scale * q @ k.transpose(1, 2)).masked_fill(future, -torch.inf)
        output[query_start : query_start + length] = (scores.softmax(-1) @ v).transpose(0, 1)
        query_start, key_start = query_start + length, key_start + keys
    return output


def attention_errors(kernel: AttentionKernel, problem: AttentionProblem, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error of the output, padding aside, and of each gradient in ``dtype``.

    Infinite where any of it is not finite, padding included: weight gradients would meet it.
    """
    inputs = (problem.inputs[0].to(dtype), problem.inputs[1].to(dtype), problem.inputs[2].to(dtype))
    found = _attention_outcome(kernel, inputs, problem.output_gradient.to(dtype), problem.segments)
    errors = {}
    for name, expected in problem.expected.items():
        # What the output of padding is does not matter; no gradient comes from there.
        real = sum(problem.segments.query_lengths) if name == "output" else len(expected)
        error = (found[name][:real].double() - expected[:real]).norm() / expected[:real].norm()
        errors[name] = error.item() if torch.isfinite(found[name]).all() else float("inf")
    return errors


def _attention_outcome(
    kernel: AttentionKernel,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output_gradient: torch.Tensor,
    segments: Segments,
) -> dict[str, torch.Tensor]:
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    output = kernel(query, key, value, segments)
    gradients = torch.autograd.grad(output, (query, key, value), output_gradient)
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def attention_disagreement(backend: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence why ``backend`` cannot be trusted with ``shape`` on this machine, or None."""
    # With context parallelism queries have more keys than they are.
    key_lengths = _LENGTHS if shape.whole_segments else [2 * length + 3 for length in _LENGTHS]
    problem = attention_problem(shape, _LENGTHS, key_lengths, _PADDING, dtype, device)
    plain = attention_errors(sdpa(shape), problem, dtype)
    try:
        errors = attention_errors(attention_kernel(backend, shape), problem, dtype)
    except Exception as failure:  # whatever a kernel that does not know this machine raises
        return f"fails: {one_line(failure)}"
    for name, error in errors.items():
        if not error <= _MOST_OF_SDPA * plain[name]:
            what = "output" if name == "output" else f"gradient of the {name}"
            return f"computes another {what} than sdpa: relative error {error:.1e}, sdpa's {plain[name]:.1e}"
    return None


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
        from reflectron.engine.model.backends import liger

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
