"""The main command of the README, as it is written there but for the folder it writes to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testkit.places import ROOT


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    command = re.search(
        r"&& reflectron (train examples/quickstart/train\.yaml)$", (ROOT / "README.md").read_text(), re.M
    )
    assert command is not None, "README.md names the quickstart's command"
    words = [sys.executable, "-m", "reflectron.tools.cli", *command[1].split(), f"output_dir={tmp_path}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] > 7.5
    assert rows[-1]["loss"] < 3.2
    assert rows[-1]["mask_rate"] == 1.0
    hidden = [row["tokens_saved"] / (row["tokens_saved"] + row["tokens_student"]) for row in rows]
    assert hidden[0] < 0.4 < 0.7 < hidden[-1], "the mask runs its whole course"
    saved, seen = (sum(row[key] for row in rows) for key in ("tokens_saved", "tokens_student"))
    assert round(saved / (saved + seen), 2) == 0.53, "the README says so"
    held_out = [row["loss"] for row in read_rows(tmp_path / "validation.jsonl")]
    assert held_out == sorted(held_out, reverse=True)
    assert (tmp_path / "training.png").stat().st_size > 10_000
    check_export(tmp_path / "export")


def check_export(folder: Path) -> None:
    """transformers loads it, renders the papers' format and ends an answer by itself or at the limit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "Write a function that adds two numbers."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|user|><|text|>")
    assert text.endswith("<|endofblock|><|endofmessage|><|assistant|>")
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("<|text|>")
