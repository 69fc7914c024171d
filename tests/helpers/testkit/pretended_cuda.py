"""A process that takes itself for one with an H100: real tensors of the device ``cuda:0``, computed on the CPU.

``build`` compiles the extension beside this file, ``environment`` makes Python processes call ``activate`` as they
start. What torch asks of CUDA from Python is answered here; what it asks from C++,
and every operator, by the extension.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

EXTENSION = "pretended_cuda_extension"
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_029_158_912, multi_processor_count=132, warp_size=32
)
HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compile the extension into ``folder``: half a minute."""
    from torch.utils.cpp_extension import include_paths, library_paths

    target = folder / f"{EXTENSION}.so"
    command = [
        "g++",
        "-std=c++20",
        "-O0",
        "-fPIC",
        "-shared",
        "-w",
        str(HERE / "pretended_cuda.cpp"),
        "-o",
        str(target),
    ]
    command += [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    command += [f"-L{path}" for path in library_paths()]
    command += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def environment(extension: Path) -> dict[str, str]:
    """Variables of processes that pretend, but for those with ``CUDA_VISIBLE_DEVICES`` empty."""
    start = f"""
import os, sys
if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    from testkit import pretended_cuda
    pretended_cuda.activate({str(extension)!r})
"""
    (extension.parent / "sitecustomize.py").write_text(start, encoding="utf-8")
    path = os.pathsep.join((str(extension.parent), os.environ["PYTHONPATH"]))
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    kept = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    }
    return kept | variables


def activate(path: str) -> None:
    """Pretend from here on; before anything asks torch for a device."""
    spec = importlib.util.spec_from_file_location(EXTENSION, path)
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    _answer_for_the_device(extension)
    _play_nccl(extension)
    _add_kernels(extension)
    if importlib.util.find_spec("triton") is not None:
        from testkit.pretended_triton import use_driver

        use_driver()


class Stream:
    """There is one, and what is put on it is done."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None: ...


class Event:
    """The host's clock when it was recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        return (end.time - self.time) * 1e3


class Context:
    """The context of a stream or a device."""

    def __init__(self, of: Any) -> None:
        self.idx, self.stream = 0, of

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _answer_for_the_device(extension: ModuleType) -> None:
    generator, stream, mode = torch.Generator("cuda"), Stream(), ["default"]

    def count(*counters: str) -> Any:
        return lambda device=None: sum(getattr(extension, counter)() for counter in counters)

    def report(what: str) -> None:
        if mode[0] == "warn":
            warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)

    extension.set_report(report)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": Context,
        "get_device_name": lambda device=None: H100.name,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": lambda new: mode.__setitem__(0, new),
        "Stream": Stream,
        "Event": Event,
        "stream": Context,
        "set_stream": lambda stream: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": count("allocated"),
        "memory_reserved": count("peak"),
        "max_memory_allocated": count("peak"),
        "max_memory_reserved": count("peak"),
        "reset_peak_memory_stats": lambda device=None: extension.reset_peak(),
        "memory_stats": lambda device=None: {"num_alloc_retries": 0},
        "empty_cache": lambda: None,
        "default_generators": (generator,),
        "manual_seed": lambda seed: generator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: generator.manual_seed(int(seed)),
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
    }
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random):
        for name, answer in answers.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    torch.version.cuda = "12.8"


def _play_nccl(extension: ModuleType) -> None:
    from torch.distributed import distributed_c10d

    extension.Nccl.Options = type("Options", (), {"is_high_priority_stream": False, "_timeout": None})
    distributed_c10d.ProcessGroupNCCL = extension.Nccl
    distributed_c10d.is_nccl_available = torch.distributed.is_nccl_available = lambda: True
    torch._C._nccl_version = lambda: 2 << 32 | 27 << 16
    torch._C._nccl_version_suffix = lambda: b""


def _add_kernels(extension: ModuleType) -> None:
    """What torch has on CUDA alone, with what its kernels demand."""
    from testkit.varlen_kernel import flash_attn_varlen_func

    library = torch.library.Library("aten", "IMPL")
    # Below autograd nothing can be differentiated; another thread is above it.
    above, host = ThreadPoolExecutor(1), extension.on_host

    def uploaded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        result = torch.empty(x.shape, dtype=like.dtype, device=like.device)
        host(result).copy_(x)
        return result

    def product(total: torch.Tensor | float, a: Any, b: Any, out_dtype: Any, out: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype
        assert a.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == out.dtype == torch.float32
        assert not isinstance(total, torch.Tensor) or total.dtype in (out_dtype, a.dtype)
        return out.copy_(total + a.float() @ b.float())

    def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return product(0.0, a, b, out_dtype, a.new_empty(len(a), b.shape[1], dtype=out_dtype))

    def addmm_out(
        total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor
    ) -> torch.Tensor:
        return product(total, a, b, out_dtype, out)

    def attend(inputs: Sequence[torch.Tensor], segments: Sequence[Any], scale: float) -> torch.Tensor:
        lengths, longest = [host(cumulative) for cumulative in segments[:2]], segments[2:]
        return flash_attn_varlen_func(
            *inputs,
            cu_seqlens_q=lengths[0],
            cu_seqlens_k=lengths[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            softmax_scale=scale,
            causal=True,
        )

    def check(inputs: Sequence[torch.Tensor], options: Sequence[Any], window: dict[str, Any]) -> None:
        assert tuple(options[:2]) == (0.0, True), "no dropout, a causal mask"
        assert (window["window_size_left"], window["window_size_right"]) == (-1, 0)
        for x in inputs:
            assert x.is_cuda
            assert x.dtype in (torch.bfloat16, torch.float16)
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0

    # Arguments: query, key, value; cumulative and greatest lengths of both; dropout and whether it is causal.
    def flash(*arguments: Any, scale: float, **window: Any) -> tuple[torch.Tensor, ...]:
        inputs, segments, options = arguments[:3], arguments[3:7], arguments[7:]
        check(inputs, options, window)
        query = inputs[0]
        output = attend([host(x).float() for x in inputs], segments, scale)
        unused = [
            query.new_zeros(size, dtype=torch.float32) for size in ((query.shape[1], len(query)), (2,), (0,), (0,))
        ]
        return uploaded(output, query), *unused

    # The gradient comes before them, output and logsumexp behind the value.
    def flash_backward(
        gradient: torch.Tensor, *arguments: Any, scale: float, **window: Any
    ) -> tuple[torch.Tensor, ...]:
        inputs, output, segments, options = arguments[:3], arguments[3], arguments[5:9], arguments[9:]
        check((gradient, output, *inputs), options, window)
        leaves = [host(x).float().requires_grad_() for x in inputs]

        def differentiate() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(attend(leaves, segments, scale), leaves, host(gradient).float())

        return tuple(uploaded(x, output) for x in above.submit(differentiate).result())

    library.impl("mm.dtype", mm, "CUDA")
    library.impl("addmm.dtype_out", addmm_out, "CUDA")
    library.impl("_flash_attention_forward", flash, "CUDA")
    library.impl("_flash_attention_backward", flash_backward, "CUDA")
    globals()["_library"] = library  # its kernels go with it
