"""How a generator is spoken to, which records are problems, and what a run's counts say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.config import DataFile
from reflectron.engine.data.conversation import Block
from reflectron.engine.data.tokenizer import TAGS, load_tokenizer
from reflectron.tools.data.reflection.dialogue import Chat, ReflectionProblem, Tags, UnusableStep, show_tags
from reflectron.tools.data.reflection.results import Reject, read_problems
from reflectron.tools.llm.request import Request
from testkit.places import ROOT

QUICKSTART = ROOT / "examples" / "quickstart"
PROBLEM = ReflectionProblem("key", "Add two numbers.", "a.jsonl:1")
FAILED = (Block("text", "So."), Block("code", "assert add(1, 1) == 2"), Block("execution", "NameError\n"))


def messages(request: Request) -> list[dict[str, str]]:
    assert not isinstance(request.input, str)
    return [dict(message) for message in request.input]


def test_chat_shows_what_happened() -> None:
    first = messages(Chat().reflect(PROBLEM, []))
    assert [message["role"] for message in first] == ["system", "user"]
    assert first[1]["content"] == PROBLEM.instruction()
    second = messages(Chat().reflect(PROBLEM, FAILED))
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": "So.\n\n```python\nassert add(1, 1) == 2\n```"}
    assert "```\nNameError\n```" in second[3]["content"]
    untested = messages(Chat().reflect(PROBLEM, [Block("code", "print(1)"), Block("execution", "")]))
    assert "(nothing)" in untested[-1]["content"]
    assert "No assert statement" in untested[-1]["content"]
    final = messages(Chat().answer(PROBLEM, FAILED, [], 1))
    assert final[:3] == second[:3]
    assert final[3]["content"].endswith("The task:\n\nAdd two numbers.")


def test_a_chat_turn_ends_with_its_first_code() -> None:
    text = "Like this:\n\n```\n42\n```\n\n```python\nx = 1\n```\nIt prints 1.\n```python\ny = 2\n```"
    assert Chat().step(text) == [Block("text", "Like this:\n\n```\n42\n```"), Block("code", "x = 1")]
    assert Chat().step("```\nx = 1\n```") == [Block("code", "x = 1")]
    with pytest.raises(UnusableStep, match="no code"):
        Chat().step("Easy.")


def test_tags_continue_the_rendered_sample() -> None:
    request = Tags().reflect(PROBLEM, FAILED)
    assert request.input == (
        f"<|user|><|text|>{PROBLEM.instruction()}<|endofblock|><|endofmessage|><|assistant|><|text|>So.<|endofblock|>"
        "<|code|>assert add(1, 1) == 2<|endofblock|><|execution|>NameError\n<|endofblock|>"
    )
    assert request.stop == ("<|endofblock|>", "<|endofmessage|>")
    answer = Tags().answer(PROBLEM, FAILED, [Block("text", "x")], 0)
    assert str(answer.input).endswith(
        "<|endofmessage|><|user|><|text|>Add two numbers.<|endofblock|><|endofmessage|><|assistant|>"
        "<|text|>x<|endofblock|>"
    )


def test_a_tagged_block_is_read() -> None:
    # With and without the stop's own text, as servers differ in that.
    assert Tags().step("<|code|>x = 1\n<|endofblock|>") == [Block("code", "x = 1\n")]
    assert Tags().step("<|text|>So.") == [Block("text", "So.")]
    assert Tags().step("<|endofmessage|>") == []
    assert Tags().step("") == []
    for text in ("So.", "<|execution|>1"):
        with pytest.raises(UnusableStep, match="no tag"):
            Tags().step(text)


def test_problems_come_from_any_training_file(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"instruction": "one"},
        {"problem": "two", "solution": "x"},
        {"query": " three ", "answer": "x"},
        {"messages": [{"role": "user", "content": "four"}, {"role": "assistant", "content": "x"}]},
        json.loads((QUICKSTART / "data" / "reflection.jsonl").read_text().splitlines()[0]),
        {"instruction": "three"},
        {"instruction": "say <|code|>"},
        {"instruction": " "},
        {"text": "x"},
        {"instruction": "half \ud800"},
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "{\n")
    found = list(read_problems([DataFile(path=str(file))], None))
    texts = [problem.text for problem in found if isinstance(problem, ReflectionProblem)]
    assert texts[:4] == ["one", "two", "three", "four"]
    assert texts[4].startswith("The function `sum_tables(a, b)`")
    reasons = [reject.reason for reject in found if isinstance(reject, Reject)]
    assert reasons[0] == f"duplicate: the same problem as {file}:3"
    assert [reason.split(":")[0] for reason in reasons[1:]] == [
        "tag in content",
        "no problem",
        "no problem",
        "not Unicode",
        "bad JSON",
    ]
    [named] = [p for p in read_problems([DataFile(path=str(file))], "text") if isinstance(p, ReflectionProblem)]
    assert (named.text, named.source) == ("x", f"{file}:9")


def test_visible_tags_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(QUICKSTART / "tokenizer"), "reflection")
    tokenizer.save(tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    show_tags(tmp_path / "export", tmp_path / "visible")
    shown = load_tokenizer(str(tmp_path / "visible"), "magicoder").backend
    text = "<|assistant|><|code|>x = 1<|endofblock|>"
    ids = shown.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text)
    assert shown.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert not set(TAGS) & set(tokenizer.backend.decode(ids, skip_special_tokens=True).split())
    assert (tmp_path / "visible" / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="exists, expected a new folder"):
        show_tags(tmp_path / "export", tmp_path / "visible")
    (tmp_path / "visible" / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ValueError, match=r"has no token <\|user\|>"):
        show_tags(tmp_path / "visible", tmp_path / "other")
