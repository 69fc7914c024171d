"""Every supported schema becomes the right conversation; every fault of a record is named in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reflectron.engine.data.conversation import BadRecord, Block, Conversation, Message
from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenizer import TAGS
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"


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


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def test_text_parts_are_the_same_as_plain_strings() -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a")]
    plain = parse_record({"messages": [{"role": role, "content": text} for role, text in turns]})
    as_parts = {"messages": [{"role": role, "content": parts(text)} for role, text in turns]}
    assert parse_record(as_parts) == plain
    # Parquet gives every part the keys of all parts.
    for message in as_parts["messages"]:
        message["content"] = [{**part, "content": None, "image_url": None} for part in message["content"]]
        message |= {"weight": float("nan"), "tool_calls": None, "refusal": None}
    assert parse_record(as_parts) == plain
    several = parse_record({"messages": [USER, {"role": "assistant", "content": parts("a", "b")}]})
    assert several.messages[1].blocks == (Block("text", "a"), Block("text", "b"))
    mixed = reflection("user", "assistant", "user", "assistant")
    mixed["messages"][0]["content"], mixed["messages"][2]["content"] = parts("x"), "x"
    assert parse_record(mixed) == parse_record(reflection("user", "assistant", "user", "assistant"))


@pytest.mark.parametrize(("weights", "supervised"), [((None, 0), [True, False]), ((0.0, 1), [False, True])])
def test_weight_zero_keeps_a_message_out_of_the_loss(weights: Any, supervised: list[bool]) -> None:
    answers = [{"role": "assistant", "content": "a", "weight": weight} for weight in weights]
    conversation = parse_record({"messages": [USER | {"weight": 0}, answers[0], USER, answers[1]]})
    assert [m.supervised for m in conversation.messages if m.role == "assistant"] == supervised


def test_the_reflection_sequence_alone_may_have_weight_zero() -> None:
    record = reflection("user", "assistant", "user", "assistant")
    record["messages"][1]["weight"] = 0
    assert [m.supervised for m in parse_record(record).messages] == [True, False, True, True]


USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}


def weighted(weight: Any, role: str = "assistant") -> dict[str, Any]:
    first = {"role": role, "content": "x", "weight": weight}
    return {"messages": [first, ANSWER] if role == "user" else [USER, first]}


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
        ({"instruction": "x", "output": None}, "missing value: output is None, expected a text"),
        ({"instruction": float("nan"), "output": "x"}, "missing value: instruction is nan, expected a text"),
        ({"query": None, "answer": None}, "missing value: query is None"),
        ({"messages": None, "id": 1}, "missing value: messages is None"),
        ({"instruction": "x", "output": ["y"]}, "not a string: output is ['y']"),
        ({"instruction": "x", "output": b"y"}, "not a string: output is b'y'"),
        ({"instruction": "x", "output": 1.5}, "not a string: output is 1.5"),
        ({"\ud800": 1, "\x1b[2J": 2}, "unknown columns: found \\x1b[2J, \\ud800; expected"),
        ({"instruction": "x", "output": ""}, "empty answer: message 2 has nothing to learn"),
        ({"instruction": "x", "output": " \n\t"}, "empty answer: message 2"),
        ({"query": "x", "answer": "&#32;"}, "empty answer: message 2"),
        ({"prompt": "x", "privileged_context": "y", "completion": ""}, "empty answer: message 3"),
        ({"messages": [USER, ANSWER, USER, ANSWER | {"content": ""}]}, "empty answer: message 4"),
        ({"messages": [USER, ANSWER | {"content": parts("", " ")}]}, "empty answer: message 2"),
        (
            {"type": "generation", "messages": [USER, ANSWER | {"content": [block("1", "execution")]}]},
            "empty answer: message 2",
        ),
        (weighted(0), "no supervised token: every assistant message has weight 0"),
        (weighted(0.5), "unsupported weight: message 2 has 0.5, expected 0 or 1"),
        (weighted(2), "unsupported weight: message 2 has 2"),
        (weighted(-1), "unsupported weight: message 2 has -1"),
        (weighted(True), "unsupported weight: message 2 has True"),
        (weighted("0"), "unsupported weight: message 2 has '0'"),
        (weighted(float("inf")), "unsupported weight: message 2 has inf"),
        (weighted([1]), "unsupported weight: message 2 has [1]"),
        (weighted(1, "user"), "unsupported weight: message 1 is the user's and has 1"),
        (
            {"type": "reflection", "messages": [USER, ANSWER, USER, ANSWER | {"weight": 0}]},
            "unsupported weight: message 4 has 0, but distillation always learns the last turn",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
            "unknown block type: message 1 block 1 has 'image_url'",
        ),
        (
            {"messages": [USER | {"content": [{"type": "input_audio"}]}, ANSWER]},
            "unknown block type: message 1 block 1",
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "x", "content": "y"}]}, ANSWER]},
            "unknown key: message 1 block 1 has 'text' beside its type and content",
        ),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": "x", "cache": 1}]}, ANSWER]},
            "unknown key: message 1 block 1 has 'cache' beside its type and text",
        ),
        ({"messages": [USER | {"content": [{"type": "text"}]}, ANSWER]}, "not a string: message 1 block 1 content is"),
        (
            {"messages": [USER | {"content": [{"type": "text", "text": 1}]}, ANSWER]},
            "not a string: message 1 block 1 tex",
        ),
        (
            {"type": "generation", "messages": [USER | {"content": [{"type": "code", "text": "x"}]}, ANSWER]},
            "unknown key: message 1 block 1 has 'text' beside its type and content",
        ),
        (
            {"type": "generation", "messages": [USER | {"content": [*parts("x"), block()]}, ANSWER]},
            "mixed blocks: message 1",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "unsupported key: message 2 has 'tool_calls'"),
        ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "unsupported key: message 2 has 'function"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}, "unsupported key: message 2 has 'reasoning_con"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "unsupported column: 'tools' is not empty"),
        (reflection("user", "assistant"), "not the four parts of a reflection sample: found user, assistant; expected"),
        (reflection("user", "assistant", "assistant", "user"), "not the four parts of a reflection sample"),
        (reflection("user", "assistant", "user", "assistant", "user"), "not the four parts of a reflection sample"),
    ],
)
def test_faults_are_named(record: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_record(record)
    assert str(caught.value).startswith(reason)
    assert str(caught.value).isprintable()
    assert ": " in str(caught.value)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_a_content_is_refused(tag: str) -> None:
    # &lt; is a tag only after the clean-up.
    for record in ({"instruction": "x", "output": f"a {tag}"}, {"query": tag.replace("<", "&lt;"), "answer": "x"}):
        with pytest.raises(BadRecord, match="tag in content: message"):
            parse_record(record)
    assert parse_record({"instruction": "x", "output": "<|us" + "er| <|other|>"})
