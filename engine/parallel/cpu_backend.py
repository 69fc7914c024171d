"""Lets megatron-core 0.16.1 run on a machine without CUDA.

megatron-core names the device "cuda" in many places where any device would do. ``redirect_cuda_to_cpu`` replaces those
few torch entry points, once per process, so that the unchanged upstream code runs on CPU tensors over gloo. It goes
away when upstream passes its devices around.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "as_tensor", "eye")
_LIKE_FACTORIES = ("zeros_like", "ones_like", "empty_like", "full_like", "randn_like", "rand_like")

# distrib_optimizer.py recognises parameters by the type names of CUDA tensors.
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}

# mallopt's parameters (malloc.h), and its largest value: an int.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST = -1, -3, 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc's malloc give freed tensors to the next ones, as torch's allocator does on CUDA.

    By default it hands blocks of 32 MiB and more back to the system, whose fresh pages cost more at their first touch
    than most operators: a step with a vocabulary of 32,000 takes a third longer. The price is a tenth more memory, the
    layout of the heap being less dense. Other allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, _MOST)


def redirect_cuda_to_cpu() -> None:
    """Make torch's CUDA entry points that megatron-core calls act on the CPU; calling it again does nothing.

    Raises:
        RuntimeError: when a CUDA device exists, for then nothing must be redirected.
    """
    if torch.cuda.is_available():
        raise RuntimeError("a CUDA device is visible: megatron-core needs no redirection to the CPU")
    if getattr(torch.cuda.current_device, "redirected", False):
        return
    for name in (*_FACTORIES, *_LIKE_FACTORIES):
        setattr(torch, name, _without_cuda_device(getattr(torch, name)))
    _leave_uncompiled()
    _leave_optimizers_uncompiled()
    _redirect_tensor_methods()
    _redirect_device_calls()
    _redirect_rng_state()


def _without_cuda_device(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def _leave_uncompiled() -> None:
    """Import megatron-core without its ``torch.compile`` of fusions that the CPU does not use.

    Naming a function to be compiled imports the compiler, which is a third of the start of a rank.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        from megatron.core import jit
    finally:
        torch.compile = compile_function
    # For the modules that are imported later.
    jit.disable_jit_fuser()


def _leave_optimizers_uncompiled() -> None:
    """Take off the optimizers' methods what hides them from torch's compiler, for it imports that (torch 2.6 to 2.13).

    Around ``step`` it also turns gradients off, which stays.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(torch.optim.Optimizer, name, inspect.unwrap(getattr(torch.optim.Optimizer, name)))
    for adam in (torch.optim.Adam, torch.optim.AdamW):
        # Before torch 2.7, AdamW was not an Adam.
        if "step" in vars(adam):
            adam.step = torch.no_grad()(inspect.unwrap(adam.step))  # type: ignore[method-assign]


def _redirect_tensor_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_named_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_named_as_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_device_calls() -> None:
    cpu = torch.device("cpu")

    def current_device() -> torch.device:
        return cpu

    current_device.redirected = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.nvtx.range_push = lambda *args, **kwargs: 0
    torch.cuda.nvtx.range_pop = lambda *args, **kwargs: 0


def _redirect_rng_state() -> None:
    # Imported here: megatron-core asks for the device while it is being imported.
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
