"""Generation on the CPU with the tiny recorded model: transformers' own answers, whatever the batch, and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectron.tools.cli import main
from reflectron.tools.eval.backends import Decoding, Prompt
from reflectron.tools.eval.local_backends import TransformersBackend, continuation, encode

PROMPTS = ("<|user|><|text|>Add.<|endofblock|>", "def f(x):\n", "<|user|><|text|>Reverse a list of words, please." * 3)
GREEDY = Decoding(max_new_tokens=12)
SAMPLED = Decoding(max_new_tokens=12, temperature=0.8, top_p=0.9)
TASK = {"entry_point": "f", "canonical_solution": "", "base_input": [], "plus_input": [], "atol": 0}


@pytest.fixture(scope="module")
def backend(golden_dir: Path) -> TransformersBackend:
    return TransformersBackend(str(golden_dir / "llama_after"))


def ids_of(backend: TransformersBackend) -> list[list[int]]:
    return [encode(backend.tokenizer, text, None) for text in PROMPTS]


def test_greedy_tokens_are_those_of_generate(backend: TransformersBackend) -> None:
    prompts = ids_of(backend)
    assert len({len(ids) for ids in prompts}) == len(prompts), "the prompts need padding"
    batched = backend.generate_ids(prompts, GREEDY, [0, 0, 0])
    for prompt, new in zip(prompts, batched, strict=True):
        own = backend.model.generate(torch.tensor([prompt], device=backend.device), max_new_tokens=12, do_sample=False)
        assert new == own[0, len(prompt) :].tolist()
        assert backend.generate_ids([prompt], GREEDY, [0]) == [new]


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(backend: TransformersBackend) -> None:
    prompts = ids_of(backend)
    together = backend.generate_ids(prompts, SAMPLED, [1, 2, 3])
    alone = [backend.generate_ids([ids], SAMPLED, [seed])[0] for ids, seed in zip(prompts, (1, 2, 3), strict=True)]
    assert together == alone
    assert backend.generate_ids(prompts[:1], SAMPLED, [4]) != alone[:1]


def test_samples_have_the_models_distribution(backend: TransformersBackend) -> None:
    prompt, rows = ids_of(backend)[0], 400
    scores = backend.model(torch.tensor([prompt], device=backend.device)).logits[0, -1] / 0.5
    expected = scores.softmax(-1)
    one = Decoding(max_new_tokens=1, temperature=0.5)
    drawn = [new[0] for new in backend.generate_ids([prompt] * rows, one, list(range(rows)))]
    likeliest = expected.argmax().item()
    share, probability = drawn.count(likeliest) / rows, expected[likeliest].item()
    assert abs(share - probability) < 4 * (probability * (1 - probability) / rows) ** 0.5
    kept = expected.sort(descending=True)
    nucleus = set(kept.indices[: int((kept.values.cumsum(0) < 0.3).sum()) + 1].tolist())
    narrow = Decoding(max_new_tokens=1, temperature=0.5, top_p=0.3)
    assert {new[0] for new in backend.generate_ids([prompt] * 64, narrow, list(range(64)))} <= nucleus


def test_a_stop_string_ends_one_row_and_is_cut_off(backend: TransformersBackend) -> None:
    prompts = [Prompt(text, 0) for text in PROMPTS]
    whole = backend.complete(prompts, GREEDY)
    stop = whole[0].text[4:7]
    stopped = backend.complete(prompts, Decoding(max_new_tokens=12, stop=(stop,)))
    assert stopped[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].tokens < whole[0].tokens
    for free, cut in zip(whole[1:], stopped[1:], strict=True):
        assert cut.text == free.text.split(stop)[0]


def test_text_keeps_its_leading_space(backend: TransformersBackend) -> None:
    tokenizer = backend.tokenizer
    prompt, new = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("def f(x):\n", "  return"))
    assert continuation(tokenizer, prompt, new).endswith("return")
    assert continuation(tokenizer, prompt, new) == tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :]


def test_prompts_begin_with_bos_only_when_asked(golden_dir: Path, backend: TransformersBackend) -> None:
    tokenizer = backend.tokenizer
    assert encode(tokenizer, "x", None)[0] != tokenizer.bos_token_id
    with_bos = TransformersBackend(str(golden_dir / "llama_after"), bos=True)
    assert encode(tokenizer, "x", with_bos.bos_id)[0] == tokenizer.bos_token_id
    assert encode(tokenizer, tokenizer.bos_token + "x", with_bos.bos_id).count(tokenizer.bos_token_id) == 1


@pytest.fixture
def command(tmp_path: Path, golden_dir: Path) -> list[str]:
    problems = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n" * (i + 1), **TASK} for i in range(3)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    words = f"eval generate --dataset humaneval --data {data} --out {tmp_path / 'out.jsonl'}"
    return [*words.split(), "--model", str(golden_dir / "llama_after"), "--max-new-tokens", "4", "--batch-size", "2"]


def rows_of(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["task_id"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_stopped_generation_resumes(command: list[str], tmp_path: Path) -> None:
    out, words = tmp_path / "out.jsonl", [*command, "--samples", "2", "--temperature", "1"]
    assert main(words) == 0
    whole = rows_of(out)
    assert len(whole) == 6
    assert whole["HumanEval/0", 0]["raw"] != whole["HumanEval/0", 1]["raw"]
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])
    assert main(words) == 0
    assert rows_of(out) == whole


def test_samples_of_other_settings_are_not_mixed(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    before = (tmp_path / "out.jsonl").read_text()
    assert main([*command, "--max-new-tokens", "5"]) == 2
    assert "max-new-tokens 4, expected 5" in capsys.readouterr().err
    assert main([*command, "--seed", "9"]) == 0, "greedy answers do not depend on a seed"
    assert (tmp_path / "out.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "2"], "greedy samples are all the same"),
        (["--endpoint", "http://x"], "belong together"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl is not a file"),
    ],
)
def test_mistakes(command: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, *words]) == 2
    assert said in capsys.readouterr().err
