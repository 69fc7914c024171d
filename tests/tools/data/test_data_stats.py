"""``data stats``: its sums are those of the samples, and the reference's tokens are counted as it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reflectron.engine.config import DataFile
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.tools import cli
from reflectron.tools.data.stats import reference_tokens
from testkit.places import ROOT

FOLDER = ROOT / "examples" / "quickstart"
REFLECTION, INSTRUCTION = (str(FOLDER / "data" / f"{name}.jsonl") for name in ("reflection", "instruction"))
TOKENIZER = str(FOLDER / "tokenizer")


def samples(path: str) -> list[TokenizedSample]:
    tokenizer = load_tokenizer(TOKENIZER, "reflection")
    return [tokenize(r.conversation(), tokenizer, "reflection", 4096) for r in read_records(DataFile(path=path))]


def stats(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "stats.json"
    assert cli.main(["data", "stats", "--json", str(out), *words]) == 0
    return json.loads(out.read_bytes())


def test_sums_are_those_of_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = stats(
        tmp_path,
        *("batch.global_batch_size=16", "train.epochs=2", "parallel.data_parallel_size=2"),
        *("--steps", "0", "--tokenizer", TOKENIZER, "--data", REFLECTION, INSTRUCTION),
    )
    reflection, instruction = samples(REFLECTION), samples(INSTRUCTION)
    teacher = sum(len(sample.input_ids) for sample in reflection)
    lengths = [len(sample.input_ids) for sample in instruction]
    files, steps = found["files"], found["steps"]
    assert [(f["samples"], f["rejected"], f["reflection"]) for f in files] == [(198, 0, 198), (99, 0, 0)]
    assert files[0]["tokens_mean"] == pytest.approx(teacher / 198)
    assert (files[1]["tokens_max"], files[1]["tokens_p50"]) == (max(lengths), np.median(lengths))
    # At the end of the schedule the student sees what follows the reflection sequence, and nothing else.
    final = sum(len(sample.input_ids) - sample.prefix_end for sample in reflection)
    assert files[0]["student_share"]["1.0"] == pytest.approx(final / teacher)
    assert list(files[0]["student_share"].values()) == sorted(files[0]["student_share"].values(), reverse=True)
    assert files[1]["student_share"] is None
    assert found["total_steps"] == len(steps) == -(-2 * 297 // 16)
    assert sum(step["teacher"] for step in steps) == 2 * teacher
    assert sum(step["generation"] for step in steps) == 2 * sum(lengths)
    assert sum(step["reference"] for step in steps) == 2 * (2 * teacher + sum(lengths))
    for step in steps:
        assert step["microbatches"] % 2 == 0
        real = step["teacher"] + step["student"] + step["generation"]
        assert step["fill"] == pytest.approx(real / step["padded"])
    assert f"{len(steps)} of {len(steps)} steps: fill" in capsys.readouterr().out


def test_a_few_steps_of_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output_dir: {tmp_path}\ntokenizer: {{path: {TOKENIZER}}}\ndata: {{train: [{{path: {REFLECTION}}}]}}\n"
    )
    found = stats(tmp_path, str(config), "batch.global_batch_size=16", "train.steps=100", "--steps", "4")
    assert [step["step"] for step in found["steps"]] == [12, 37, 62, 87]
    assert [step["mask_rate"] for step in found["steps"]] == [0.13, 0.38, 0.63, 0.88]
    # The run itself finds the tokens that were counted.
    assert list((tmp_path / "token_store" / "train").glob("*.arrow"))


def test_reference_pads_samples_of_similar_length_and_runs_reflection_twice() -> None:
    lengths, reflection = np.array([10, 3, 7, 4, 20]), np.array([False, False, False, True, True])
    assert reference_tokens(lengths, reflection, 1) == 10 + 3 + 7 + 2 * (4 + 20)
    assert reference_tokens(lengths, reflection, 2) == 2 * 10 + 3 + 2 * (2 * 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected either CONFIG or --data with --tokenizer"),
        (["--data", REFLECTION], "expected either CONFIG or --data with --tokenizer"),
        (["run.yaml", "--tokenizer", TOKENIZER], "expected either CONFIG or --data with --tokenizer"),
        (["run.yaml", "--steps", "-1"], "--steps is -1, expected at least 0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "stats", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_hours_of_a_model_on_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(FOLDER.parent / "recipes" / "models" / "codellama-7b.json")
    words = ("--tokenizer", TOKENIZER, "--data", REFLECTION, "--steps", "1", "--plan", model, "--gpus", "8")
    hours = [
        stats(tmp_path, "batch.global_batch_size=16", f"train.epochs={epochs}", *words)["planned_gpu_hours"]
        for epochs in (1, 4)
    ]
    assert hours[1] == pytest.approx(4 * hours[0], rel=0.1)
    assert "GPU hours in the fastest layout" in capsys.readouterr().out
