"""Token ids, next-token targets and block structure equal those the reference recorded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from reflectron.engine.data.conversation import BadRecord, Conversation
from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import TokenizedSample, render, tokenize
from reflectron.engine.data.tokenizer import MAGICODER_PROMPT, TAGS, Tokenizer, load_tokenizer
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
REFERENCE: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
CONVERSATIONS = [parse_record(json.loads(line)) for line in (GOLDEN / "samples.jsonl").open(encoding="utf-8")]
KEPT = [sample for sample in REFERENCE["samples"] if not sample["dropped"]]
MAX_LENGTH = REFERENCE["meta"]["max_len"]


@pytest.fixture(scope="module", params=["tokenizer_before", "tokenizer_after"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(str(GOLDEN / request.param), "reflection")


def labels(sample: TokenizedSample) -> list[int]:
    return np.where(sample.supervised, sample.input_ids, -100).tolist()


@pytest.mark.parametrize("expected", KEPT, ids=lambda sample: sample["name"])
def test_golden_samples(tokenizer: Tokenizer, expected: dict[str, Any]) -> None:
    conversation = CONVERSATIONS[expected["index"]]
    assert render(conversation) == expected["rendered_text"]
    sample = tokenize(conversation, tokenizer, "reflection", MAX_LENGTH)
    assert sample.kind == expected["type"]
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert labels(sample) == expected["labels"]
    assert (sample.input_ids.dtype, sample.supervised.dtype) == (np.int32, bool)
    if sample.kind == "generation":
        assert (sample.blocks.shape, sample.prefix_end, sample.final_start) == ((0, 3), 0, -1)
    else:
        blocks = [[TAGS[2 + kind], start, end] for kind, start, end in sample.blocks.tolist()]
        assert blocks == expected["blocks_first_assistant"]
        assert sample.prefix_end == expected["first_endofmessage"] + 1
        assert sample.final_start == expected["last_assistant"]


def test_every_sample_is_kept_or_too_long(tokenizer: Tokenizer) -> None:
    dropped = []
    for index, conversation in enumerate(CONVERSATIONS):
        try:
            tokenize(conversation, tokenizer, "reflection", MAX_LENGTH)
        except BadRecord as error:
            dropped.append((index, str(error)))
    too_long = next(sample for sample in REFERENCE["samples"] if sample["dropped"])
    reason = f"too long: {too_long['n_text_tokens']} tokens, expected at most 446 (data.max_length less 2)"
    assert dropped == [(too_long["index"], reason)]


def test_length_boundary(tokenizer: Tokenizer) -> None:
    boundary = REFERENCE["max_len_boundary"]
    index = next(sample["index"] for sample in KEPT if sample["name"] == boundary["sample"])
    for max_length, kept in boundary["kept_at_max_len"]:
        if kept:
            assert len(tokenize(CONVERSATIONS[index], tokenizer, "reflection", max_length).input_ids) <= max_length
        else:
            with pytest.raises(BadRecord, match=r"^too long: "):
                tokenize(CONVERSATIONS[index], tokenizer, "reflection", max_length)


def test_execution_blocks_and_user_turns_are_no_targets_anywhere(tokenizer: Tokenizer) -> None:
    turns: list[tuple[str, list[tuple[str, str]]]] = [
        ("assistant", [("text", "a")]),
        ("user", [("execution", "b"), ("code", "c")]),
        ("assistant", [("execution", ""), ("code", "d"), ("execution", "e")]),
    ]
    messages = [{"role": r, "content": [{"type": t, "content": c} for t, c in blocks]} for r, blocks in turns]
    sample = tokenize(parse_record({"type": "generation", "messages": messages}), tokenizer, "reflection", 64)
    targets = tokenizer.decode(sample.input_ids[sample.supervised]).replace(" ", "")
    message_end = "<|endofmessage|>"
    code = "<|code|>d<|endofblock|>"
    assert targets == f"<|assistant|><|text|>a<|endofblock|>{message_end}<|assistant|>{code}{message_end}</s>"


def test_messages_of_weight_zero_are_no_targets(tokenizer: Tokenizer) -> None:
    """Nor is the EOS behind one that comes last."""

    def targets(*weights: int) -> str:
        answers = [{"role": "assistant", "content": f"a{i}", "weight": weight} for i, weight in enumerate(weights)]
        messages = [message for answer in answers for message in ({"role": "user", "content": "u"}, answer)]
        sample = tokenize(parse_record({"messages": messages}), tokenizer, "reflection", 256)
        return tokenizer.decode(sample.input_ids[sample.supervised]).replace(" ", "")

    turns = [f"<|assistant|><|text|>a{i}<|endofblock|><|endofmessage|>" for i in range(3)]
    assert targets(1, 1, 1) == "".join(turns) + "</s>"
    assert targets(0, 1, 0) == turns[1]
    assert targets(1, 0, 1) == turns[0] + turns[2] + "</s>"


def test_a_reflection_sequence_of_weight_zero_changes_the_teachers_targets_alone(tokenizer: Tokenizer) -> None:
    records = map(json.loads, (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    record = next(record for record in records if record["type"] == "reflection")
    full = tokenize(parse_record(record), tokenizer, "reflection", MAX_LENGTH)
    record["messages"][1]["weight"] = 0
    part = tokenize(parse_record(record), tokenizer, "reflection", MAX_LENGTH)
    assert full.kind == "reflection"
    assert not part.supervised[: part.prefix_end].any()
    np.testing.assert_array_equal(part.supervised[part.prefix_end :], full.supervised[full.prefix_end :])
    for name in ("input_ids", "blocks", "prefix_end", "final_start"):
        np.testing.assert_array_equal(getattr(part, name), getattr(full, name))


@pytest.mark.parametrize("template", ["reflection", "magicoder"])
@pytest.mark.parametrize(
    ("ask", "answer", "spelt"),
    [
        ("Strike the old price in HTML.", "<p><s>20</s> 15</p>", ("<s>", "</s>")),
        ("Which token ends a Llama text?", "It is `</s>`, id 2.", ("</s>",)),
        ("And <unk>?", "</s>", ("<unk>", "</s>")),
        ("What is 1 + 1?", "2", ()),
    ],
)
def test_special_tokens_that_contents_spell(ask: str, answer: str, spelt: tuple[str, ...], template: Any) -> None:
    """Spelt out there is one BOS and one EOS; kept, every one counts, as in the reference."""
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer_before"), template)
    conversation = parse_record({"instruction": ask, "output": answer})
    out = tokenize(conversation, tokenizer, template, 448)
    kept = tokenize(conversation, tokenizer, template, 448, "keep")
    assert out.special_tokens == kept.special_tokens == spelt
    for name, i in (("<s>", tokenizer.bos_id), ("</s>", tokenizer.eos_id)):
        assert (out.input_ids == i).sum() == 1
        assert (kept.input_ids == i).sum() == 1 + (ask + answer).count(name)
    assert out.input_ids[0] == tokenizer.bos_id
    assert out.input_ids[-1] == tokenizer.eos_id
    assert out.supervised[-1]
    assert tokenizer.decode(out.input_ids[1:-1]).replace(" ", "").count(answer.replace(" ", "")) == 1
    if not spelt:
        np.testing.assert_array_equal(out.input_ids, kept.input_ids)


def test_privileged_conversation(tokenizer: Tokenizer) -> None:
    record = {"prompt": "ask", "privileged_context": "known", "completion": "answer"}
    sample = tokenize(parse_record(record), tokenizer, "reflection", 64)
    assert sample.kind == "privileged"
    users = np.flatnonzero(sample.input_ids == tokenizer.tag_ids["<|user|>"])
    assert sample.prefix_end == users[1]
    assert sample.final_start == np.flatnonzero(sample.input_ids == tokenizer.tag_ids["<|assistant|>"])
    assert sample.blocks.shape == (0, 3)
    assert sample.supervised.nonzero()[0].tolist() == list(range(sample.final_start, len(sample.input_ids)))


def test_magicoder_prompt_and_response_are_encoded_apart() -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer_before"), "magicoder")
    conversation = parse_record({"instruction": "a {b}\n", "response": " c\n"})
    prompt = tokenizer.encode(MAGICODER_PROMPT.format(instruction="a {b}\n", response=""))
    response = tokenizer.encode(" c\n")
    expected = [tokenizer.bos_id, *prompt, *response, tokenizer.eos_id]
    sample = tokenize(conversation, tokenizer, "magicoder", len(expected))
    assert sample.input_ids.tolist() == expected
    assert labels(sample) == [-100] * (1 + len(prompt)) + [*response, tokenizer.eos_id]
    assert (sample.kind, sample.blocks.shape, sample.prefix_end, sample.final_start) == ("generation", (0, 3), 0, -1)
    with pytest.raises(BadRecord, match=r"^too long: "):
        tokenize(conversation, tokenizer, "magicoder", len(expected) - 1)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "privileged_context": "b", "completion": "c"},
        {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]},
        {"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]},
    ],
)
def test_magicoder_takes_single_exchanges_only(record: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer_before"), "magicoder")
    conversation: Conversation = parse_record(record)
    with pytest.raises(BadRecord, match=r"^not for template magicoder: found "):
        tokenize(conversation, tokenizer, "magicoder", 4096)
