"""Ablations: what each variant changes, that token budgets are met, and that tables say what the rows say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import Config, DataFile
from reflectron.engine.data.store import TokenStore
from reflectron.engine.training.run import prepare
from reflectron.tools.cli import main
from reflectron.tools.eval.ablation import (
    GROUPS,
    AblationBase,
    AblationRun,
    FileKind,
    chosen_variants,
    kinds_of_files,
    overrides_of,
    plan_ablation,
    steps_for_tokens,
    tokens_of_run,
)
from reflectron.tools.eval.report import compare, write_ablation_report
from testkit.places import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
FILES = (DataFile(path="a b.jsonl", repeat=2.0), DataFile(path="c.jsonl", repeat=0.5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> AblationBase:
    """The quickstart, from any working directory."""
    names = ("reflection", "instruction", "instruction_query_answer")
    files = [{"path": str(QUICKSTART / "data" / f"{name}.jsonl")} for name in names]
    files[0]["repeat"] = 2  # type: ignore[assignment]
    paths = {
        "model.config": str(QUICKSTART / "model" / "config.json"),
        "tokenizer.path": str(QUICKSTART / "tokenizer"),
        "data.train": files,
        "data.validation": [],
    }
    words = [f"{key}={json.dumps(value)}" for key, value in paths.items()]
    return AblationBase(str(QUICKSTART / "train.yaml"), (*words, "data.workers=1"), tmp_path_factory.mktemp("ablation"))


@pytest.fixture(scope="module")
def store(base: AblationBase) -> TokenStore:
    inputs = prepare(base.load(), progress=False)
    assert inputs.train is not None
    return inputs.train


def planned(base: AblationBase, names: list[str], **settings: Any) -> dict[str, AblationRun]:
    runs = plan_ablation(base, names, **{"seeds": [7], "same_tokens": False, "progress": False} | settings)
    return {run.variant: run for run in runs}


def test_full_comes_first_and_once() -> None:
    assert chosen_variants(["method"], []) == ["full", *GROUPS["method"]]
    assert chosen_variants(["method"], ["upsampling_0", "full", "no_kl"]) == ["full", "no_kl", "upsampling_0"]
    assert len(chosen_variants(list(GROUPS), [])) == 1 + 4 + 5 + 6 + 4
    with pytest.raises(ValueError, match=r"--groups holds 'methods', expected names of: method, strategies"):
        chosen_variants(["methods"], [])
    with pytest.raises(ValueError, match=r"--variants holds 'no_mask', expected names of: full, no_dynamic_mask"):
        chosen_variants([], ["no_mask"])


def test_variants_are_what_they_are_called(base: AblationBase) -> None:
    full = base.load()
    kinds: list[FileKind] = ["reflection", "generation", "generation"]

    def variant(name: str) -> Config:
        return base.load(overrides_of(name, full.data.train, kinds))

    assert full.mask.strategy == "block"
    assert variant("no_dynamic_mask") == replace(full, mask=replace(full.mask, strategy="all"))
    assert variant("no_kl") == replace(full, loss=replace(full.loss, kl_weight=0.0))
    alone = variant("no_distillation")
    assert (alone.mask.strategy, alone.loss.kl_weight, alone.loss.ce_student_weight) == ("none", 0.0, 0.0)
    assert variant("no_reflection_data").data.train == full.data.train[1:]
    assert [file.repeat for file in variant("upsampling_3").data.train] == [3.0, 1.0, 1.0]
    assert variant("mask_random_token") == replace(full, mask=replace(full.mask, strategy="random_token"))
    assert variant("order_cte") == replace(full, mask=replace(full.mask, order="cte"))
    assert variant("full") == variant("order_ect") == variant("mask_block") == variant("upsampling_2") == full
    assert variant("upsampling_0") == variant("no_reflection_data")


def test_variants_that_come_to_the_same_are_one(base: AblationBase) -> None:
    runs = planned(base, ["full", "order_ect", "no_kl", "upsampling_2"])
    assert {name: run.same_as for name, run in runs.items()} == {"full": ("order_ect", "upsampling_2"), "no_kl": ()}


def test_a_runs_command_line_is_its_configuration(base: AblationBase) -> None:
    runs = plan_ablation(base, ["full", "no_kl"], [0, 3407], same_tokens=False, progress=False)
    assert [(run.variant, run.seed) for run in runs] == [("full", 0), ("full", 3407), ("no_kl", 0), ("no_kl", 3407)]
    run = runs[2]
    assert run.words[:2] == ("train", base.path)
    assert replace(base, overrides=run.words[2:]).load() == run.config
    assert run.config.output_dir == str(base.out / "no_kl" / "seed-0")
    assert {run.config.data.store_dir for run in runs} == {str(base.out / "token_store")}
    # Two epochs of 198 samples listed twice and 2 x 99 others.
    assert run.samples == 2 * (2 * 198 + 2 * 99)


def test_files_are_told_apart_by_their_samples(store: TokenStore) -> None:
    assert kinds_of_files(store, 3) == ["reflection", "generation", "generation"]
    word = overrides_of("upsampling_1", FILES, ["reflection", "generation"])
    assert json.loads(word[0].removeprefix("data.train=")) == [
        {"path": "a b.jsonl", "repeat": 1.0, "split": "train", "revision": None},
        {"path": "c.jsonl", "repeat": 0.5, "split": "train", "revision": None},
    ]
    for kinds, said in (
        (["mixed", "generation"], "a b.jsonl holds reflection and instruction samples, expected one kind"),
        (["generation", "generation"], "no file of reflection samples"),
        (["reflection", "reflection"], "no_reflection_data leaves nothing to train"),
    ):
        with pytest.raises(ValueError, match=said):
            overrides_of("no_reflection_data", FILES, kinds)  # type: ignore[arg-type]


def test_budgets_are_equal_to_a_step(base: AblationBase) -> None:
    short = replace(base, overrides=(*base.overrides, "train.epochs=0.25"))
    runs = planned(short, ["full", "no_dynamic_mask", "no_reflection_data"], same_tokens=True)
    stores = {name: run.inputs.train for name, run in runs.items()}
    tokens = {}
    for name, run in runs.items():
        store = stores[name]
        assert store is not None
        tokens[name] = tokens_of_run(run.config, store)
    assert runs["full"].config.train.steps is None
    for name in ("no_dynamic_mask", "no_reflection_data"):
        steps = runs[name].config.train.steps
        assert steps is not None
        assert abs(tokens[name] - tokens["full"]) <= 0.6 * tokens[name] / steps, name
        # Of 0.25 epochs.
        assert steps > 10


def test_tokens_of_a_constant_run_are_counted_exactly(base: AblationBase, store: TokenStore) -> None:
    config = base.load(["mask.strategy=none", "train.epochs=1"])
    once = int(store.lengths[store.file_index > 0].sum() + 2 * store.lengths[store.file_index == 0].sum())
    assert tokens_of_run(config, store) == once
    # 594 samples, 16 a step.
    assert steps_for_tokens(config, store, once) == 37


def row(variant: str, seed: int, passed: list[int], **more: Any) -> dict[str, Any]:
    tasks = {f"own/{number}": value for number, value in enumerate(passed)}
    counts = {"tokens": 1000 + seed, "samples": 64, "steps": 4, "last_loss": 2.5, "n_tasks": len(passed)}
    same = {"same_as": [], "overrides": [], "dataset": "mine.jsonl", "passed": {"base": tasks}}
    return {"variant": variant, "seed": seed, **counts, **same, **more}


def test_differences_are_of_seeds_in_common() -> None:
    full = [row("full", 0, [1, 1, 0, 0]), row("full", 1, [1, 1, 1, 0])]
    found = compare([*full, row("no_kl", 1, [1, 0, 0, 0]), row("no_kl", 2, [0, 0, 0, 0])], "base")
    assert found["full"].minus_full is None
    assert found["no_kl"].passed.value == 1 / 8
    assert found["no_kl"].minus_full is not None
    assert found["no_kl"].minus_full.value == -2 / 4
    alone = compare([full[0], row("no_kl", 5, [1, 0, 0, 0])], "base")
    assert alone["no_kl"].minus_full is None


def test_tasks_are_paired_by_name_not_by_place() -> None:
    full, other = row("full", 0, [1, 0, 0, 1]), row("no_kl", 0, [1, 0, 0, 1])
    other["passed"] = {"base": dict(reversed(other["passed"]["base"].items()))}
    same, moved = compare([full, row("no_kl", 0, [1, 0, 0, 1])], "base"), compare([full, other], "base")
    assert moved["no_kl"] == same["no_kl"]
    other["passed"]["base"] = {"own/0": 0, "own/1": 1, "own/2": 1, "own/3": 0}
    assert compare([full, other], "base")["no_kl"].minus_full != same["no_kl"].minus_full


def test_the_table_shows_the_rows(tmp_path: Path) -> None:
    rows = [
        row("full", 0, [1, 1, 0, 0], same_as=["upsampling_2"]),
        row("full", 1, [1, 1, 0, 0], same_as=["upsampling_2"]),
        row("no_kl", 0, [1, 0, 0, 0], last_loss=None, overrides=["loss.kl_weight=0.0"]),
    ]
    write_ablation_report(tmp_path, rows, config="run.yaml", same_tokens=True)
    page = (tmp_path / "ablation.md").read_text()
    assert "# Ablation of run.yaml on mine.jsonl, 4 tasks" in page
    assert "| variant | seeds | mine.jsonl, % | minus full, points | tokens | samples | steps | last loss |" in page
    # Wilson's interval of 2 in 4.
    assert "| full, upsampling_2 | 2 | 50.0 (15.0 to 85.0) |  | 1,000 | 64 | 4 | 2.500 |" in page
    assert "| no_kl | 1 | 25.0 (4.6 to 69.9) | -25.0 (" in page
    assert "| not finite |" in page
    assert "as many tokens as `full`" in page
    assert "- no_kl: `loss.kl_weight=0.0`" in page
    assert (tmp_path / "ablation.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1,x"], "--seeds holds 'x', expected numbers of 0 or more"),
        (["--groups", "masks"], "--groups holds 'masks'"),
        (["--dataset", "humanevil"], "--dataset is 'humanevil'"),
        (["data.train=[]"], "data.train is empty"),
    ],
)
def test_mistakes_are_found_before_training(
    base: AblationBase, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = ["--dataset", "humaneval", "--data", str(ROOT / "tests/benchmarks/humaneval_plus_subset.jsonl")]
    command = ["eval", "ablate", base.path, *base.overrides, "--out", str(tmp_path), *benchmark]
    assert main([*command, "--sandbox", "none", "--i-understand", *words]) == 2
    assert said in capsys.readouterr().err
