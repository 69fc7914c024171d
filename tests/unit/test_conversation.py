"""Every supported schema becomes the right conversation; every fault of a record is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reflectron.engine.data.conversation import BadRecord, Block, Conversation, Message
from reflectron.engine.data.schemas import parse_record
from reflectron.engine.data.tokenizer import TAGS

GOLDEN = Path(__file__).parents[1] / "golden"


def block(content: Any = "x", kind: Any = "text") -> dict[str, Any]:
    return {"type": kind, "content": content}


def reflection(*roles: str) -> dict[str, Any]:
    return {"type": "reflection", "messages": [{"role": role, "content": [block()]} for role in roles]}


def exchange(ask: str, answer: str) -> Conversation:
    user, assistant = Message("user", (Block("text", ask),)), Message("assistant", (Block("text", answer),))
    return Conversation("generation", (user, assistant))


def test_reflection_sequences_keep_their_blocks() -> None:
    records = [json.loads(line) for line in (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in records:
        conversation = parse_record(record)
        assert conversation.kind == record["type"]
        found = [
            {"role": m.role, "content": [{"type": b.type, "content": b.content} for b in m.blocks]}
            for m in conversation.messages
        ]
        assert found == record["messages"]


@pytest.mark.parametrize(
    "record",
    [
        {"query": "a &lt; b\t&amp;amp;", "answer": "\r\n\tif a &lt; b:\r\n\t\tpass \n", "resource": "x", "lang": "py"},
        {"instruction": "ask", "response": "answer"},
        {"instruction": "ask", "output": "answer", "input": ""},
        {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]},
        {"messages": None, "instruction": "ask", "output": "answer", "response": None},
    ],
)
def test_instruction_schemas(record: dict[str, Any]) -> None:
    expected = exchange("ask", "answer")
    if "query" in record:
        expected = exchange("a < b\t&amp;", "if a < b:\n        pass")
    assert parse_record(record) == expected


def test_oss_instruct_problems_are_worded_as_an_instruction() -> None:
    """As Magicoder's preprocess_data.py does before training."""
    record = {"problem": "ask", "solution": "answer", "seed": "s", "index": 3}
    assert parse_record(record) == exchange("Write a solution to the following coding problem:\nask", "answer")


def test_system_message_becomes_the_first_block_of_the_user_turn() -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    conversation = parse_record({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert conversation.kind == "generation"
    assert [m.role for m in conversation.messages] == ["user", "assistant", "user", "assistant"]
    assert conversation.messages[0].blocks == (Block("text", "s"), Block("text", "u"))


def test_privileged_context_comes_before_the_prompt() -> None:
    conversation = parse_record({"prompt": "p", "privileged_context": "k", "completion": "c"})
    assert conversation.kind == "privileged"
    assert [(m.role, m.blocks[0].content) for m in conversation.messages] == [
        ("user", "k"),
        ("user", "p"),
        ("assistant", "c"),
    ]


def test_empty_contents_are_data() -> None:
    messages = [("user", "u"), ("assistant", ""), ("user", ""), ("assistant", "a")]
    record = {"type": "reflection", "messages": [{"role": r, "content": [block(c)]} for r, c in messages]}
    record["messages"][1]["content"].append(block("", "execution"))
    assert parse_record(record).messages[1].blocks == (Block("text", ""), Block("execution", ""))


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not an object: found list"),
        (None, "not an object: found NoneType"),
        ({"text": "x", "id": 1}, "unknown columns: found id, text; expected one of: messages; query, answer"),
        ({}, "unknown columns: found none"),
        ({"query": "x"}, "unknown columns: found query;"),
        ({"prompt": "x", "completion": "y"}, "unknown columns: found completion, prompt;"),
        ({"query": 3, "answer": "x"}, "not a string: query is 3"),
        ({"problem": "x", "solution": "\ud800"}, "not Unicode: solution holds a lone surrogate"),
        ({"instruction": "x", "input": "y", "output": "z"}, "unsupported column: 'input' is not empty"),
        ({"messages": []}, "no messages: 'messages' is []"),
        ({"messages": "x"}, "no messages: 'messages' is 'x'"),
        ({"messages": [USER, 7]}, "not an object: message 2 is 7"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role: message 1 has 'tool'"),
        ({"messages": [USER, {"role": None, "content": "x"}]}, "unknown role: message 2 has None"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "unknown role: message 2 has 'system'"),
        ({"messages": [{"role": "system", "content": "x"}]}, "unknown role: a system message must be followed"),
        ({"messages": [USER, {"role": "assistant"}]}, "not a string: message 2 content is None"),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, "empty message: message 2 has no block"),
        ({"messages": [USER]}, "no supervised token: there is no assistant message"),
        ({"messages": [{"role": "user", "content": [block()]}]}, "no type: 'type' is None"),
        (
            {"type": "generation", "messages": [{"role": "user", "content": [block(kind="image")]}]},
            "unknown block type: message 1 block 1 has 'image'",
        ),
        (
            {"type": "generation", "messages": [{"role": "user", "content": [block(), "x"]}]},
            "not an object: message 1 block 2 is 'x'",
        ),
        (
            {"type": "generation", "messages": [{"role": "user", "content": [block(["x"])]}]},
            "not a string: message 1 block 1 content is ['x']",
        ),
        (reflection("user", "assistant"), "not the four parts of a reflection sample: found user, assistant; expected"),
        (reflection("user", "assistant", "assistant", "user"), "not the four parts of a reflection sample"),
        (reflection("user", "assistant", "user", "assistant", "user"), "not the four parts of a reflection sample"),
    ],
)
def test_faults_are_named(record: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_record(record)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_a_content_is_refused(tag: str) -> None:
    # &lt; is a tag only after the clean-up.
    for record in ({"instruction": "x", "output": f"a {tag}"}, {"query": tag.replace("<", "&lt;"), "answer": "x"}):
        with pytest.raises(BadRecord, match="tag in content: message"):
            parse_record(record)
    assert parse_record({"instruction": "x", "output": "<|us" + "er| <|other|>"})
