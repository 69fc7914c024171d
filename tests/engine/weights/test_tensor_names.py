"""A checkpoint's tensors are those that the model computes with: what nobody would read is named, what has no effect is
accepted, and a folder that holds weights twice is not guessed at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER, checkpoint_tensors
from reflectron.engine.weights.dist_reader import open_weights
from reflectron.tools import cli

SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 37,
}
LAYER = "model.layers.0."
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Tensors = dict[str, torch.Tensor]


def architecture(**keys: Any) -> Architecture:
    return parse_architecture(SIZES | keys)


def tensors(**keys: Any) -> Tensors:
    random = torch.Generator().manual_seed(3)
    pieces = [piece for tensor in checkpoint_tensors(architecture(**keys)) for piece in tensor.pieces]
    return {piece.name: torch.randn(piece.shape, generator=random) for piece in pieces}


def save(folder: Path, weights: Tensors, **keys: Any) -> Path:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SIZES | keys), encoding="utf-8")
    return folder


def save_in_two(folder: Path, weights: Tensors) -> None:
    names = sorted(weights)
    parts = {FIRST: names[::2], SECOND: names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize(
    "names",
    [
        [LAYER + "self_attn.q_proj.bias"],
        [LAYER + "self_attn.o_proj.bias", LAYER + "mlp.down_proj.bias"],
        ["model.layers.2.input_layernorm.weight"],
        [LAYER + "self_attn.q_norm.weight", LAYER + "self_attn.k_norm.weight"],
        [LAYER + "self_attn.q_proj.lora_A.weight"],
        [LAYER + "mlp.experts.0.gate_proj.weight"],
        ["model.norm.bias", "lm_head.bias", "score.weight"],
        [f"model.layers.{i}.input_layernorm.bias" for i in range(9)],
    ],
    ids=lambda names: names[0],
)
def test_tensors_that_nobody_reads_are_named(names: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path, tensors() | {name: torch.ones(16) for name in names})
    with pytest.raises(ValueError, match="does not compute with") as refusal:
        open_weights(folder, architecture())
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    assert str(refusal.value) == (
        f"{folder} holds {len(names)} tensors that this llama does not compute with: {shown}; expected none: use the "
        "config.json that belongs to the weights, or remove what has no effect"
    )


def test_every_command_that_reads_weights_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, tensors() | {LAYER + "self_attn.q_proj.bias": torch.ones(16)})
    assert cli.main(["convert", "hf-to-dist", str(tmp_path), str(tmp_path / "out")]) == 2
    assert cli.main(["convert", "verify", str(tmp_path), str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(LAYER + "self_attn.q_proj.bias" in line for line in lines)


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        LAYER + "self_attn.rotary_emb.cos_cached",
        LAYER + "self_attn.masked_bias",
        "model.embeddings.position_ids",
    ],
)
def test_leftovers_without_effect_are_accepted(name: str, tmp_path: Path) -> None:
    leftover = torch.arange(8) if "position_ids" in name else torch.ones(8)
    weights = open_weights(save(tmp_path, tensors() | {name: leftover}), architecture())
    assert torch.equal(weights.read(EMBEDDING, (37, 16), None, 0, 0), tensors()[EMBEDDING])


def test_an_output_layer_beside_a_tied_embedding_must_be_the_same(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    weights = tensors(**tied)
    open_weights(save(tmp_path, weights | {OUTPUT_LAYER: weights[EMBEDDING].clone()}, **tied), architecture(**tied))
    other = weights[EMBEDDING].clone()
    other[-1, -1] += 1e-3
    save(tmp_path, weights | {OUTPUT_LAYER: other}, **tied)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, but lm_head\.weight differs from model\.embed"):
        open_weights(tmp_path, architecture(**tied))


def test_missing_tensors_are_counted(tmp_path: Path) -> None:
    weights = {name.replace("model.", "transformer.", 1): tensor for name, tensor in tensors().items()}
    save(tmp_path, weights)
    with pytest.raises(ValueError, match="belong together") as refusal:
        open_weights(tmp_path, architecture())
    assert str(refusal.value).startswith(
        f"{tmp_path} has no tensor {EMBEDDING}, {LAYER}input_layernorm.weight, {LAYER}self_attn.q_proj.weight and 17 "
        "more, but transformer.embed_tokens.weight, "
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: (
                t | {LAYER + "self_attn.q_proj.weight": t[LAYER + "self_attn.q_proj.weight"].to(torch.float8_e4m3fn)}
            ),
            "self_attn.q_proj.weight is F8_E4M3, expected F32, BF16, F16",
        ),
        (
            lambda t: t | {LAYER + "mlp.up_proj.weight": t[LAYER + "mlp.up_proj.weight"].to(torch.int8)},
            "mlp.up_proj.weight is I8, expected F32, BF16, F16",
        ),
        (
            lambda t: (
                {n: x for n, x in t.items() if "up_proj" not in n}
                | {LAYER + "mlp.up_proj.qweight": torch.ones(3, 8, dtype=torch.int32)}
            ),
            "holds quantised weights (model.layers.0.mlp.up_proj.qweight); expected float32, bfloat16 or float16",
        ),
        (
            lambda t: t | {LAYER + "mlp.up_proj.weight_scale_inv": torch.ones(1, 1)},
            "holds quantised weights (model.layers.0.mlp.up_proj.weight_scale_inv); expected float32",
        ),
    ],
)
def test_quantised_weights_are_refused(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    save(tmp_path, change(tensors()))
    with pytest.raises(ValueError, match="expected") as refusal:
        open_weights(tmp_path, architecture())
    assert message in str(refusal.value)


def test_weights_twice_are_refused_unless_they_are_one(tmp_path: Path) -> None:
    weights = tensors()
    save(tmp_path, weights)
    save_in_two(tmp_path, {name: tensor + 1 for name, tensor in weights.items()})
    with pytest.raises(
        ValueError, match=r"holds weights twice, in model\.safetensors and in the files of .*remove one"
    ):
        open_weights(tmp_path, architecture())
    # An index of the one file says nothing new.
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    open_weights(tmp_path, architecture())


def test_files_that_transformers_does_not_load_change_nothing(tmp_path: Path) -> None:
    weights = tensors()
    save_in_two(tmp_path, weights)
    for name in ("consolidated.safetensors", "model-00003-of-00003.safetensors"):
        save_file({"other": torch.zeros(1)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"other")
    source = open_weights(tmp_path, architecture())
    for name, tensor in weights.items():
        assert torch.equal(source.read(name, tuple(tensor.shape), None, 0, 0), tensor)


def edit_index(folder: Path, **weight_map: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["weight_map"] |= weight_map
    file.write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_index(f, **{OUTPUT_LAYER: SECOND}),
            f"index.json: {OUTPUT_LAYER} is not in {SECOND}; the index belongs",
        ),
        (lambda f: edit_index(f, **{EMBEDDING: "gone.safetensors"}), "gone.safetensors cannot be read: No such file"),
        (lambda f: edit_index(f, **{EMBEDDING: "../up.safetensors"}), "expected the name of a file beside it"),
        (lambda f: edit_index(f, **{EMBEDDING: 3}), f"{EMBEDDING} is in 3, expected the name of a file beside it"),
        (
            lambda f: save_file(load_file(f / SECOND) | {"model.norm.bias": torch.ones(16)}, f / SECOND),
            "holds 1 tensors that this llama does not compute with: model.norm.bias",
        ),
        (
            lambda f: save_file(load_file(f / SECOND) | load_file(f / FIRST), f / SECOND),
            f"is in {FIRST} and in {SECOND}",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "weight_map is empty"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter (adapter_config.json)"),
    ],
)
def test_an_index_and_its_files_agree(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_in_two(tmp_path, tensors())
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"expected|cannot|copy|merge|is in") as refusal:
        open_weights(tmp_path, architecture())
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_parameters_of_a_dist_checkpoint_that_nobody_reads_are_named(tmp_path: Path) -> None:
    qwen = {"model_type": "qwen2"}
    (tmp_path / "hf").mkdir()
    save(tmp_path / "hf", tensors(**qwen), **qwen)
    assert cli.main(["convert", "hf-to-dist", str(tmp_path / "hf"), str(tmp_path / "dist")]) == 0
    open_weights(tmp_path / "dist", architecture(**qwen))
    with pytest.raises(ValueError, match=r"1 tensors that .* decoder\.layers\.self_attention\.linear_qkv\.bias"):
        open_weights(tmp_path / "dist", architecture())
