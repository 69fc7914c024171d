"""``reflectron inspect`` on the recorded samples: ids, labels, masks, rows, losses, gradient norms, and the drawing.

Every run of the command imports megatron-core once, so the slow tests run it for several strategies in one process:
``test_inspect.py ARGUMENTS...`` with one JSON list of command words an argument.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectron.tools import cli
from testkit.places import TESTS_DIR

GOLDEN_DIR = TESTS_DIR / "golden"
GOLDEN: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text(encoding="utf-8"))
KEPT = [sample for sample in GOLDEN["samples"] if not sample["dropped"]]
MASKS = GOLDEN["masks"]["values"]
RATES = {name: rate["rate"] for name, rate in GOLDEN["masks"]["rates"].items()}
DATA = ["--data", str(GOLDEN_DIR / "samples.jsonl"), "--tokenizer", str(GOLDEN_DIR / "tokenizer_before")]
MODEL = ["--model", str(GOLDEN_DIR / "llama_before"), "--loss", "--grad-norms"]
CASES = sorted({(case["strategy"], case["rate"]) for case in GOLDEN["losses"]})
LOSS_KEYS = ("loss", "ce", "kl", "ce_teacher_sum", "ce_student_sum", "kl_sum")
SAMPLE_KEYS = ["index", "type", "input_ids", "labels", "student_visible", "rows"]


def words(strategy: str, rate: str, *more: str) -> list[str]:
    """Words of the command for a recorded strategy (``block_tce`` is ``block`` with the order ``tce``) and rate."""
    name, _, order = strategy.partition("_") if strategy.startswith("block_") else (strategy, "", "tce")
    options = ["--strategy", name, "--order", order, "--rate", str(RATES[rate]), "--max-len", "448"]
    return ["inspect", *DATA, *options, *more]


def check_samples(result: dict[str, Any], strategy: str, rate: str) -> None:
    """Everything but losses equals the recording, and the JSON has exactly the documented keys."""
    assert list(result) == ["dropped", "samples"]
    (dropped,) = result["dropped"]
    assert dropped == {"index": 24, "reason": "too long: 1910 tokens, expected at most 446 (data.max_length less 2)"}
    samples = {sample["index"]: sample for sample in result["samples"]}
    assert list(samples) == list(range(24))
    for expected in KEPT:
        found = samples[expected["index"]]
        reflection = expected["type"] == "reflection"
        assert [key for key in found if key not in ("loss", "grad_norm")] == [
            key for key in SAMPLE_KEYS if reflection or key != "student_visible"
        ]
        assert found["type"] == expected["type"]
        assert found["input_ids"] == expected["input_ids"]
        assert found["labels"] == expected["labels"]
        assert found["rows"] == {
            key: expected["rows"][key] if reflection or key == "ce_teacher" else 0
            for key in ("ce_teacher", "ce_student", "kl")
        }
        if reflection:
            assert found["student_visible"] == MASKS[strategy][expected["name"]][rate]


def check_losses(result: dict[str, Any], strategy: str, rate: str) -> None:
    """Losses and gradient norms equal the recorded fp32 ones, or fp64 ones where there are no others."""
    samples = {sample["index"]: sample for sample in result["samples"]}
    index = {sample["name"]: sample["index"] for sample in KEPT}
    cases = [case for case in GOLDEN["losses"] if (case["strategy"], case["rate"]) == (strategy, rate)]
    assert cases
    for case in cases:
        found = samples[index[case["samples"][0]]]
        expected, tolerance = case["llama"].get("fp32"), 1e-5
        if expected is None:
            expected, tolerance = case["llama"]["fp64"], 2e-5
        assert tuple(found["loss"]) == LOSS_KEYS
        for key in LOSS_KEYS:
            # Sums are over up to 300 rows, and fp32 carries relative errors.
            scale = 1 if key in ("loss", "ce", "kl") else found["rows"]["ce_teacher"]
            assert found["loss"][key] == pytest.approx(expected.get(key, 0), abs=tolerance * scale), (case, key)
        assert len(found["grad_norm"]) == 1 + 30
        for name, norm in expected["grad_norm"].items():
            assert found["grad_norm"][name] == pytest.approx(norm, rel=1e-4), (case, name)


@pytest.mark.slow
def test_golden_by_the_real_command(tmp_path: Path) -> None:
    out = tmp_path / "inspect.json"
    command = [sys.executable, "-m", "reflectron.tools.cli", *words("block_tce", "0.33", *MODEL, "--json", str(out))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dropped, counts = done.stdout.splitlines()
    assert dropped == f"24 samples, 1 dropped -> {out}"
    assert counts == f"{GOLDEN_DIR / 'samples.jsonl'}: 24 samples, 1 too long (4.0%)"
    result = json.loads(out.read_text(encoding="utf-8"))
    check_samples(result, "block_tce", "0.33")
    check_losses(result, "block_tce", "0.33")


def run_all(commands: list[list[str]]) -> None:
    subprocess.run([sys.executable, __file__, *map(json.dumps, commands)], check=True, capture_output=True, text=True)


@pytest.mark.slow
def test_golden_of_every_recorded_strategy(tmp_path: Path) -> None:
    outs = {case: tmp_path / f"{number}.json" for number, case in enumerate(CASES)}
    run_all([words(*case, *MODEL, "--json", str(out)) for case, out in outs.items()])
    for (strategy, rate), out in outs.items():
        result = json.loads(out.read_text(encoding="utf-8"))
        check_samples(result, strategy, rate)
        check_losses(result, strategy, rate)


@pytest.mark.slow
def test_float64_and_bfloat16(tmp_path: Path) -> None:
    outs = {dtype: tmp_path / f"{dtype}.json" for dtype in ("float64", "bfloat16")}
    run_all([words("all", "0.5", *MODEL, "--dtype", dtype, "--json", str(out)) for dtype, out in outs.items()])
    results = {dtype: json.loads(out.read_text(encoding="utf-8")) for dtype, out in outs.items()}
    index = {sample["name"]: sample["index"] for sample in KEPT}
    for case in GOLDEN["losses"]:
        if case["strategy"] != "all":
            continue
        number, expected = index[case["samples"][0]], case["llama"]["fp64"]
        exact, rounded = (results[dtype]["samples"][number] for dtype in ("float64", "bfloat16"))
        # The engine's angles and row weights are fp32 in every mode.
        assert exact["loss"]["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert exact["grad_norm"]["global"] == pytest.approx(expected["grad_norm"]["global"], rel=1e-6)
        assert rounded["loss"]["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert rounded["grad_norm"]["global"] == pytest.approx(expected["grad_norm"]["global"], rel=5e-2)


@pytest.mark.parametrize("case", [("none", "0"), ("block_ect", "0.67"), ("sequential_block", "0.9"), ("all", "0")])
def test_golden_without_a_model(case: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "inspect.json"
    assert cli.main(words(*case, "--json", str(out))) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    check_samples(result, *case)
    assert all("loss" not in sample and "grad_norm" not in sample for sample in result["samples"])


def test_random_strategies_draw_by_seed(tmp_path: Path) -> None:
    seen = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "inspect.json"
        options = ["--strategy", "random_token", "--rate", "0.5", "--seed", seed, "--json", str(out)]
        assert cli.main(["inspect", *DATA, "--max-len", "448", *options]) == 0
        samples = json.loads(out.read_text(encoding="utf-8"))["samples"]
        seen.append([sample["student_visible"] for sample in samples if "student_visible" in sample])
    assert seen[0] == seen[1] != seen[2]


def test_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("block_tce", "0.33")) == 0
    shown = capsys.readouterr().out
    assert all(f"record {index}: " in shown for index in range(24))
    assert "record 24 dropped: too long: 1910 tokens" in shown
    # Wrapped in a box, no character is lost.
    drawn = "".join(line.strip("│\n ") for line in shown.splitlines()).replace(" ", "")
    for sample in KEPT:
        assert "".join(sample["rendered_text"].split()) in drawn
    sample = next(sample for sample in KEPT if sample["name"] == "r_tce_simple")
    sees = MASKS["block_tce"]["r_tce_simple"]["0.33"].count("1")
    assert f"{len(sample['input_ids'])} tokens, 121 supervised; rows: teacher CE 121, student CE 35, KL 35" in shown
    assert f"student sees {sees} tokens" in shown


def test_drawing_can_be_limited(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("none", "0", "--limit", "2")) == 0
    shown = capsys.readouterr().out
    assert "record 1: generation" in shown
    assert "record 2" not in shown


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--rate", "1.5"], "--rate is 1.5, expected 0 to 1"),
        (["--loss"], "--loss and --grad-norms need --model, expected a checkpoint folder"),
        (["--data", "missing.jsonl"], "data file missing.jsonl does not exist"),
        (["--tokenizer", "missing"], "missing"),
        (["--order", "tc"], "mask.order is 'tc', expected a permutation of 'tce'"),
        (["--json", "missing/out.json"], "--json is missing/out.json, expected a file in a folder that exists"),
        (["--max-len", "3"], "data.max_length is 3, expected at least 16 tokens"),
    ],
)
def test_mistakes_are_one_line(changes: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("block_tce", "0.33", *changes)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("reflectron inspect: error: ")
    assert shown.err.count("\n") == 1
    assert line in shown.err


def test_an_unknown_strategy_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", *DATA, "--strategy", "blocks"])
    assert end.value.code == 2
    assert "invalid choice: 'blocks'" in capsys.readouterr().err


def main(commands: list[str]) -> None:
    from reflectron.engine.parallel.process_groups import stop_process_groups

    for command in commands:
        assert cli.main(json.loads(command)) == 0
        stop_process_groups()


if __name__ == "__main__":
    main(sys.argv[1:])


def test_counts_of_what_was_looked_at_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = [
        {"instruction": "x", "output": "<s>a</s>"},
        {"instruction": "x", "output": "b\x1b]0;title\x07\x9b2J\u202e"},
        {"instruction": "x", "output": ""},
        {"instruction": "x", "output": "c " * 500},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    command = ["inspect", "--data", str(tmp_path / "x.json"), *DATA[2:], "--max-len", "448"]
    counts = (
        "x.json: 2 samples, 1 too long (20.0%), 2 rejected (empty answer 1, unknown block type 1), "
        "1 with special tokens in their contents (<s> 1, </s> 1)"
    )
    assert cli.main([*command, "--json", str(tmp_path / "out.json")]) == 0
    assert counts in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert [sample.get("special_tokens_in_content") for sample in found] == [["<s>", "</s>"], None]
    assert cli.main(command) == 0
    drawn = capsys.readouterr().out
    assert counts in drawn
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(drawn)
