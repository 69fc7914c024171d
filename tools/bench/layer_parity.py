"""Parity of norms, SwiGLU, rotation, weight gradients and AdamW: rows like those of ``parity``, on small odd shapes.

T tokens, H hidden, F width of the gated MLP, h heads, g key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from reflectron.engine.config import BackendsConfig, Config, ModelConfig
from reflectron.engine.model.backends.choose import CANDIDATES, Backends, Use
from reflectron.engine.parallel.cpu_backend import redirect_cuda_to_cpu
from reflectron.tools.bench.parity import compared

_TOKENS, _HIDDEN, _EPS = 37, 96, 1e-5

Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class LayerProblem:
    """What is right, in float64, and how each back end computes it."""

    expected: Outcome
    """By name, results and gradients."""
    solve: Callable[[str], Outcome]
    """Name of a back end -> the same of its."""


def layer_parity(
    device: torch.device, dtype: str, cases: Iterable[str] | None = None, backends: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of the back ends of ``backends.layers``, ``weight_gradient`` and ``adamw`` on ``LAYER_CASES``.

    Args:
        device: what computes.
        dtype: of inputs and parameters; AdamW's are float32 in either case.
        cases: some of ``LAYER_CASES``; all when None.
        backends: some of the candidates; all when None.

    Returns:
        Of each pair a row for every result; a single one with ``reason`` where the back end cannot be used.
    """
    if device.type == "cpu" and not torch.cuda.is_available():
        redirect_cuda_to_cpu()
    rows = []
    for case in LAYER_CASES if cases is None else cases:
        part, _ = LAYER_CASES[case]
        for backend in CANDIDATES[part]:
            if backends is None or backend in backends:
                rows += _rows(case, backend, device, dtype)
    return rows


def _rows(case: str, backend: str, device: torch.device, dtype: str) -> list[dict[str, Any]]:
    part, make_problem = LAYER_CASES[case]
    asked: dict[str, Any] = {part: backend}
    config = Config(
        model=ModelConfig(dtype="float32" if dtype == "float32" else "bfloat16"),
        backends=BackendsConfig(**asked),
    )
    row = {"part": part, "case": case, "backend": backend, "dtype": dtype}
    if reason := CANDIDATES[part][backend](Use(config, None, device)):
        return [row | {"reason": reason}]
    problem = make_problem(getattr(torch, dtype), device)
    plain, found = (_errors(problem.solve(name), problem.expected) for name in ("torch", backend))
    return compared(row, found, plain, is_plain=backend == "torch")


def _errors(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative L2 error of each tensor; NaN fails every limit."""
    return {name: float((found[name].double() - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}


def _random(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def _with_gradients(
    compute: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor], *output_gradients: Tensor
) -> Outcome:
    """Outputs of ``compute(*inputs)`` and the gradients of ``inputs`` under theirs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.values()]
    # As in a model, where what comes in is the result of something and may be overwritten.
    outputs = compute(*(leaf * 1 for leaf in leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    kept = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
    torch.autograd.backward(outputs, [gradient.to(outputs[0].dtype).clone() for gradient in output_gradients])
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in zip(inputs, leaves, strict=True)}
    return kept | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in inputs.items()}


def _config(dtype: torch.dtype) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=_HIDDEN,
        num_attention_heads=6,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        use_te_activation_func=True,
        add_bias_linear=False,
        params_dtype=dtype,
    )


def _norm(dtype: torch.dtype, device: torch.device) -> LayerProblem:
    """[T, 1, H]."""
    from reflectron.engine.model.spec import layer_parts

    inputs = {
        "input": _random(0, _TOKENS, 1, _HIDDEN, dtype=dtype, device=device),
        "weight": _random(1, _HIDDEN, dtype=dtype, device=device),
    }
    gradient = _random(2, _TOKENS, 1, _HIDDEN, dtype=dtype, device=device)

    def define(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)

    def solve(backend: str) -> Outcome:
        norm = layer_parts(Backends(layers=backend)).norm(config=_config(dtype), hidden_size=_HIDDEN, eps=_EPS)
        with torch.no_grad():
            norm.weight.copy_(inputs["weight"])
        outcome = _with_gradients(norm, {"input": inputs["input"]}, gradient)
        return outcome | {"gradient of weight": norm.weight.grad}

    return LayerProblem(_with_gradients(define, _in_float64(inputs), gradient), solve)


def _swiglu(dtype: torch.dtype, device: torch.device) -> LayerProblem:
    """[T, 1, 2 F] -> [T, 1, F]."""
    from megatron.core.transformer.spec_utils import build_module

    from reflectron.engine.model.spec import layer_parts

    inputs = {"gate and up": _random(0, _TOKENS, 1, 2 * _HIDDEN, dtype=dtype, device=device)}
    gradient = _random(1, _TOKENS, 1, _HIDDEN, dtype=dtype, device=device)

    def define(gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        return silu(gate) * up

    def solve(backend: str) -> Outcome:
        activation = layer_parts(Backends(layers=backend)).activation
        compute = define if activation is None else build_module(activation, config=_config(dtype))
        return _with_gradients(compute, inputs, gradient)

    return LayerProblem(_with_gradients(define, _in_float64(inputs), gradient), solve)


def _rotation(dtype: torch.dtype, device: torch.device) -> LayerProblem:
    """Grouped heads [T, 1, h, D] and [T, 1, g, D], positions with gaps and angles of hundreds of turns."""
    from reflectron.engine.model.rope import cosines_and_sines, rotary_angles, rotary_tables, rotate

    heads, groups, width = 6, 2, 32
    inputs = {
        "query": _random(0, _TOKENS, 1, heads, width, dtype=dtype, device=device),
        "key": _random(1, _TOKENS, 1, groups, width, dtype=dtype, device=device),
    }
    gradients = [_random(2 + index, *x.shape, dtype=dtype, device=device) for index, x in enumerate(inputs.values())]
    positions = torch.arange(_TOKENS, device=device) * 101
    frequencies = (10000.0 ** -(torch.arange(0, width, 2) / width)).to(device)

    def by_tables(cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        return lambda *qk: tuple(rotate(x.squeeze(1), cos, sin).unsqueeze(1) for x in qk)

    # Angles are float32 by definition, as in transformers.
    angles = rotary_angles(positions, frequencies)[:, 0].double()

    def solve(backend: str) -> Outcome:
        if backend == "liger":
            from reflectron.engine.model.backends import liger

            table = cosines_and_sines(positions, frequencies)
            return _with_gradients(lambda q, k: liger.rotate(q, k, table), inputs, *gradients)
        if backend == "transformer_engine":
            from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

            of_tokens = rotary_angles(positions, frequencies)
            fused = lambda *qk: tuple(fused_apply_rotary_pos_emb(x, of_tokens) for x in qk)  # noqa: E731
            return _with_gradients(fused, inputs, *gradients)
        return _with_gradients(by_tables(*rotary_tables(positions, frequencies, dtype)), inputs, *gradients)

    expected = _with_gradients(by_tables(angles.cos(), angles.sin()), _in_float64(inputs), *gradients)
    return LayerProblem(expected, solve)


def _weight_gradient(dtype: torch.dtype, device: torch.device) -> LayerProblem:
    """A float32 sum [F, H] and one more product [T, F]^T [T, H]."""
    total = _random(0, 2 * _HIDDEN, _HIDDEN, dtype=torch.float32, device=device)
    inputs = _random(1, 64, _HIDDEN, dtype=dtype, device=device)
    gradient = _random(2, 64, 2 * _HIDDEN, dtype=dtype, device=device)

    def solve(backend: str) -> Outcome:
        main_grad = total.clone()
        if backend == "torch":
            main_grad.add_(gradient.t().matmul(inputs))
        elif backend == "addmm":
            from reflectron.engine.model.backends.weight_gradient import AddmmExtension

            AddmmExtension.wgrad_gemm_accum_fp32(inputs, gradient, main_grad)
        else:
            import fused_weight_gradient_mlp_cuda

            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, gradient, main_grad)
        return {"sum": main_grad}

    return LayerProblem({"sum": total.double() + gradient.double().t() @ inputs.double()}, solve)


def _update(dtype: torch.dtype, device: torch.device) -> LayerProblem:
    """Three updates of float32 parameters [H, H + 1]."""
    shape = (_HIDDEN, _HIDDEN + 1)
    constants: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def updated(make: Callable[..., torch.optim.Optimizer], kind: torch.dtype, **keys: Any) -> Outcome:
        parameter = torch.nn.Parameter(_random(0, *shape, dtype=kind, device=device))
        optimizer = make([parameter], **constants, **keys)
        for step in range(3):
            parameter.grad = _random(step + 1, *shape, dtype=kind, device=device)
            optimizer.step()
        state = optimizer.state[parameter]
        return {"parameter": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def solve(backend: str) -> Outcome:
        if backend == "transformer_engine":
            from transformer_engine.pytorch.optimizers import FusedAdam

            return updated(FusedAdam, torch.float32)
        if backend == "apex":
            from apex.optimizers import FusedAdam

            return updated(FusedAdam, torch.float32)
        return updated(torch.optim.AdamW, torch.float32, fused=backend == "torch_fused")

    return LayerProblem(updated(torch.optim.AdamW, torch.float64), solve)


# What is compared, the part of the configuration that chooses it, and the comparison.
LAYER_CASES: dict[str, tuple[str, Callable[[torch.dtype, torch.device], LayerProblem]]] = {
    "norm": ("layers", _norm),
    "swiglu": ("layers", _swiglu),
    "rotation": ("layers", _rotation),
    "weight gradient": ("weight_gradient", _weight_gradient),
    "update": ("adamw", _update),
}
