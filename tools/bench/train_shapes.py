"""The models that training is measured on: real widths and vocabularies, and as many layers as the device holds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from reflectron.engine.config import Config
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture, read_hf_config
from reflectron.tools.planner.hardware import GPUS, Cluster, Gpu
from reflectron.tools.planner.memory import FULLEST, element_bytes, layer_parameters, vocabulary_parameters
from reflectron.tools.planner.predict import predict
from reflectron.tools.planner.samples import Batch

SHAPES = ("codellama-7b", "codellama-34b", "deepseek-coder-33b")
"""Read from the models that the recipes are made from."""
MODELS = Path(__file__).parents[2] / "examples" / "recipes" / "models"
# Tags that the template ``reflection`` adds to the vocabulary.
_TAGS = 7
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 120,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""For a machine without a GPU: shows that the harness works, and nothing about speed."""


def hf_config_of(shape: str, vocab_size: int | None = None) -> dict[str, Any]:
    """``config.json`` of a shape by name or path, its vocabulary with the tags or as large as given.

    Raises:
        ValueError: when there is no such file.
    """
    named = MODELS / f"{shape}.json"
    if shape != "tiny" and not named.exists() and not Path(shape).exists():
        raise ValueError(f"--shapes names {shape!r}, expected {', '.join(SHAPES)}, tiny or a config.json")
    content = dict(TINY) if shape == "tiny" else read_hf_config(named if named.exists() else shape)
    content["vocab_size"] = max(content["vocab_size"], vocab_size or 0) if vocab_size else content["vocab_size"] + _TAGS
    return content


def gpu_of(device_name: str) -> Gpu | None:
    """The planner's entry for a device as torch names it; None for one whose rates it does not know."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None  # slower than the SXM modules that the entries are of
    words = re.findall(r"\w+", device_name)
    return next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in words), None)


def baseline_static_bytes(arch: Architecture, config: Config) -> int:
    """Parameters and both moments of the baseline, all in the model's type, that stay between its steps."""
    parameters = arch.num_layers * layer_parameters(arch, 1) + 2 * vocabulary_parameters(arch, config)
    return 3 * element_bytes(config) * parameters


def fitting_layers(
    hf_config: dict[str, Any], config: Config, cluster: Cluster, batch: Batch, device_bytes: float, baseline: bool
) -> int:
    """The most layers with which the planner sees the engine, and the baseline beside it, fit a device.

    Raises:
        ValueError: when not even one layer a stage does.
    """
    stages = config.parallel.pipeline_model_parallel_size * config.parallel.virtual_pipeline_model_parallel_size
    whole = parse_architecture(hf_config)
    for layers in range(whole.num_layers // stages * stages, 0, -stages):
        arch = replace(whole, num_layers=layers)
        needed = predict(config, arch, cluster, batch).memory.total
        needed += baseline_static_bytes(arch, config) if baseline else 0
        if needed <= FULLEST * device_bytes:
            return layers
    raise ValueError(f"--layers is auto, but {stages} layers of width {whole.hidden_size} do not fit; raise --gpus")
