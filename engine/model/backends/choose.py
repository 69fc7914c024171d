"""The choice of what computes attention, layers, weight gradients and AdamW, by the configuration and the machine.

Each part has an ordered table of candidates, the best first and last the plain one that works everywhere. ``auto``
takes the first without a reason against it; a candidate that is asked for by name and has one ends the run before it
starts.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

from reflectron.engine.config import AdamwBackend, AttentionBackend, Config, LayersBackend, WeightGradientBackend
from reflectron.engine.files import installed_version, one_line
from reflectron.engine.model.architecture import Architecture, linear_layers
from reflectron.engine.model.backends.attention_kernels import AttentionShape
from reflectron.engine.model.backends.checks import (
    LayerSizes,
    attention_disagreement,
    layers_disagreement,
)
from reflectron.engine.model.rope import softmax_scale
from reflectron.engine.parallel.machine import TRANSFORMER_ENGINE


@dataclass(frozen=True)
class Use:
    """The run for which a backend is considered."""

    config: Config
    arch: Architecture | None
    """None where no model is known yet, whose sizes then raise no objection."""
    device: torch.device


# Returns one sentence why a backend cannot be used, or None.
Objection = Callable[[Use], str | None]


@dataclass(frozen=True, kw_only=True)
class Backends:
    """The implementations that compute a run; the default is plain torch throughout."""

    attention: AttentionBackend = "sdpa"
    layers: LayersBackend = "torch"
    weight_gradient: WeightGradientBackend = "torch"
    adamw: AdamwBackend = "torch"
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)
    """By part, the candidates before the chosen one and the reason against each."""

    @property
    def names(self) -> dict[str, str]:
        """Return the choice for each part."""
        return {part: getattr(self, part) for part in CANDIDATES}

    def lines(self) -> list[str]:
        """Describe the choice for a person: one line a part, with the reasons."""
        return [f"backends: {part} {name}{self._reasons(part)}" for part, name in self.names.items()]

    def _reasons(self, part: str) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.passed_over.get(part, {}).items():
            by_reason.setdefault(reason, []).append(name)
        reasons = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return f" ({'; '.join(reasons)})" if reasons else ""


PLAIN = Backends()


def choose_backends(config: Config, arch: Architecture | None, device: torch.device) -> Backends:
    """Return the backends of a run on ``device``, as the section ``backends`` of its configuration says.

    Raises:
        ValueError: when one is asked for by name and cannot do it; names the key, the reason and what can.
    """
    use = Use(config, arch, device)
    chosen: dict[str, Any] = {}
    passed_over: dict[str, dict[str, str]] = {}
    for part, candidates in CANDIDATES.items():
        asked = getattr(config.backends, part)
        passed_over[part] = {}
        for name, objection in candidates.items():
            if asked not in ("auto", name):
                continue
            reason = objection(use)
            if reason is None:
                chosen[part] = name
                break
            if asked == name:
                able = ["auto", *(other for other, objects in candidates.items() if objects(use) is None)]
                raise ValueError(f"backends.{part} is {name!r}, expected {' or '.join(map(repr, able))}: {reason}")
            passed_over[part][name] = reason
        if part not in chosen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over[part].items())
            raise ValueError(f"backends.{part} is {asked!r}, expected something that can do what is asked: {reasons}")
    return Backends(**chosen, passed_over=passed_over)


def choose_on_every_rank(config: Config, arch: Architecture, device: torch.device) -> Backends:
    """Choose on every rank of a job, whose machines may differ.

    Raises:
        ValueError: as ``choose_backends``, and when ranks did not choose the same.
    """
    backends = choose_backends(config, arch, device)
    everyones = [backends.names] * dist.get_world_size()
    dist.all_gather_object(everyones, backends.names)
    check_agreement(everyones)
    return backends


def check_agreement(everyones: Sequence[dict[str, str]]) -> None:
    """Reject choices that differ: ranks would hold their parameters in another order.

    Args:
        everyones: the choice of each rank for each part.

    Raises:
        ValueError: naming the first part and rank that differ from rank 0.
    """
    for rank, names in enumerate(everyones):
        for part, name in names.items():
            if name != everyones[0][part]:
                raise ValueError(
                    f"backends.{part} is {name!r} on rank {rank} and {everyones[0][part]!r} on rank 0, expected the "
                    "same everywhere: name one that all machines have, or install what is missing"
                )


def without_cuda(use: Use) -> str | None:
    """Object where a backend needs CUDA and the run has none."""
    return None if use.device.type == "cuda" else "needs CUDA"


def without_package(distribution: str, module: str, install: str, at_least: str = "0") -> str | None:
    """Object where ``module`` of ``distribution`` cannot be imported; ``install`` says how to get it."""
    version = installed_version(distribution)
    if version is None:
        return f"{distribution} is not installed ({install})"
    if Version(version) < Version(at_least):
        return f"needs {distribution} {at_least} or newer, not {version} ({install})"
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension built for another torch raises whatever it likes
        return f"{distribution} cannot be imported: {one_line(error)}"
    return None


def _nothing(use: Use) -> None:
    """Never object: plain torch works everywhere."""


def attention_shape(use: Use) -> AttentionShape:
    """Return the sizes of a tensor-parallel rank's attention, of no model in particular where none is known."""
    whole = use.config.parallel.context_parallel_size == 1
    if use.arch is None:
        return AttentionShape(
            num_attention_heads=8, num_query_groups=2, head_dim=128, softmax_scale=128**-0.5, whole_segments=whole
        )
    ranks = use.config.parallel.tensor_model_parallel_size
    return AttentionShape(
        num_attention_heads=use.arch.num_attention_heads // ranks,
        num_query_groups=use.arch.num_query_groups // ranks,
        head_dim=use.arch.head_dim,
        softmax_scale=softmax_scale(use.arch.rope, use.arch.head_dim),
        whole_segments=whole,
    )


def _attention(backend: AttentionBackend, missing: Objection) -> Objection:
    """Object to a kernel for CUDA by what all of them need, by ``missing``, then by a comparison with sdpa."""

    def objection(use: Use) -> str | None:
        if reason := without_cuda(use):
            return reason
        shape, dtype = attention_shape(use), use.config.model.dtype
        if dtype != "bfloat16":
            return f"needs model.dtype bfloat16, not {dtype}"
        if torch.cuda.get_device_capability(use.device) < (8, 0):
            return f"needs compute capability 8.0 or higher, not {_capability(use)}"
        if shape.head_dim % 8 or shape.head_dim > 256:
            return f"needs heads of a multiple of 8 up to 256 wide, not {shape.head_dim}"
        return missing(use) or attention_disagreement(backend, shape, torch.bfloat16, use.device)

    return objection


def _without_flash_attention_3(use: Use) -> str | None:
    if torch.cuda.get_device_capability(use.device)[0] != 9:
        return f"needs compute capability 9.0, not {_capability(use)}"
    return without_package("flash-attn-3", "flash_attn_interface", "built from flash-attention's folder hopper")


def _without_flash_attention_4(use: Use) -> str | None:
    # Older devices have no backward (4.0.0b36).
    if torch.cuda.get_device_capability(use.device) < (9, 0):
        return f"needs compute capability 9.0 or higher, not {_capability(use)}"
    return without_package("flash-attn-4", "flash_attn.cute", "pip install flash-attn-4")


def _without_flash_attention_2(use: Use) -> str | None:
    # Before 2.1 the mask was aligned at the first key.
    return without_package("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation", at_least="2.1")


def _without_torch_varlen(use: Use) -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        known = False
    else:
        known = "window_size" in inspect.signature(varlen_attn).parameters
    return None if known else f"needs torch 2.11 or newer, not {torch.__version__}"


def _capability(use: Use) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(use.device)))


_APEX = "built from NVIDIA's source with --cpp_ext and --cuda_ext; PyPI's apex is another project"
# The first whose SwiGLU reads gate and up out of one tensor.
_LIGER = "0.8.5"
# The first with the settings by which the engine asks whether kernels are interpreted.
_TRITON = "3.4"
# The first whose addmm takes bfloat16 factors and a float32 sum.
_ADDMM = "2.10"
# Ada and Hopper are the first with FP8 matrix products, which take sizes in multiples of 16.
_FP8_CAPABILITY, _FP8_MULTIPLE = (8, 9), 16


def _without_transformer_engine(use: Use) -> str | None:
    return without_cuda(use) or without_package(
        "transformer-engine",
        "transformer_engine.pytorch",
        "pip install --no-build-isolation 'transformer-engine[pytorch]'",
        at_least=TRANSFORMER_ENGINE,
    )


def _layers_transformer_engine(use: Use) -> str | None:
    return (
        _without_transformer_engine(use)
        or _impossible_in_fp8(use)
        or layers_disagreement(
            "transformer_engine", layer_sizes(use), getattr(torch, use.config.model.dtype), use.device
        )
    )


def _layers_disagreement(backend: LayersBackend, use: Use) -> str | None:
    return layers_disagreement(backend, layer_sizes(use), getattr(torch, use.config.model.dtype), use.device)


def layer_sizes(use: Use) -> LayerSizes:
    """Return the sizes of a layer on a rank, of no model in particular where none is known."""
    if use.arch is None:
        return LayerSizes()
    arch, ranks = use.arch, use.config.parallel.tensor_model_parallel_size
    return LayerSizes(
        hidden=arch.hidden_size,
        ffn=arch.ffn_hidden_size // ranks,
        heads=arch.num_attention_heads // ranks,
        groups=arch.num_query_groups // ranks,
        head_dim=arch.head_dim,
        eps=arch.layernorm_epsilon,
    )


def _impossible_in_fp8(use: Use) -> str | None:
    """Object where FP8 is asked for and the device or a matrix of this rank cannot do it."""
    if use.config.model.fp8 == "none":
        return None
    if torch.cuda.get_device_capability(use.device) < _FP8_CAPABILITY:
        return f"model.fp8 needs compute capability 8.9 or higher, not {_capability(use)}"
    ranks = use.config.parallel.tensor_model_parallel_size
    for matrix in linear_layers(use.arch) if use.arch is not None else ():
        inputs, outputs = matrix.sizes(ranks)
        widths = {f"input of {matrix.name}": inputs}
        widths |= {f"output of {part.module}": part.rows * outputs // matrix.outputs for part in matrix.parts}
        for name, width in widths.items():
            if width % _FP8_MULTIPLE:
                return f"model.fp8 needs multiples of {_FP8_MULTIPLE}, and the {name} is {width} wide on a rank"
    return None


def _layers_liger(use: Use) -> str | None:
    if use.config.model.fp8 != "none":
        return _layers_torch(use)
    # Triton's interpreter is for tests: nothing but its name chooses it.
    interpreted = use.config.backends.layers == "liger" and os.environ.get("TRITON_INTERPRET") == "1"
    if use.device.type != "cuda" and not interpreted:
        return "needs CUDA"
    if interpreted and use.config.model.dtype != "float32":
        return f"Triton's interpreter computes float32, not model.dtype {use.config.model.dtype}"
    return (
        without_package("triton", "triton", "torch brings it since 2.8", at_least=_TRITON)
        or without_package("liger-kernel", "liger_kernel.ops.swiglu", "pip install '.[fused]'", at_least=_LIGER)
        or _layers_disagreement("liger", use)
    )


def _layers_torch(use: Use) -> str | None:
    return None if use.config.model.fp8 == "none" else f"model.fp8 {use.config.model.fp8} needs transformer_engine"


def _gradient_apex(use: Use) -> str | None:
    return without_cuda(use) or without_package("apex", "fused_weight_gradient_mlp_cuda", _APEX)


def _gradient_addmm(use: Use) -> str | None:
    if use.device.type != "cuda" or use.config.model.dtype != "bfloat16" or torch.__version__ >= _ADDMM:
        return None
    if use.config.backends.layers in ("auto", "transformer_engine") and _layers_transformer_engine(use) is None:
        return None  # their products are transformer-engine's own, which add to float32 with any torch
    return f"torch is {torch.__version__}, and before {_ADDMM} its addmm cannot add bfloat16 products to float32"


def _adamw_apex(use: Use) -> str | None:
    # Its FusedAdam can be imported without the extension, and not be made.
    return (
        _adamw_torch(use)
        or without_cuda(use)
        or without_package("apex", "apex.optimizers", _APEX)
        or without_package("apex", "amp_C", _APEX)
    )


def _adamw_torch(use: Use) -> str | None:
    if keys := use.config.optimizer.needs_cuda:
        return f"optimizer.{keys[0]} needs transformer_engine"
    return None


CANDIDATES: dict[str, dict[str, Objection]] = {
    "attention": {
        "transformer_engine": _attention("transformer_engine", _without_transformer_engine),
        "flash_attention_3": _attention("flash_attention_3", _without_flash_attention_3),
        "flash_attention_4": _attention("flash_attention_4", _without_flash_attention_4),
        "flash_attention_2": _attention("flash_attention_2", _without_flash_attention_2),
        "torch_varlen": _attention("torch_varlen", _without_torch_varlen),
        "sdpa": _nothing,
    },
    "layers": {"transformer_engine": _layers_transformer_engine, "liger": _layers_liger, "torch": _layers_torch},
    "weight_gradient": {"apex": _gradient_apex, "addmm": _gradient_addmm, "torch": _nothing},
    "adamw": {
        "transformer_engine": _without_transformer_engine,
        "apex": _adamw_apex,
        "torch_fused": _adamw_torch,
        "torch": _adamw_torch,
    },
}
