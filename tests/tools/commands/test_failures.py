"""What a user gets wrong is one line on stderr that names the key or file, with exit code 2, before a rank starts."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools import cli
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
SAMPLES, MODEL = GOLDEN_DIR / "samples.jsonl", GOLDEN_DIR / "llama_before"
RUN: dict[str, Any] = {
    "output_dir": "out",
    "model": {"path": str(MODEL), "dtype": "float32"},
    "tokenizer": {"path": str(GOLDEN_DIR / "tokenizer_before")},
    "data": {"train": [{"path": str(SAMPLES)}], "validation": [{"path": str(SAMPLES)}], "max_length": 448},
    "batch": {"global_batch_size": 8, "tokens_per_microbatch": 1024},
    "parallel": {"tensor_model_parallel_size": 2},
    "train": {"steps": 1},
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good configuration and inputs that are not."""
    monkeypatch.chdir(tmp_path)
    # JSON is YAML.
    Path("run.yaml").write_text(json.dumps(RUN), encoding="utf-8")
    Path("wrong_key.yaml").write_text(json.dumps(RUN | {"trian": {}}), encoding="utf-8")
    Path("syntax.yaml").write_text("model: [1", encoding="utf-8")
    Path("empty_folder").mkdir()
    Path("empty.jsonl").touch()
    Path("bad.parquet").write_text("hello", encoding="utf-8")
    Path("bad.jsonl").write_text('{"query": \n' * 3, encoding="utf-8")
    Path("one_bad.jsonl").write_text(SAMPLES.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    Path("wrapped.json").write_text('{"data": [{"query": "x"}, {"query": "y"}]}', encoding="utf-8")
    Path("no_weights").mkdir()
    shutil.copy(MODEL / "config.json", "no_weights")
    shutil.copytree(MODEL, "another_model")
    settings = json.loads(Path("another_model/config.json").read_text(encoding="utf-8"))
    Path("another_model/config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}), encoding="utf-8")
    shutil.copytree(MODEL, "wider_model")
    wider = settings | {"intermediate_size": 2 * settings["intermediate_size"]}
    Path("wider_model/config.json").write_text(json.dumps(wider), encoding="utf-8")
    return tmp_path


TRAIN = ["train", "run.yaml"]
MISTAKES = {
    "backend for CUDA": (
        ["backends.attention=torch_varlen"],
        ["backends.attention is 'torch_varlen', expected 'auto' or 'sdpa': needs CUDA"],
    ),
    "no weights": (["model.path=no_weights"], ["no_weights has no model.safetensors"]),
    "weights of another model": (
        ["model.path=another_model"],
        ["another_model has no tensor model.layers.3.", "do not belong together"],
    ),
    "missing data": (["data.train[0].path=missing.jsonl"], ["data file missing.jsonl does not exist"]),
    "missing validation data": (["data.validation[0].path=missing.jsonl"], ["data file missing.jsonl does not exist"]),
    "folder as data": (["data.train[0].path=empty_folder"], ["data file empty_folder is a folder, expected a file"]),
    "damaged data": (["data.train[0].path=bad.parquet"], ["data file bad.parquet cannot be read: "]),
    "no record": (["data.train[0].path=empty.jsonl"], ["data file empty.jsonl holds no record"]),
    "only bad records": (
        ["data.train[0].path=bad.jsonl"],
        ["data file bad.jsonl: 3 of 3 records are rejected", "out/token_store/train/rejects.jsonl", "(0.05)"],
    ),
    "too many rejects": (
        ["data.train[0].path=one_bad.jsonl", "data.max_reject_share=0"],
        ["data file one_bad.jsonl: 1 of 26 records are rejected", "'bad JSON' (1)"],
    ),
    "only long samples": (["data.max_length=16"], ["data.max_length is 16, expected more: no sample is left of"]),
    "a JSON object that holds the records": (
        ["data.train[0].path=wrapped.json"],
        ["data file wrapped.json cannot be read: it is one JSON object, whose list 'data' holds 2 objects"],
    ),
    "no data": (["data.train=[]"], ["data.train is empty, expected at least one file"]),
    "missing model": (["model.path=missing"], ["missing: No such file or directory, expected a Hugging Face config"]),
    "model without config": (["model.path=empty_folder"], ["empty_folder/config.json: No such file or directory"]),
    "no model": (["model.path=null"], ["model.path is null, expected a checkpoint folder"]),
    "two models": (["model.config=x.json"], ["model.path and model.config are both set"]),
    "missing tokenizer": (["tokenizer.path=missing"], ["no tokenizer at missing: expected a folder with tokenizer"]),
    "config without tokenizer": (
        ["model.path=null", "model.config=x.json", "tokenizer.path=null"],
        ["tokenizer.path is null, expected a folder"],
    ),
    "budget below a sample's views": (
        ["batch.tokens_per_microbatch=448"],
        ["batch.tokens_per_microbatch is 448, expected at least 753: record 14 of", str(SAMPLES)],
    ),
    "budget below the longest sample": (
        ["batch.tokens_per_microbatch=128"],
        ["batch.tokens_per_microbatch is 128, expected at least data.max_length (448)"],
    ),
    "heads not divided": (
        ["parallel.tensor_model_parallel_size=3", "batch.tokens_per_microbatch=1026"],
        ["parallel.tensor_model_parallel_size is 3, expected a divisor of the model's num_attention_heads (8)"],
    ),
    "more stages than layers": (
        ["parallel.pipeline_model_parallel_size=4"],
        ["parallel.pipeline_model_parallel_size is 4, expected at most 3 (layers)"],
    ),
    "wrong layers of stages": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.layers_per_stage=[1,1]"],
        ["parallel.layers_per_stage"],
    ),
    "more chunks than layers": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.virtual_pipeline_model_parallel_size is 2, expected at most 1: the model has 3 layers"],
    ),
    "offload without a GPU": (
        ["optimizer.cpu_offload_fraction=1", "model.dtype=bfloat16"],
        ["optimizer.cpu_offload_fraction is 1.0, expected the default: it needs CUDA"],
    ),
    "wrong key": (["optimizer.learningrate=1"], ["unknown key optimizer.learningrate; did you mean", "learning_rate"]),
    "wrong type": (["train.steps=many"], ["train.steps is 'many', expected"]),
    "wrong choice": (["mask.strategy=blocks"], ["mask.strategy is 'blocks', expected"]),
    "output is a file": (
        ["output_dir=run.yaml"],
        ["output_dir is run.yaml, expected a folder that can be written: File exists"],
    ),
    "no step": (["data.train[0].repeat=0.001", "train.steps=null"], ["the run has 0 steps: train.epochs 2 of data."]),
    "W&B without a key": (["train.wandb_project=demo"], ["train.wandb_project is 'demo', but "]),
}


def check_error(stderr: str, subcommand: str, texts: list[str]) -> None:
    assert stderr.startswith(f"reflectron {subcommand}: error: ")
    assert stderr.count("\n") == 1, stderr
    for text in texts:
        assert text in stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_run(mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Some are mistakes on the CPU only.
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    overrides, texts = MISTAKES[mistake]
    assert cli.main([*TRAIN, *overrides]) == 2
    check_error(capsys.readouterr().err, "train", texts)
    # Ranks would have left their logs.
    assert not Path("out/logs").exists()


@pytest.mark.parametrize(
    ("file", "texts"),
    [
        ("missing.yaml", ["missing.yaml: No such file or directory"]),
        ("syntax.yaml", ["syntax.yaml, line "]),
        ("wrong_key.yaml", ["wrong_key.yaml: unknown key trian; did you mean train?"]),
        ("empty_folder", ["empty_folder"]),
    ],
)
def test_mistakes_in_the_file(file: str, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", file]) == 2
    check_error(capsys.readouterr().err, "train", texts)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["data.validation=[]"], "data.validation is empty, expected at least one file"),
        (["--model", "missing"], "missing: No such file or directory, expected a Hugging Face config.json"),
    ],
)
def test_mistakes_in_validation(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "run.yaml", *words]) == 2
    check_error(capsys.readouterr().err, "validate", [text])


def run_command(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The real command, and the seconds that processors spent on it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "reflectron.tools.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes whose working directory is ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def test_the_real_command_ends_at_once() -> None:
    done, seconds = run_command(*TRAIN, "data.train[0].path=missing.jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "reflectron train: error: data file missing.jsonl does not exist\n"
    # Nothing heavy is imported: torch alone would take more.
    assert seconds < 1.5


@pytest.mark.slow
def test_a_failure_of_a_rank_ends_all_ranks(workplace: Path) -> None:
    """Tensors are read by the ranks, so that they are the first to see one of another shape."""
    done, _ = run_command(*TRAIN, "model.path=wider_model")
    assert done.returncode == 2
    assert re.search(r"reflectron train: error: wider_model/\S+: model\.layers\.0\.mlp\.\S+ has shape ", done.stderr)
    assert "Traceback" not in done.stderr
    assert "failed first: exit code 2" in done.stderr
    # This test's own process works here, too.
    assert len(processes_in(workplace)) == 1
    assert not Path("out/metrics.jsonl").exists()
