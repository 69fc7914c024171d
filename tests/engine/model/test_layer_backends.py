"""Layers, weight gradients, AdamW and FP8: what is chosen, what is refused, and how parts of other libraries fit in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reflectron.engine.config import BackendsConfig, BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from reflectron.engine.data.packing import packing_sizes
from reflectron.engine.model.architecture import Architecture, Matrix, layer_matrices
from reflectron.engine.model.backends import choose
from reflectron.engine.model.backends.choose import CANDIDATES, Use, choose_backends
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.hf_mapping import hf_pieces

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP8 = Config(model=ModelConfig(fp8="delayed"))


def architecture(ffn: int = 176, **keys: Any) -> Architecture:
    sizes = {"hidden_size": 64, "intermediate_size": ffn, "num_attention_heads": 4, "num_key_value_heads": 2}
    return parse_architecture(
        {"model_type": "qwen3", "head_dim": 16, "vocab_size": 8, "num_hidden_layers": 2} | sizes | keys
    )


def test_on_the_cpu_layers_are_plain_and_the_rest_is_torchs_best() -> None:
    chosen = choose_backends(Config(), None, CPU)
    assert (chosen.layers, chosen.weight_gradient, chosen.adamw) == ("torch", "addmm", "torch_fused")
    assert chosen.passed_over["layers"] == dict.fromkeys(("transformer_engine", "liger"), "needs CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where its kernels can run")
def test_liger_on_the_cpu_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BackendsConfig(layers="liger")
    use = Use(Config(model=ModelConfig(dtype="float32"), backends=asked), None, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert CANDIDATES["layers"]["liger"](Use(Config(backends=asked), None, CPU)) == (
        "Triton's interpreter computes float32, not model.dtype bfloat16"
    )
    assert CANDIDATES["layers"]["liger"](use) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert CANDIDATES["layers"]["liger"](use) == "needs CUDA"


def test_layers_are_run_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    from reflectron.engine.model.backends import liger
    from reflectron.engine.model.backends.checks import LayerSizes, layers_disagreement

    device = CUDA if torch.cuda.is_available() else CPU
    sizes = LayerSizes(hidden=24, ffn=40, heads=6, groups=2, head_dim=16)
    assert layers_disagreement("liger", sizes, torch.float32, device) is None
    fused, kernel = liger.swiglu, liger.LigerRopeFunction
    monkeypatch.setattr(liger, "swiglu", lambda x: 1.2 * fused(x))
    assert (layers_disagreement("liger", sizes, torch.float32, device) or "").startswith(
        "computes another SwiGLU than torch: relative error 2.0e-01"
    )
    monkeypatch.setattr(liger, "swiglu", fused)
    monkeypatch.setattr(kernel, "apply", lambda *_: 1 / 0)
    assert layers_disagreement("liger", sizes, torch.float32, device) == "fails: ZeroDivisionError: division by zero"
    if not torch.cuda.is_available():
        reason = layers_disagreement("transformer_engine", sizes, torch.float32, CPU)
        assert reason is not None
        assert reason.startswith("fails: ")


def test_addmm_needs_a_torch_that_adds_bfloat16_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    objection = CANDIDATES["weight_gradient"]["addmm"]
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    assert objection(Use(Config(), None, CUDA)) == (
        "torch is 2.9.1, and before 2.10 its addmm cannot add bfloat16 products to float32"
    )
    assert objection(Use(Config(model=ModelConfig(dtype="float32")), None, CUDA)) is None
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0+cu128"))
    assert objection(Use(Config(), None, CUDA)) is None


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Every package is there but ``missing``."""

    def without_package(_distribution: str, module: str, _install: str, at_least: str = "0") -> str | None:
        return f"{module} {at_least}" if module == missing else None

    monkeypatch.setattr(choose, "without_package", without_package)


def test_transformer_engines_layers_add_to_float32_with_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    objection = CANDIDATES["weight_gradient"]["addmm"]
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0+cu128"))
    monkeypatch.setattr(choose, "without_package", lambda *_, **__: None)
    monkeypatch.setattr(choose, "layers_disagreement", lambda *_: None)
    assert objection(Use(Config(), None, CUDA)) is None
    assert objection(Use(Config(backends=BackendsConfig(layers="liger")), None, CUDA)) is not None
    monkeypatch.setattr(choose, "layers_disagreement", lambda *_: "fails")
    assert objection(Use(Config(), None, CUDA)) is not None


def test_apexs_adamw_needs_its_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex built for Python alone imports its FusedAdam, and raises where one is made."""
    without(monkeypatch, "amp_C")
    assert CANDIDATES["adamw"]["apex"](Use(Config(), None, CUDA)) == "amp_C 0"


def test_ligers_layers_need_a_triton_that_says_whether_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "triton")
    assert CANDIDATES["layers"]["liger"](Use(Config(), None, CUDA)) == "triton 3.4"


def test_optimizer_state_in_bfloat16_needs_transformer_engine() -> None:
    config = Config(optimizer=OptimizerConfig(exp_avg_dtype="bfloat16"), backends=BackendsConfig(adamw="torch"))
    for name in ("apex", "torch_fused", "torch"):
        assert CANDIDATES["adamw"][name](Use(config, None, CUDA)) == (
            "optimizer.exp_avg_dtype needs transformer_engine"
        )


def test_fp8_is_refused_where_nothing_computes_it() -> None:
    with pytest.raises(ValueError, match="backends") as refusal:
        choose_backends(FP8, None, CPU)
    assert str(refusal.value) == (
        "backends.layers is 'auto', expected something that can do what is asked: transformer_engine: needs CUDA; "
        "liger: model.fp8 delayed needs transformer_engine; torch: model.fp8 delayed needs transformer_engine"
    )
    with pytest.raises(ValueError, match=r"model\.fp8 is 'current', expected 'none' with model\.dtype float32"):
        ModelConfig(fp8="current", dtype="float32")


def test_what_fp8_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of transformer-engine's layers as if it were installed."""
    monkeypatch.setattr(choose, "without_package", lambda *_, **__: None)
    monkeypatch.setattr(choose, "layers_disagreement", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    objection = CANDIDATES["layers"]["transformer_engine"]
    assert objection(Use(Config(), architecture(ffn=100), CUDA)) is None
    assert objection(Use(FP8, None, CUDA)) == "model.fp8 needs compute capability 8.9 or higher, not 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert objection(Use(FP8, architecture(), CUDA)) is None
    assert objection(Use(FP8, architecture(ffn=100), CUDA)) == (
        "model.fp8 needs multiples of 16, and the output of mlp.gate_proj is 100 wide on a rank"
    )


@pytest.mark.parametrize("tokens", [8192, 1000, 64])
def test_fp8_takes_tokens_in_multiples_of_16_a_rank(tokens: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=3, sequence_parallel=True)
    batch = BatchConfig(tokens_per_microbatch=max(tokens, 4096))
    budget, multiple = packing_sizes(Config(model=FP8.model, batch=batch, parallel=parallel))
    assert multiple % (16 * 2 * 3) == 0
    assert budget % multiple == 0
    assert 0 <= budget - batch.tokens_per_microbatch < 16 * 2 * 3
    plain_budget, plain_multiple = packing_sizes(Config(batch=batch, parallel=parallel))
    assert plain_budget - batch.tokens_per_microbatch < 2 * 3
    assert multiple <= 16 * plain_multiple


def test_hugging_face_tensors_in_parameters_named_by_transformer_engine() -> None:
    """A model of empty modules whose norms stand alone, or inside the linear layers as transformer-engine has them."""

    def named(prefix: Callable[[Matrix], str]) -> list[list[str]]:
        model = torch.nn.Module()
        model.decoder = torch.nn.Module()
        model.decoder.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        for index, layer in enumerate(model.decoder.layers):
            layer.layer_number = index + 1
            for matrix in layer_matrices(architecture()):
                path, _, attribute = f"{prefix(matrix)}weight".rpartition(".")
                module = layer
                for part in path.split("."):
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_parameter(attribute, torch.nn.Parameter(torch.empty(0)))
        found = hf_pieces([model], architecture(), 1)  # type: ignore[list-item]
        return sorted([piece.name for piece in pieces] for _, pieces in found)

    alone, fused = named(lambda matrix: f"{matrix.name}."), named(lambda matrix: matrix.checkpoint_prefix)
    assert alone == fused
    assert ["model.layers.1.post_attention_layernorm.weight"] in fused


def test_transformer_engine_holds_norms_inside_linear_layers() -> None:
    from megatron.core.transformer.identity_op import IdentityOp

    from reflectron.engine.model.backends.layers import layer_parts

    parts = layer_parts("transformer_engine")
    assert parts.norm_before_linear is IdentityOp
    assert parts.norm.__name__ == "TENorm"


def test_the_chosen_adamw_is_built_whatever_was_found_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from reflectron.engine.optim.optimizer import _use_adamw

    for module, name, value in (
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (megatron_optimizer, "Adam", torch.optim.SGD),
        (distrib_optimizer, "Adam", torch.optim.SGD),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    ):
        monkeypatch.setattr(module, name, value)
    _use_adamw("torch_fused")
    assert megatron_optimizer.USING_PYTORCH_OPTIMIZER
    assert megatron_optimizer.Adam is distrib_optimizer.Adam is torch.optim.AdamW
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    assert not distrib_optimizer.USING_TE_OPTIMIZER
    assert not distrib_optimizer.USING_APEX_OPTIMIZER
