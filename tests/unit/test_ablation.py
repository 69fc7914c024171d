"""Ablations: what each variant changes, that token budgets are met, and that tables say what the rows say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import DataFile
from reflectron.engine.data.store import TokenStore
from reflectron.engine.preparation import prepare
from reflectron.tools.cli import main
from reflectron.tools.eval.ablation_plan import Base, Run, plan
from reflectron.tools.eval.ablation_report import compare, write_report
from reflectron.tools.eval.token_budget import steps_for_tokens, tokens_of_run
from reflectron.tools.eval.variants import GROUPS, chosen, kinds_of_files, overrides_of

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
FILES = (DataFile(path="a b.jsonl", repeat=2.0), DataFile(path="c.jsonl", repeat=0.5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
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
    return Base(str(QUICKSTART / "train.yaml"), (*words, "data.workers=1"), tmp_path_factory.mktemp("ablation"))


@pytest.fixture(scope="module")
def store(base: Base) -> TokenStore:
    inputs = prepare(base.load(), progress=False)
    assert inputs.train is not None
    return inputs.train


def planned(base: Base, names: list[str], **settings: Any) -> dict[str, Run]:
    runs = plan(base, names, **{"seeds": [7], "same_tokens": False, "progress": False} | settings)
    return {run.variant: run for run in runs}


def test_full_comes_first_and_once() -> None:
    assert chosen(["method"], []) == ["full", *GROUPS["method"]]
    assert chosen(["method"], ["upsampling_0", "full", "no_kl"]) == ["full", "no_kl", "upsampling_0"]
    assert len(chosen(list(GROUPS), [])) == 1 + 4 + 5 + 6 + 4
    with pytest.raises(ValueError, match=r"--groups holds 'methods', expected names of: method, strategies"):
        chosen(["methods"], [])
    with pytest.raises(ValueError, match=r"--variants holds 'no_mask', expected names of: full, no_dynamic_mask"):
        chosen([], ["no_mask"])


def test_variants_are_what_they_are_called(base: Base) -> None:
    runs = planned(base, chosen(list(GROUPS), []))
    full = runs["full"].config
    assert full.mask.strategy == "block"
    assert (runs["no_dynamic_mask"].config.mask.strategy, runs["no_dynamic_mask"].config.loss) == ("all", full.loss)
    assert (runs["no_kl"].config.loss.kl_weight, runs["no_kl"].config.mask) == (0.0, full.mask)
    alone = runs["no_distillation"].config
    assert (alone.mask.strategy, alone.loss.kl_weight, alone.loss.ce_student_weight) == ("none", 0.0, 0.0)
    assert [Path(file.path).stem for file in runs["no_reflection_data"].config.data.train] == [
        "instruction",
        "instruction_query_answer",
    ]
    assert [file.repeat for file in runs["upsampling_3"].config.data.train] == [3.0, 1.0, 1.0]
    assert runs["mask_random_token"].config.mask.strategy == "random_token"
    assert runs["order_cte"].config.mask.order == "cte"
    # The same configuration under several names is trained once.
    assert runs["full"].same_as == ("mask_block", "order_ect", "upsampling_2")
    assert runs["no_reflection_data"].same_as == ("upsampling_0",)
    assert len(runs) == 20 - 4


def test_a_runs_command_line_is_its_configuration(base: Base) -> None:
    runs = plan(base, ["full", "no_kl"], [0, 3407], same_tokens=False, progress=False)
    assert [(run.variant, run.seed) for run in runs] == [("full", 0), ("full", 3407), ("no_kl", 0), ("no_kl", 3407)]
    run = runs[2]
    assert run.words[:2] == ("train", base.path)
    assert base.__class__(base.path, run.words[2:], base.out).load() == run.config
    assert run.config.output_dir == str(base.out / "no_kl" / "seed-0")
    assert {run.config.data.store_dir for run in runs} == {str(base.out / "token_store")}
    # Two epochs of 198 samples listed twice and 2 x 99 others.
    assert run.samples == 2 * (2 * 198 + 2 * 99)


def test_files_are_told_apart_by_their_samples(store: TokenStore) -> None:
    assert kinds_of_files(store, 3) == ["reflection", "generation", "generation"]
    word = overrides_of("upsampling_1", FILES, ["reflection", "generation"])
    assert json.loads(word[0].removeprefix("data.train=")) == [
        {"path": "a b.jsonl", "repeat": 1.0, "split": "train"},
        {"path": "c.jsonl", "repeat": 0.5, "split": "train"},
    ]
    for kinds, said in (
        (["mixed", "generation"], "a b.jsonl holds reflection and instruction samples, expected one kind"),
        (["generation", "generation"], "no file of reflection samples"),
        (["reflection", "reflection"], "no_reflection_data leaves nothing to train"),
    ):
        with pytest.raises(ValueError, match=said):
            overrides_of("no_reflection_data", FILES, kinds)  # type: ignore[arg-type]


def test_budgets_are_equal_to_a_step(base: Base) -> None:
    runs = planned(base, ["full", "no_dynamic_mask", "no_reflection_data"], same_tokens=True)
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
        assert steps > 75


def test_tokens_of_a_constant_run_are_counted_exactly(base: Base, store: TokenStore) -> None:
    config = base.load(["mask.strategy=none", "train.epochs=1"])
    once = int(store.lengths[store.file_index > 0].sum() + 2 * store.lengths[store.file_index == 0].sum())
    assert tokens_of_run(config, store) == once
    assert steps_for_tokens(config, store, 3 * once) in range(110, 113)


def row(variant: str, seed: int, passed: list[int], **more: Any) -> dict[str, Any]:
    tasks = {f"own/{number}": value for number, value in enumerate(passed)}
    counts = {"tokens": 1000 + seed, "samples": 64, "steps": 4, "last_loss": 2.5, "n_tasks": len(passed)}
    same = {"same_as": [], "overrides": [], "dataset": "mine.jsonl", "passed": {"base": tasks}}
    return {"variant": variant, "seed": seed, **counts, **same, **more}


def test_differences_are_of_seeds_in_common() -> None:
    full = [row("full", 0, [1, 1, 0, 0]), row("full", 1, [1, 1, 1, 0])]
    found = compare([*full, row("no_kl", 1, [1, 0, 0, 0]), row("no_kl", 2, [0, 0, 0, 0])], "base")
    assert found["full"].less_full is None
    assert found["no_kl"].passed.value == 1 / 8
    assert found["no_kl"].less_full is not None
    assert found["no_kl"].less_full.value == -2 / 4
    alone = compare([full[0], row("no_kl", 5, [1, 0, 0, 0])], "base")
    assert alone["no_kl"].less_full is None


def test_the_table_shows_the_rows(tmp_path: Path) -> None:
    rows = [
        row("full", 0, [1, 1, 0, 0], same_as=["upsampling_2"]),
        row("full", 1, [1, 1, 0, 0], same_as=["upsampling_2"]),
        row("no_kl", 0, [1, 0, 0, 0], last_loss=None, overrides=["loss.kl_weight=0.0"]),
    ]
    write_report(tmp_path, rows, config="run.yaml", same_tokens=True)
    page = (tmp_path / "ablation.md").read_text()
    assert "# Ablation of run.yaml on mine.jsonl, 4 tasks" in page
    assert "| variant | seeds | mine.jsonl, % | less full, points | tokens | samples | steps | last loss |" in page
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
    base: Base, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = ["--dataset", "humaneval", "--data", str(ROOT / "tests/benchmarks/humaneval_plus_subset.jsonl")]
    command = ["eval", "ablate", base.path, *base.overrides, "--out", str(tmp_path), *benchmark]
    assert main([*command, "--sandbox", "none", "--i-understand", *words]) == 2
    assert said in capsys.readouterr().err
