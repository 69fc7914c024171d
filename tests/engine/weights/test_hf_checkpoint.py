"""Hugging Face checkpoints in and out, and logits equal to transformers', for every family and parallel layout.

transformers makes tiny random checkpoints here; ``hf_checkpoint_ranks.py`` loads and exports them on gloo processes,
one start for all layouts; the tests then look at what these left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reflectron.engine.model.hf_config import parse_architecture
from reflectron.engine.model.rope import inverse_frequencies
from reflectron.engine.weights.writers import write_weights
from reflectron.tools.convert.model_folder import open_model_folder, write_model_folder
from testkit.places import TESTS_DIR, program_path

GOLDEN = TESTS_DIR / "golden"
TAGS = ("<|user|>", "<|assistant|>", "<|text|>", "<|code|>", "<|execution|>", "<|endofblock|>", "<|endofmessage|>")
SMALL_FILE = 40_000

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 331,
    "max_position_embeddings": 512,
}
TOKENIZER_SIZE = 300
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama_linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    },
    "llama_llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen3_yarn": {
        "model_type": "qwen3",
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        },
    },
}
IN_SEVERAL_FILES = ("llama_linear", "qwen2")
FAST_MODELS = ("llama_linear", "qwen2_tied", "qwen3_yarn")

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TWO_RANKS: dict[str, dict[str, Any]] = {"tp1": {}, "tp2_sp": TP2_SP, "pp2": {"pipeline_model_parallel_size": 2}}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp4_sp": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "pp2_uneven": {"pipeline_model_parallel_size": 2, "layers_per_stage": (1, 2)},
    "tp2_sp_pp2": TP2_SP | {"pipeline_model_parallel_size": 2},
}


def save_model(name: str, dtype: torch.dtype, folder: Path) -> None:
    """A checkpoint with all parameters random, biases and norms too, and the tokenizer beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(SIZES | MODELS[name])))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter_name.endswith("norm.weight")
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random) + is_norm)
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB" if name in IN_SEVERAL_FILES else "1GB")
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with exactly ``TOKENIZER_SIZE`` tokens and none of our tags."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        of_file = load_file(file)
        assert not weights.keys() & of_file.keys()
        weights |= of_file
    return weights


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def packed_batch() -> dict[str, Any]:
    """Three sequences, the last two with gaps in their positions, and three tokens of padding."""
    random = torch.Generator().manual_seed(2)
    lengths = (23, 17, 9)
    positions = [torch.arange(23), *(torch.randperm(400, generator=random)[:n].sort().values for n in lengths[1:])]
    total = sum(lengths) + 3
    return {
        "lengths": lengths,
        "tokens": torch.randint(SIZES["vocab_size"], (total,), generator=random),
        "positions": torch.cat((*positions, torch.zeros(3, dtype=torch.int64))),
    }


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    """Each sequence of the batch alone; the explicit mask keeps transformers from cutting it at the gaps."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = packed_batch()
    tokens, positions = (batch[name][:-3].split(batch["lengths"]) for name in ("tokens", "positions"))
    rows = []
    for ids, places in zip(tokens, positions, strict=True):
        mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.float32).min).triu(1)
        rows.append(model(ids[None], position_ids=places[None], attention_mask=mask).logits[0])
    return torch.cat(rows)


@dataclass
class Plan:
    """Jobs for ranks, and where they find their checkpoints and leave their results."""

    folder: Path
    layouts: dict[str, dict[str, Any]]
    jobs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    counted: list[dict[str, Any]] = field(default_factory=list)

    def checkpoint(self, name: str, dtype: str = "float32") -> Path:
        """The tiny checkpoint of this name, made on first use."""
        folder = self.folder / f"{name}_{dtype}"
        if not folder.exists():
            save_model(name, getattr(torch, dtype), folder)
        return folder

    def dist_checkpoint(self, name: str) -> Path:
        """The same in megatron-core's format, in several files."""
        folder = self.folder / f"{name}_dist"
        if not folder.exists():
            model = open_model_folder(str(self.checkpoint(name)))
            write_model_folder(
                model,
                str(folder),
                torch.float32,
                lambda target: write_weights(model.weights, model.arch, torch.float32, target, SMALL_FILE),
            )
        return folder

    def result(self, layout: str, job: str) -> Path:
        return self.folder / "results" / layout / job

    def add(self, layout: str, job: str, template: str = "magicoder", dtype: str = "float32", **rest: Any) -> None:
        model = {"dtype": dtype, **rest.pop("model")}
        out = str(self.result(layout, job))
        self.jobs.setdefault(layout, []).append(
            {"out": out, "model": model, "data": {"template": template}, **rest},
        )

    def add_round_trip(self, layout: str, name: str, dtype: str) -> None:
        batch = self.folder / "batch.pt"
        torch.save(packed_batch(), batch)
        one_stage = "pipeline_model_parallel_size" not in self.layouts[layout]
        self.add(
            layout,
            f"{name}_{dtype}",
            dtype=dtype,
            model={"path": str(self.checkpoint(name, dtype))},
            max_file_bytes=SMALL_FILE,
            **({"batch": str(batch)} if one_stage and dtype == "float32" else {}),
        )

    def run(self, processes: int) -> None:
        plan = {
            "layouts": [{"parallel": self.layouts[name], "jobs": jobs} for name, jobs in self.jobs.items()],
            "counted": self.counted,
        }
        file = self.folder / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        script = program_path("hf_checkpoint_ranks")
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", script, str(file), str(processes)]
        ranks = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert ranks.returncode == 0, ranks.stderr


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Results of two ranks."""
    plan = Plan(tmp_path_factory.mktemp("two_ranks"), TWO_RANKS)
    random_config = plan.folder / "config.json"
    shutil.copy(plan.checkpoint("llama_linear") / "config.json", random_config)
    tokenizer = {"path": str(plan.checkpoint("llama_linear"))}
    # 1024 rows for 331 tokens: the second rank of two holds nothing but padding.
    random_model = {"config": str(random_config), "make_vocab_size_divisible_by": 512}
    for layout in TWO_RANKS:
        for name in FAST_MODELS:
            plan.add_round_trip(layout, name, "float32")
            converted = str(plan.dist_checkpoint(name))
            plan.add(layout, f"{name}_from_dist", model={"path": converted})
            plan.add(layout, f"{name}_by_megatron", model={"path": converted}, dist=converted)
        plan.add(layout, "new_tags", "reflection", model={"path": str(GOLDEN / "llama_before")})
        plan.add(layout, "spare_rows", "reflection", model={"path": str(plan.checkpoint("qwen2_tied"))})
        plan.add(layout, "random", model=random_model, tokenizer=tokenizer)
    plan.counted.append(
        {
            "out": str(plan.folder),
            "model": {"path": str(plan.checkpoint("qwen2_tied")), "make_vocab_size_divisible_by": 1},
            "data": {"template": "magicoder"},
            "parallel": {"tensor_model_parallel_size": 4},
        }
    )
    plan.run(2)
    return plan


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Results of four ranks."""
    plan = Plan(tmp_path_factory.mktemp("four_ranks"), FOUR_RANKS)
    for layout in FOUR_RANKS:
        for name in MODELS:
            for dtype in ("float32", "bfloat16"):
                plan.add_round_trip(layout, name, dtype)
    plan.run(4)
    return plan


@pytest.mark.parametrize("layout", TWO_RANKS)
@pytest.mark.parametrize("name", FAST_MODELS)
def test_export_is_what_was_loaded(two_ranks: Plan, layout: str, name: str) -> None:
    assert_round_trip(two_ranks, layout, name, "float32")


@pytest.mark.parametrize("reader", ["from_dist", "by_megatron"])
@pytest.mark.parametrize("layout", TWO_RANKS)
@pytest.mark.parametrize("name", FAST_MODELS)
def test_converted_checkpoints_load(two_ranks: Plan, layout: str, name: str, reader: str) -> None:
    export = two_ranks.result(layout, f"{name}_{reader}") / "export"
    assert_same_tensors(read_weights(export), read_weights(two_ranks.checkpoint(name)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR_RANKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_export_of_four_ranks_is_what_was_loaded(four_ranks: Plan, layout: str, name: str, dtype: str) -> None:
    assert_round_trip(four_ranks, layout, name, dtype)


def assert_round_trip(plan: Plan, layout: str, name: str, dtype: str) -> None:
    original, result = plan.checkpoint(name, dtype), plan.result(layout, f"{name}_{dtype}")
    weights = read_weights(original)
    assert_same_tensors(read_weights(result / "export"), weights)
    assert_same_tensors(read_weights(result / "small_files"), weights)
    assert_index_is_right(result / "small_files", weights)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, result / "export"))
    assert (after["dtype"], after["torch_dtype"]) == (dtype, dtype)
    # Written anew, in the spellings of several readers; tests/engine/weights/test_export_config.py is about them.
    anew = ("dtype", "rope_parameters", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    assert {key: after[key] for key in before if key not in anew} == {
        key: value for key, value in before.items() if key not in anew
    }
    one, other = parse_architecture(before), parse_architecture(after)
    assert torch.equal(*(inverse_frequencies(arch.rope, arch.head_dim) for arch in (one, other)))
    assert replace(other, rope=one.rope) == one


def assert_index_is_right(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"].pop(name) == file.name for name in tensors)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_FILE
    assert not index["weight_map"]


@pytest.mark.parametrize("name", FAST_MODELS)
def test_transformers_loads_the_export(two_ranks: Plan, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, result = two_ranks.checkpoint(name), two_ranks.result("tp2_sp", f"{name}_float32")
    expected = AutoModelForCausalLM.from_pretrained(original)
    shutil.copy(result / "export" / "config.json", result / "small_files")
    for folder in (result / "export", result / "small_files"):
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert type(found) is type(expected)
        assert_same_tensors(found.state_dict(), expected.state_dict())
    text = "def add(a, b):\n    return a + b  # naïve\n"
    ids = AutoTokenizer.from_pretrained(result / "export")(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(original)(text).input_ids


@pytest.mark.parametrize("layout", ["tp1", "tp2_sp"])
@pytest.mark.parametrize("name", FAST_MODELS)
def test_logits_are_transformers(two_ranks: Plan, layout: str, name: str) -> None:
    assert_logits(two_ranks, layout, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp4", "tp2", "tp4_sp"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_four_ranks_are_transformers(four_ranks: Plan, layout: str, name: str) -> None:
    assert_logits(four_ranks, layout, name)


def assert_logits(plan: Plan, layout: str, name: str) -> None:
    found = torch.load(plan.result(layout, f"{name}_float32") / "logits.pt")
    expected = transformers_logits(plan.checkpoint(name))
    assert expected.std() > 0.5, "logits of this size make the tolerance mean something"
    torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_new_tags_have_the_mean_of_their_sub_tokens(two_ranks: Plan, layout: str) -> None:
    from transformers import AutoTokenizer

    export = two_ranks.result(layout, "new_tags") / "export"
    assert_same_tensors(read_weights(export), read_weights(GOLDEN / "llama_after"))
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 727
    assert AutoTokenizer.from_pretrained(export).convert_tokens_to_ids(list(TAGS)) == list(range(720, 727))


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_new_tags_take_spare_rows(two_ranks: Plan, layout: str) -> None:
    from transformers import AutoTokenizer

    original, export = two_ranks.checkpoint("qwen2_tied"), two_ranks.result(layout, "spare_rows") / "export"
    tokenizer = AutoTokenizer.from_pretrained(original)
    expected = read_weights(original)
    embedding = expected["model.embed_tokens.weight"]
    for number, tag in enumerate(TAGS):
        sub_tokens = tokenizer(tag, add_special_tokens=False).input_ids
        assert len(sub_tokens) > 1
        embedding[TOKENIZER_SIZE + number] = embedding[sub_tokens].mean(dim=0)

    assert_same_tensors(read_weights(export), expected)
    assert json.loads((export / "config.json").read_text())["vocab_size"] == SIZES["vocab_size"]


def test_random_weights_do_not_depend_on_the_layout(two_ranks: Plan) -> None:
    weights = read_weights(two_ranks.result("tp1", "random") / "export")
    for layout in ("tp2_sp", "pp2"):
        assert_same_tensors(read_weights(two_ranks.result(layout, "random") / "export"), weights)
    expected = read_weights(two_ranks.checkpoint("llama_linear"))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    matrices = {name: tensor for name, tensor in weights.items() if tensor.ndim == 2}
    assert all(0.018 < tensor.std() < 0.022 for tensor in matrices.values())
    assert len({tensor.double().sum().item() for tensor in matrices.values()}) == len(matrices)
    assert all(tensor.eq(1).all() for name, tensor in weights.items() if name not in matrices)


def test_a_rank_reads_only_its_slices(two_ranks: Plan) -> None:
    total = sum(tensor.nbytes for tensor in read_weights(two_ranks.checkpoint("qwen2_tied")).values())
    counts = json.loads((two_ranks.folder / "bytes_read.json").read_text())
    assert len(counts) == 4
    for count in counts:
        assert 0.25 <= count / total <= 0.30
