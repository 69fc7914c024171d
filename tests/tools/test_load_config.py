"""The configuration loader: what it accepts, what it says about what it does not, and the page written from it."""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from reflectron.engine.config import Config, DataFile, LossConfig
from reflectron.tools.load_config import load_config, to_yaml
from testkit.places import ROOT

DOCS = ROOT / "docs"
config_reference: Callable[[], str] = runpy.run_path(str(DOCS / "config_reference.py"))["config_reference"]

RUN = """\
seed: 7
data:
  train:
  - path: a.jsonl
  - {path: b.jsonl, repeat: 2}
optimizer:
  learning_rate: 5e-5
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)


def load_text(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(str(path), list(overrides))


def test_file_and_defaults(run_yaml: str) -> None:
    config = load_config(run_yaml, [])
    assert config.seed == 7
    assert config.data.train == (DataFile(path="a.jsonl"), DataFile(path="b.jsonl", repeat=2.0))
    assert config.optimizer.learning_rate == 5e-5
    assert config.batch == Config().batch


def test_integer_becomes_float(run_yaml: str) -> None:
    repeat = load_config(run_yaml, []).data.train[1].repeat
    assert repeat == 2.0
    assert isinstance(repeat, float)


def test_overrides_win_in_their_order(run_yaml: str) -> None:
    modules = "parallel.recompute_modules=[mlp]"
    words = [
        modules,
        "parallel.overlap_grad_reduce=true",
        "seed=8",
        "seed=9",
        "optimizer.learning_rate=1e-4",
        "data.train[0].path=x",
        "train.steps=null",
    ]
    config = load_config(
        run_yaml, [*words, "parallel.pipeline_model_parallel_size=2", "parallel.layers_per_stage=[3, 1]"]
    )
    assert config.seed == 9
    assert config.optimizer.learning_rate == 1e-4
    assert [file.path for file in config.data.train] == ["x", "b.jsonl"]
    assert config.train.steps is None
    assert config.parallel.layers_per_stage == (3, 1)
    assert config.parallel.recompute_modules == ("mlp",)
    assert config.parallel.overlap_grad_reduce is True


def test_a_value_may_hold_an_equals_sign(run_yaml: str) -> None:
    assert load_config(run_yaml, ["output_dir=out/lr=1"]).output_dir == "out/lr=1"


def test_a_commented_out_section_means_its_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, "seed: 1\nloss:\n  # kl_weight: 2\n").loss == Config().loss


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learnig_rate=1", "unknown key optimizer.learnig_rate; did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("train.seed=1", "unknown key train.seed; did you mean seed?"),
        ("data.train[0].pth=x", "unknown key data.train[0].pth; did you mean data.train[0].path?"),
        ("tokenizer.zzz=1", "unknown key tokenizer.zzz; expected one of path"),
        ("seed=1.5", "seed is 1.5, expected integer"),
        ("seed=true", "seed is true, expected integer"),
        ("seed=", "seed is null, expected integer"),
        ("train.steps=many", "train.steps is 'many', expected integer or null"),
        (
            "parallel.overlap_grad_reduce=yes please",
            "parallel.overlap_grad_reduce is 'yes please', expected true or false",
        ),
        ("train.tensorboard=1", "train.tensorboard is 1, expected true or false"),
        ("optimizer.learning_rate=high", "optimizer.learning_rate is 'high', expected number"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate is nan, expected number"),
        ("output_dir=3", "output_dir is 3, expected text (put it in quotes)"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd', expected adamw or adafactor"),
        ("loss=3", "loss is 3, expected a section"),
        ("data.train=x", "data.train is 'x', expected list of section"),
        ("data.train=[{repeat: 2}]", "data.train[0].path is missing"),
        ("parallel.layers_per_stage=[1, a]", "parallel.layers_per_stage[1] is 'a', expected integer"),
        ("seed", "'seed' is not an override, expected key=value"),
        ("seed=${oc.env:HOME}", "'seed=${oc.env:HOME}', but interpolation with ${...} is not supported"),
        ("seed=[1", "the value of 'seed=[1' is not YAML"),
        ("data.train[2].path=x", "'data.train[2].path=x' cannot be set: list index out of range"),
    ],
)
def test_a_wrong_override_is_named(run_yaml: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"command line: {message}")) as caught:
        load_config(run_yaml, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsede: 2\n", ": unknown key sede; did you mean seed?"),
        ("1: 2\n", ": unknown key 1; expected one of output_dir, seed"),
        ("seed: '1'\n", ": seed is '1', expected integer"),
        ("seed: 1\nseed: 2\n", ", line 2: found duplicate key seed"),
        ("seed: [1\nmodel: 2\n", ", line 2: "),
        ("seed: ${oc.env:HOME}\n", ": seed is '${oc.env:HOME}', but interpolation with ${...} is not supported"),
        ("seed: ${oc\n", ": seed holds '${', but interpolation with ${...} is not supported"),
        ("# nothing yet\n", " is empty, expected sections"),
        ("", " is empty, expected sections"),
        ("- seed: 1\n", " holds a list, expected sections"),
        ("3\n", " holds no sections, expected"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path / 'run.yaml'}{message}")) as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_file_is_not_blamed_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml: unknown key loss\.kl"):
        load_text(tmp_path, "loss: {kl: 1}\n", "loss.kl_weight=2", "seed=3")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"model\.bin is not "):
        load_config(str(path), [])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_config(str(tmp_path / "none.yaml"), [])


def test_values_are_still_checked_by_the_sections(run_yaml: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.beta1 is 1\.5, expected 0 to below 1"):
        load_config(run_yaml, ["optimizer.beta1=1.5"])


def test_shown_yaml_loads_back(run_yaml: str, tmp_path: Path) -> None:
    words = ["train.wandb_project='1e-5'", "optimizer.eps=1e-30", "data.store_dir='null'", "output_dir='a: b # c'"]
    config = load_config(run_yaml, words)
    assert config.train.wandb_project == "1e-5"
    assert config.data.store_dir == "null"
    assert load_text(tmp_path, to_yaml(config)) == config


def test_configuration_reference_is_up_to_date() -> None:
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == config_reference(), (
        "run: python docs/config_reference.py > docs/configuration.md"
    )


def test_every_key_has_a_meaning() -> None:
    page = config_reference()
    for section in dataclasses.fields(Config):
        if section.default_factory is not dataclasses.MISSING:
            for field in dataclasses.fields(section.default_factory()):
                assert f"| `{section.name}.{field.name}` |" in page


@pytest.mark.parametrize(
    "text", ["seed: " + "9" * 5000, "seed: !!int x", "null: 3", "[" * 5000, "seed: 2026-99-99", "seed: !!binary '%'"]
)
def test_yaml_that_python_has_no_value_for_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))) as refusal:
        load_text(tmp_path, text + "\n")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("folder", ["", "  ", "a\0b"])
def test_a_run_has_a_folder(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^output_dir is '.*', expected the path of a folder$"):
        Config(output_dir=folder)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 101.0])
def test_temperatures_that_round_the_divergence_away(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.temperature is {temperature}, expected above 0 and at most 100$"):
        LossConfig(temperature=temperature)
