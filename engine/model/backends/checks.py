"""What a backend computes on random inputs, beside its definition in float64.

At the start of a run an attention kernel is held to the errors of torch's scaled dot product on a few hundred tokens,
fused layers to a share of the values at the model's sizes: a kernel that is compiled at its first call needs a
compiler, and an extension the torch that it was built for, so that only a call shows whether the machine has them.
``reflectron bench gpu`` compares all backends on the same problems, and more closely.

T queries, S keys, h heads, g key-value heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from typing_extensions import assert_never

from reflectron.engine.config import AttentionBackend, LayersBackend
from reflectron.engine.data.microbatch import Segments, segments_of, to_device
from reflectron.engine.files import one_line
from reflectron.engine.model.backends.attention_kernels import AttentionKernel, AttentionShape, attention_kernel, sdpa
from reflectron.engine.model.rope import rotary_angles

# ---- attention ----

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
    """Draw random values, the same on every call, and compute what is right."""
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
    """Attend by the definition, segment by segment: [T, h, d], 0 on padding."""
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
    """Return the relative L2 error of the output, padding aside, and of each gradient in ``dtype``.

    Infinite where any of it is not finite, padding included: weight gradients would meet it.
    """
    inputs = (problem.inputs[0].to(dtype), problem.inputs[1].to(dtype), problem.inputs[2].to(dtype))
    found = _attention_outcome(kernel, inputs, problem.output_gradient.to(dtype), problem.segments)
    errors = {}
    for name, expected in problem.expected.items():
        # What the output of padding is does not matter; no gradient comes from there.
        real = sum(problem.segments.query_lengths) if name == "output" else len(expected)
        error = relative_error(found[name][:real], expected[:real])
        errors[name] = error if torch.isfinite(found[name]).all() else math.inf
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


def attention_disagreement(
    backend: AttentionBackend, shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return one sentence why ``backend`` cannot be trusted with ``shape`` on this machine, or None."""
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


# ---- layers: megatron-core, and Triton with it, is imported where they are compared ----

# Roundings of bfloat16 are below a hundredth; what is wrong is wrong by a large share.
_MOST_OF_LAYERS = 0.05
_TOKENS = 37

Outcome = dict[str, Tensor]
"""By name, results and gradients."""


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Sizes of a layer on a tensor-parallel rank; the defaults are of no model in particular."""

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
    """Added to the mean square in the norms."""


@dataclass(frozen=True)
class BackendProblem:
    """What is right on random inputs, in float64, and what each backend makes of them."""

    expected: Outcome
    solve: Callable[[Any], Outcome]
    """Name of a backend -> the same of its."""

    def errors(self, backend: str) -> dict[str, float]:
        """Return the relative errors of what ``backend`` computes."""
        found = self.solve(backend)
        return {name: relative_error(found[name], truth) for name, truth in self.expected.items()}


ProblemMaker = Callable[[LayerSizes, torch.dtype, torch.device], BackendProblem]


def layers_disagreement(
    backend: LayersBackend, sizes: LayerSizes, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return one sentence why ``backend`` cannot be trusted on this machine, or None."""
    try:
        for name, make_problem in _checked_parts(backend).items():
            error = max(make_problem(sizes, dtype, device).errors(backend).values(), key=_nan_last)
            if not error <= _MOST_OF_LAYERS:
                return f"computes another {name} than torch: relative error {error:.1e}"
    except Exception as failure:  # whatever a kernel that does not know this machine raises
        return f"fails: {one_line(failure)}"
    return None


def _checked_parts(backend: LayersBackend) -> dict[str, ProblemMaker]:
    """Return what is compared at the start: transformer-engine's layers have their norms inside."""
    match backend:
        case "torch":
            return {}
        case "liger":
            return LAYER_PROBLEMS
        case "transformer_engine":
            return {"norm and linear layer": _norm_and_linear}
    assert_never(backend)


def _nan_last(error: float) -> float:
    return math.inf if math.isnan(error) else error


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the relative error in the Frobenius norm; NaN, where anything is, fails every limit."""
    return float((found.double() - truth).norm() / truth.norm())


def random_tensor(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the same normal numbers on every call, on any device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def with_gradients(
    compute: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], *output_gradients: Tensor
) -> Outcome:
    """Return outputs of ``compute(*inputs)`` and the gradients of ``inputs`` under theirs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.values()]
    # As in a model, whose inputs are results of other operations and may be overwritten.
    outputs = compute(*(leaf * 1 for leaf in leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype).clone() for gradient in output_gradients])
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in zip(inputs, leaves, strict=True)}
    return kept | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def _defined_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _norm(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Compare norms of [T, 1, H]."""
    from reflectron.engine.model.backends.layers import lone_norm

    inputs = {
        "input": random_tensor(0, _TOKENS, 1, sizes.hidden, dtype=dtype, device=device),
        "weight": random_tensor(1, sizes.hidden, dtype=dtype, device=device),
    }
    gradient = random_tensor(2, _TOKENS, 1, sizes.hidden, dtype=dtype, device=device)

    def solve(backend: LayersBackend) -> Outcome:
        norm: Any = lone_norm(backend, sizes.hidden, sizes.eps, dtype).to(device)
        with torch.no_grad():
            norm.weight.copy_(inputs["weight"])
        outcome = with_gradients(norm, {"input": inputs["input"]}, gradient)
        return outcome | {"gradient of weight": norm.weight.grad}

    truth = with_gradients(partial(_defined_norm, eps=sizes.eps), _in_float64(inputs), gradient)
    return BackendProblem(truth, solve)


def _norm_and_linear(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Compare transformer-engine's norm and linear layer in one, with the weights that it makes."""
    from transformer_engine.pytorch import LayerNormLinear

    layer = LayerNormLinear(
        sizes.hidden, sizes.ffn, eps=sizes.eps, bias=False, normalization="RMSNorm", params_dtype=dtype
    )
    inputs = {"input": random_tensor(0, _TOKENS, 1, sizes.hidden, dtype=dtype, device=device)}
    gradient = random_tensor(1, _TOKENS, 1, sizes.ffn, dtype=dtype, device=device)
    weight, norm_weight = (tensor.detach().double() for tensor in (layer.weight, layer.layer_norm_weight))
    truth = with_gradients(
        lambda x: linear(_defined_norm(x, norm_weight, sizes.eps), weight), _in_float64(inputs), gradient
    )
    return BackendProblem(truth, lambda _: with_gradients(layer, inputs, gradient))


def _swiglu(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Compare SwiGLU: [T, 1, 2 F] -> [T, 1, F]."""
    from reflectron.engine.model.backends.layers import lone_swiglu

    inputs = {"gate and up": random_tensor(0, _TOKENS, 1, 2 * sizes.ffn, dtype=dtype, device=device)}
    gradient = random_tensor(1, _TOKENS, 1, sizes.ffn, dtype=dtype, device=device)

    def define(gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return silu(gate) * up

    return BackendProblem(
        with_gradients(define, _in_float64(inputs), gradient),
        lambda backend: with_gradients(lone_swiglu(backend, dtype), inputs, gradient),
    )


def _rotation(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Rotate grouped heads [T, 1, h, D] and [T, 1, g, D], at positions with gaps and angles of hundreds of turns."""
    from reflectron.engine.model.backends.layers import lone_rotation, rotated_by

    width = sizes.head_dim
    inputs = {
        "query": random_tensor(0, _TOKENS, 1, sizes.heads, width, dtype=dtype, device=device),
        "key": random_tensor(1, _TOKENS, 1, sizes.groups, width, dtype=dtype, device=device),
    }
    gradients = [random_tensor(2 + i, *x.shape, dtype=dtype, device=device) for i, x in enumerate(inputs.values())]
    positions = torch.arange(_TOKENS, device=device) * 101
    frequencies = (10000.0 ** -(torch.arange(0, width, 2) / width)).to(device)
    # Angles are float32 by definition, as in transformers.
    angles = rotary_angles(positions, frequencies)[:, 0].double()
    return BackendProblem(
        with_gradients(rotated_by(angles.cos(), angles.sin()), _in_float64(inputs), *gradients),
        lambda backend: with_gradients(lone_rotation(backend, positions, frequencies, dtype), inputs, *gradients),
    )


LAYER_PROBLEMS: dict[str, ProblemMaker] = {"norm": _norm, "SwiGLU": _swiglu, "rotation": _rotation}
"""The parts that every one of ``backends.layers`` has."""
