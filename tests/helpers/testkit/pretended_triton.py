"""Triton on a pretended H100: a launch compiles its kernel for sm_90 and computes it in Triton's interpreter.

Grids, types, alignment, shared memory and what is specialised are those of a GPU. Written against Triton 3.7, whose
interpreter cannot compute with bfloat16: such arguments are widened, and rounded again at the end.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton import language as tl
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, _patch_lang
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_LIMITS = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
# Constants of the head's kernels that are set where the interpreter runs them.
_INTERPRETED = ("UPCAST", "INTERPRETED")


def use_driver() -> None:
    """Launch by ``Launcher`` from here on."""
    if not knobs.runtime.interpret:
        driver.set_active(Driver())
        JITFunction.__call__ = _call_inside_a_kernel


class Driver(CudaDriver):
    def __init__(self) -> None:
        GPUDriver.__init__(self)
        self.get_current_stream = lambda device: 0
        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: _LIMITS, load_binary=lambda *_: (1, 1, 0, 0, 1024)
        )


class Launcher:
    """Takes a compiled kernel's place."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kernel = src.fn

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        constants = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        names = self.kernel.arg_names
        arguments = dict(zip(names, rest[-len(names) :], strict=True))
        assert 0 < x < 2**31
        assert 0 < y < 2**16
        assert 0 < z < 2**16
        head, wide = not constants.isdisjoint(_INTERPRETED), {}
        for name, value in arguments.items():
            if isinstance(value, TensorDescriptor):
                _check_descriptor(value)
            elif isinstance(value, torch.Tensor):
                assert value.is_cuda, f"{self.kernel.__name__}: {name} is on {value.device}"
                if value.dtype == torch.bfloat16 and not head:
                    arguments[name] = _widened(value, wide)
            elif name in _INTERPRETED:
                arguments[name] = True
            elif isinstance(value, float) and name not in constants:
                arguments[name] = tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        names_of_kernel = self.kernel.fn.__globals__
        root = names_of_kernel.get("rsqrt")  # of libdevice, a library for GPUs
        try:
            if root is not None:
                names_of_kernel["rsqrt"] = lambda x: tl.math.rsqrt(x)
            InterpretedFunction(self.kernel.fn).run(grid=(x, y, z), warmup=False, **arguments)
        finally:
            if root is not None:
                names_of_kernel["rsqrt"] = root
        for narrow, computed in wide.values():
            narrow.copy_(computed)


def _check_descriptor(descriptor: TensorDescriptor) -> None:
    """What the hardware demands of one."""
    base = descriptor.base
    assert base.is_cuda
    assert base.data_ptr() % 16 == 0
    assert all(stride * base.itemsize % 16 == 0 for stride in descriptor.strides[:-1])
    assert max(descriptor.block_shape) <= 256


def _widened(tensor: torch.Tensor, wide: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """A view of a float32 copy of the whole storage, which other arguments share."""
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in wide:
        narrow = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (storage.nbytes() // 2,))
        wide[storage.data_ptr()] = narrow, narrow.float()
    return wide[storage.data_ptr()][1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _call_inside_a_kernel(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    scope = _patch_lang(self.fn)
    try:
        return InterpretedFunction(self.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()
