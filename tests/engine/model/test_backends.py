"""Which backends are chosen, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reflectron.engine.config import BackendsConfig, Config, ModelConfig, ParallelConfig
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.backends import checks, choose
from reflectron.engine.model.backends.attention_kernels import AttentionKernel, AttentionShape, sdpa
from reflectron.engine.model.backends.checks import attention_disagreement
from reflectron.engine.model.backends.choose import (
    CANDIDATES,
    PLAIN,
    Use,
    check_agreement,
    choose_backends,
    without_package,
)
from reflectron.engine.model.hf_config import parse_architecture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(num_attention_heads=4, num_query_groups=2, head_dim=16, softmax_scale=0.25, whole_segments=True)


def architecture(head_dim: int) -> Architecture:
    keys = {"hidden_size": 8 * head_dim, "intermediate_size": 8, "num_attention_heads": 8, "num_hidden_layers": 1}
    return parse_architecture({"model_type": "llama", "vocab_size": 8, **keys})


def test_on_the_cpu_attention_is_plain() -> None:
    chosen = choose_backends(Config(), None, CPU)
    assert chosen.attention == "sdpa"
    assert chosen.lines()[0] == (
        "backends: attention sdpa (transformer_engine, flash_attention_3, flash_attention_4, flash_attention_2, "
        "torch_varlen: needs CUDA)"
    )


def test_the_plain_one_is_the_last_of_every_part_and_always_works() -> None:
    for part, candidates in CANDIDATES.items():
        assert list(candidates)[-1] == getattr(PLAIN, part)
        assert candidates[getattr(PLAIN, part)](Use(Config(), None, CPU)) is None


@pytest.mark.parametrize("part", CANDIDATES)
def test_every_name_of_the_configuration_is_a_candidate(part: str) -> None:
    from typing import get_args, get_type_hints

    names = get_args(get_type_hints(BackendsConfig)[part])
    assert names == ("auto", *CANDIDATES[part])


def test_what_is_asked_for_is_taken_without_a_look_at_others() -> None:
    chosen = choose_backends(Config(backends=BackendsConfig(attention="sdpa")), None, CPU)
    assert chosen.attention == "sdpa"
    assert chosen.passed_over["attention"] == {}


def test_what_is_asked_for_and_impossible_is_refused() -> None:
    with pytest.raises(ValueError, match="attention") as refusal:
        choose_backends(Config(backends=BackendsConfig(attention="torch_varlen")), None, CPU)
    assert str(refusal.value) == "backends.attention is 'torch_varlen', expected 'auto' or 'sdpa': needs CUDA"


def test_ranks_that_chose_differently_are_named() -> None:
    check_agreement([PLAIN.names, PLAIN.names])
    with pytest.raises(ValueError, match="attention") as refusal:
        check_agreement([PLAIN.names, PLAIN.names, PLAIN.names | {"attention": "torch_varlen"}])
    assert str(refusal.value) == (
        "backends.attention is 'torch_varlen' on rank 2 and 'sdpa' on rank 0, expected the same everywhere: name one "
        "that all machines have, or install what is missing"
    )


def objections(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], use: Use) -> dict[str, str | None]:
    """Return those to every attention backend on a device of that compute capability, where none can be run here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choose, "attention_disagreement", lambda backend, *_: f"{backend} would run")
    return {name: objection(use) for name, objection in CANDIDATES["attention"].items() if name != "sdpa"}


def test_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    use = Use(Config(), architecture(128), CUDA)
    hopper = objections(monkeypatch, (9, 0), use)
    assert hopper["torch_varlen"] == "torch_varlen would run"
    installs = {
        "transformer_engine": (
            "transformer-engine is not installed (pip install --no-build-isolation 'transformer-engine[pytorch]')"
        ),
        "flash_attention_3": "flash-attn-3 is not installed (built from flash-attention's folder hopper)",
        "flash_attention_4": "flash-attn-4 is not installed (pip install flash-attn-4)",
        "flash_attention_2": "flash-attn is not installed (pip install flash-attn --no-build-isolation)",
    }
    for name, reason in installs.items():
        assert hopper[name] in (reason, f"{name} would run")
    ampere, blackwell = objections(monkeypatch, (8, 0), use), objections(monkeypatch, (10, 0), use)
    assert ampere["flash_attention_3"] == "needs compute capability 9.0, not 8.0"
    assert ampere["flash_attention_4"] == "needs compute capability 9.0 or higher, not 8.0"
    assert blackwell["flash_attention_3"] == "needs compute capability 9.0, not 10.0"
    turing = objections(monkeypatch, (7, 5), use)
    assert set(turing.values()) == {"needs compute capability 8.0 or higher, not 7.5"}


@pytest.mark.parametrize(
    ("config", "head_dim", "reason"),
    [
        (Config(model=ModelConfig(dtype="float32")), 128, "needs model.dtype bfloat16, not float32"),
        (Config(), 20, "needs heads of a multiple of 8 up to 256 wide, not 20"),
        (Config(), 320, "needs heads of a multiple of 8 up to 256 wide, not 320"),
    ],
)
def test_what_a_model_needs(monkeypatch: pytest.MonkeyPatch, config: Config, head_dim: int, reason: str) -> None:
    found = objections(monkeypatch, (9, 0), Use(config, architecture(head_dim), CUDA))
    assert set(found.values()) == {reason}


def test_the_shape_is_that_of_a_rank() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    shape = choose.attention_shape(Use(Config(parallel=parallel), architecture(64), CPU))
    assert shape == AttentionShape(
        num_attention_heads=4, num_query_groups=4, head_dim=64, softmax_scale=0.125, whole_segments=False
    )


def test_packages() -> None:
    assert without_package("packaging", "packaging", "pip install packaging") is None
    assert without_package("no-such", "no_such", "pip install it") == "no-such is not installed (pip install it)"
    broken = without_package("packaging", "packaging.no_such", "")
    assert broken == "packaging cannot be imported: ModuleNotFoundError: No module named 'packaging.no_such'"
    old = without_package("packaging", "packaging", "pip install it", at_least="9999")
    assert old is not None
    assert old.startswith("needs packaging 9999 or newer, not ")


@pytest.mark.parametrize("whole_segments", [True, False])
def test_a_kernel_is_run_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch, whole_segments: bool) -> None:
    shape = replace(SHAPE, whole_segments=whole_segments)
    assert attention_disagreement("sdpa", shape, torch.bfloat16, CPU) is None

    def wrong_scale(backend: str, shape: AttentionShape) -> AttentionKernel:
        return sdpa(replace(shape, softmax_scale=1.2 * shape.softmax_scale))

    monkeypatch.setattr(checks, "attention_kernel", wrong_scale)
    reason = attention_disagreement("torch_varlen", shape, torch.bfloat16, CPU)
    assert reason is not None
    assert reason.startswith("computes another output than sdpa: relative error ")


def test_a_kernel_that_fails_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> AttentionKernel:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(checks, "attention_kernel", fails)
    assert "no kernel image" in str(attention_disagreement("x", SHAPE, torch.bfloat16, CPU))
