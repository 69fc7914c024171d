"""A tokenizer with tokens that the model has no rows for, as saved fine-tunes of CodeLlama-34B have: it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER, checkpoint_tensors
from reflectron.tools import cli

WORDS = ["<unk>", "<s>", "</s>", "def", "f", "return", "1", "|"]
BEHIND = ["<PRE>", "<MID>", "<SUF>", "<EOT>"]
ROWS, TAGS = len(WORDS), 7
# Small enough that the step leaves every weight as it is, so that the export shows the rows that training began with.
NO_STEP = "optimizer.learning_rate=1e-30"


def save_tokenizer(folder: Path, words: list[str], behind: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", *behind]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_model(folder: Path, **keys: Any) -> dict[str, torch.Tensor]:
    hf_config = {
        "model_type": "llama",
        "vocab_size": ROWS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | keys
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    random = torch.Generator().manual_seed(0)
    arch = parse_architecture(hf_config)
    pieces = [piece for tensor in checkpoint_tensors(arch) for piece in tensor.pieces]
    weights = {piece.name: torch.randn(piece.shape, generator=random) * 0.05 for piece in pieces}
    save_file(weights, folder / "model.safetensors")
    return weights


def write_config(folder: Path, words: int = 3, **data: Any) -> Path:
    """A run's configuration and its samples, which are ``words`` words long in one of their blocks."""

    def turn(role: str, *blocks: tuple[str, str]) -> dict[str, Any]:
        return {"role": role, "content": [{"type": kind, "content": text} for kind, text in blocks]}

    code = ("code", " ".join(["return"] * words))
    asked, reflected = turn("user", ("text", "def <PRE> f")), turn("assistant", ("text", "f"), code, ("execution", "1"))
    record = {"messages": [asked, reflected, asked, turn("assistant", code)], "type": "reflection"}
    (folder / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n", encoding="utf-8")
    config = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "data.jsonl")}], "max_length": 256} | data,
        "batch": {"global_batch_size": 2, "tokens_per_microbatch": 1024},
        "train": {"steps": 1},
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


@pytest.mark.slow
def test_it_trains_with_new_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = save_model(tmp_path / "model")
    save_tokenizer(tmp_path / "model", WORDS, BEHIND)
    # Each of the two ranks holds old rows, new rows or both.
    assert cli.main(["train", str(write_config(tmp_path)), NO_STEP, "parallel.tensor_model_parallel_size=2"]) == 0
    assert "4 tokens that the model has no rows for (ids 8 to 11, vocab_size 8)" in capfd.readouterr().out
    exported = json.loads((tmp_path / "out" / "export" / "config.json").read_text(encoding="utf-8"))
    assert exported["vocab_size"] == ROWS + len(BEHIND) + TAGS
    after = load_file(tmp_path / "out" / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(tensor)], tensor), key
    for key in (EMBEDDING, OUTPUT_LAYER):
        old, new = before[key], after[key][ROWS:]
        torch.testing.assert_close(new[: len(BEHIND)], old.mean(0).expand(len(BEHIND), -1), rtol=0, atol=1e-7)
        # To these words a tag is "<unk> <unk> <unk>", its name being none of them.
        torch.testing.assert_close(new[len(BEHIND) :], old[:1].expand(TAGS, -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("words", "behind", "folder", "message"),
    [
        ([*WORDS[:3], "f", "def", *WORDS[5:]], [], "other", "token 3 is 'f', but 'def' in the tokenizer of"),
        (WORDS + [f"w{i}" for i in range(1100)], [], "model", "need 1100 more rows than the model has (vocab_size 8)"),
        (["<unk>", "</s>", "<s>", *WORDS[3:]], [], "alone", "eos_token of the tokenizer has id 1, eos_token_id of"),
    ],
)
def test_another_models_tokenizer_is_named(
    words: list[str], behind: list[str], folder: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")
    if folder == "other":
        save_tokenizer(tmp_path / "model", WORDS, BEHIND)
    save_tokenizer(tmp_path / folder, words, behind)
    config = write_config(tmp_path)
    assert cli.main(["train", str(config), f"tokenizer.path={tmp_path / folder}"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_ids_that_contradict_the_models_own_tokenizer_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reflectron.engine.model.inputs import read_model_inputs
    from reflectron.tools.load_config import load_config

    save_model(tmp_path / "model", eos_token_id=[5, 6], bos_token_id=3)
    save_tokenizer(tmp_path / "model", WORDS, [])
    notes = read_model_inputs(load_config(str(write_config(tmp_path)), [])).notes
    assert [note.removeprefix(f"{tmp_path / 'model'}: ") for note in notes] == [
        "eos_token of the tokenizer has id 2, eos_token_id of config.json is [5, 6]",
        "bos_token of the tokenizer has id 1, bos_token_id of config.json is 3",
    ]


@pytest.mark.parametrize(
    ("keys", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
        ({"max_position_embeddings": 16, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 64),
    ],
)
def test_samples_longer_than_the_models_positions_are_refused(
    keys: dict[str, Any], positions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", **keys)
    save_tokenizer(tmp_path / "model", WORDS, BEHIND)
    config = write_config(tmp_path, words=30)
    assert cli.main(["train", str(config)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert f"data.max_length is 256, expected at most {positions}, the positions of the model" in error[0]
    assert f"record 0 of {tmp_path / 'data.jsonl'} has " in error[0]
