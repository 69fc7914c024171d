"""The quickstart's shipped files: true outputs, reproducible generation, nothing that the engine rejects."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

from reflectron.engine.data.conversation import Conversation
from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.tokenizer import TAGS, Tokenizer, load_tokenizer
from testkit.places import ROOT

FOLDER = ROOT / "examples" / "quickstart"
KINDS = {
    "reflection": Counter(reflection=198),
    "instruction": Counter(generation=99),
    "instruction_query_answer": Counter(generation=99),
    "validation": Counter(reflection=11, generation=11),
}

# By hand, independent of the generator: family, parameters, arguments, result.
EXAMPLES: list[tuple[str, dict[str, object], str, object]] = [
    ("keep_multiples", {"k": 2}, "[4, 3, 2, 4]", [4, 2]),
    ("chunk", {"size": 2}, "[1, 2, 3]", [[1, 2], [3]]),
    ("rotate", {"k": 4}, "[1, 2, 3]", [3, 1, 2]),
    ("window_sums", {"size": 3}, "[1, 2, 3, 4]", [6, 9]),
    ("nth_largest", {"n": 2}, "[5, 7, 7, 1]", 5),
    ("flatten", {"x": 0}, "[1, [0, [2]], 0]", [1, 2]),
    ("merge_spans", {"gap": 1}, "[(7, 8), (1, 3), (4, 5)]", [(1, 5), (7, 8)]),
    ("count_pairs", {"total": 4}, "[2, 2, 2, 1, 3]", 4),
    ("long_runs", {"k": 2}, "[1, 1, 2, 1, 1, 1]", [(1, 2), (1, 3)]),
    ("trimmed_mean", {"k": 1, "default": 0}, "[9, 1, 2, 4]", 3.0),
    ("transpose", {"fill": 0}, "[[1, 2], [3]]", [[1, 3], [2, 0]]),
    ("shorten", {"width": 8, "end": "..."}, "'abcdefghi'", "abcde..."),
    ("initials", {"sep": "."}, "'ada  lovelace'", "A.L"),
    ("frequent_words", {"n": 2}, "'To be or not to be'", {"to": 2, "be": 2}),
    ("caesar", {"k": 2}, "'xyz A'", "zab A"),
    ("is_palindrome", {"skip": " "}, "'Never odd or even'", True),
    ("wrap_words", {"width": 10}, "'one two three'", ["one two", "three"]),
    ("parse_pairs", {"sep": ";", "eq": "="}, "'x=1;y=20'", {"x": 1, "y": 20}),
    ("to_minutes", {"sep": ":", "default": 0}, "'2:05'", 125),
    ("censor", {"n": 4, "mark": "*"}, "'one three four'", "one ***** ****"),
    ("split_camel", {"sep": "_"}, "'MaxTextSize'", "max_text_size"),
    ("count_chars", {"chars": "aeiou"}, "'An Owl'", 2),
    ("format_rows", {"width": 6, "digits": 2}, "[('a', 1), ('bc', 0.5)]", "a      1.00\nbc     0.50"),
    ("common_prefix", {"n": 3}, "['abcdef', 'abcdxy']", "abc"),
    ("strip_comments", {"mark": "#"}, "'a = 1  # one\\n# two\\nb'", ["a = 1", "b"]),
    ("digit_sum", {"base": 2}, "-5", 2),
    ("clamp", {"low": 0, "high": 10}, "[-3, 4, 12]", [0, 4, 10]),
    ("primes_text", {"sep": " "}, "11", "2 3 5 7 11"),
    ("fizz", {"a": 3, "b": 5}, "30", "both"),
    ("round_to", {"step": 4}, "6", 8),
    ("to_base", {"base": 2}, "10", "1010"),
    ("share_above", {"limit": 10, "digits": 2}, "[10, 9, 11]", 66.67),
    ("min_coins", {"default": -1}, "10", 3),
    ("count_bits", {"k": 2, "low": 1}, "6", 3),
    ("add_minutes", {"k": 30}, "'23:45'", "00:15"),
    ("group_words", {"n": 1}, "['an', 'be', 'as']", {"a": ["an", "as"], "b": ["be"]}),
    ("best_names", {"k": 2}, "[('b', 3), ('a', 3), ('c', 9)]", ["c", "a"]),
    ("invert", {"x": 0}, "{'b': 1, 'a': 1, 'c': 0}", {1: ["a", "b"]}),
    ("add_counts", {"default": 1}, "{'x': 2}, {'y': 3}", {"x": 3, "y": 4}),
    ("look_up", {"sep": ".", "default": "None"}, "{'a': {'b': 7}}, 'a.b'", 7),
    ("most_common", {"n": 2}, "['b', 'a', 'c', 'c']", ["c", "a"]),
    ("old_enough", {"age": 18, "default": 0}, "[{'name': 'A', 'age': 18}, {'name': 'B'}]", ["A"]),
    ("balanced", {"p": "()", "q": "<>"}, "'(<)>'", False),
    ("dedupe", {"n": 2}, "[(3, 'a'), (1, 'b'), (3, 'c')]", [(1, "b"), (3, "c")]),
]


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    return _module("make_data")


@pytest.fixture(scope="module")
def make_tokenizer() -> ModuleType:
    return _module("make_tokenizer")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(FOLDER / "tokenizer"), "reflection")


def _module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _conversations(name: str) -> list[Conversation]:
    return [parse_record(record) for record in _records(name)]


def _all_texts() -> list[str]:
    return [b.content for name in KINDS for c in _conversations(name) for m in c.messages for b in m.blocks]


def _executions() -> list[tuple[str, str]]:
    """Every program of the shipped files with the output recorded for it, in a block or in an answer's text."""
    found = []
    for conversation in (c for name in KINDS for c in _conversations(name)):
        blocks = [block for message in conversation.messages for block in message.blocks]
        for before, block in pairwise(blocks):
            if block.type == "execution":
                found.append((before.content, block.content))
            elif answer := re.match(r"It prints:\n\n```\n(.*?)```", block.content, re.DOTALL):
                program = re.search(r"```python\n(.*)\n```", before.content, re.DOTALL)
                found.append((program[1], answer[1]))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_engine_accepts_every_record(name: str, tokenizer: Tokenizer) -> None:
    conversations = _conversations(name)
    assert Counter(c.kind for c in conversations) == KINDS[name]
    for conversation in conversations:
        sample = tokenize(conversation, tokenizer, "reflection", max_length=512)
        assert sample.kind == conversation.kind
        assert sample.supervised.any()


def test_pair_file_shows_the_schema_of_code_feedback() -> None:
    assert all(record.keys() == {"query", "answer"} for record in _records("instruction_query_answer"))


def test_reflection_samples_end_with_the_verified_code() -> None:
    rounds = Counter()
    for conversation in _conversations("reflection"):
        request, sequence, question, final = conversation.messages
        assert request.blocks[0].content.endswith("\n\n" + question.blocks[0].content)
        types = [block.type for block in sequence.blocks]
        assert re.fullmatch("(text code execution )+(text )?", " ".join(types) + " ")
        code, output = [block for block in sequence.blocks if block.type != "text"][-2:]
        assert "Traceback" not in output.content
        (answer,) = re.fullmatch(r"```python\n(.*)\n```", final.blocks[0].content, re.DOTALL).groups()
        assert code.content.startswith(answer + "\n\n")
        assert re.search(r"^(assert|print\()", code.content, re.MULTILINE)
        rounds[types.count("code")] += 1
    assert rounds.keys() == {1, 2, 3}
    assert rounds[2] > rounds[1]


def test_recorded_outputs_are_true(make_data: ModuleType) -> None:
    executions = _executions()
    assert len(executions) > 400
    for program, output in random.Random(3407).sample(executions, 12):
        assert make_data.run(program) == output


def test_generator_reproduces_the_shipped_records(make_data: ModuleType) -> None:
    chosen = random.Random(5).sample(list(enumerate(make_data.PROBLEMS)), 2)
    for number, problem in chosen:
        for name, records in make_data.problem_samples(problem, number, seed=0).items():
            shipped = _records(name)
            assert all(record in shipped for record in records)


@pytest.mark.slow
def test_generator_writes_the_shipped_bytes(make_data: ModuleType, tmp_path: Path) -> None:
    make_data.write(tmp_path, seed=0)
    for path in (FOLDER / "data").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[name for name, *_ in EXAMPLES])
def test_solutions_are_right(number: int, make_data: ModuleType) -> None:
    name, parameters, arguments, result = EXAMPLES[number]
    problem = make_data.PROBLEMS[number]
    assert problem.names[0] == name
    code = Template(problem.solution).substitute(parameters, f="solve")
    assert make_data.results(code, [f"solve({arguments})"]) == (repr(result),)


def test_every_problem_has_an_example(make_data: ModuleType) -> None:
    assert len(make_data.PROBLEMS) == len(EXAMPLES)


def test_validation_is_held_out(make_data: ModuleType) -> None:
    def questions(name: str) -> set[str]:
        return {c.messages[-2].blocks[0].content for c in _conversations(name)}

    training = set().union(*(questions(name) for name in KINDS if name != "validation"))
    assert not training & questions("validation")
    for problem in make_data.PROBLEMS:
        parameter, values = next(iter(problem.parameters.items()))
        training_settings, validation_settings = make_data.settings(problem)
        assert values[-1] not in {setting[parameter] for setting in training_settings}
        assert {setting[parameter] for setting in validation_settings} == {values[-1]}
        assert re.search(rf"\$\{{?{parameter}\b", problem.task), "the question must name what is held out"


def test_texts_hold_no_trace_of_the_machine() -> None:
    assert not [text for text in _all_texts() if re.search(r' at 0x|File "|/home/|/tmp/', text)]


def test_tokenizer_round_trip(tokenizer: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer" / "tokenizer.model"))
    for text in [*_all_texts(), "\tif x:\n\t\ty  =  1\n\n", " a ", "naïve ☕ 数え上げ"]:
        assert model.decode(model.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == model.encode(text)


def test_tokenizer_is_plain(tokenizer: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer" / "tokenizer.model"))
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert not set(TAGS) & {model.id_to_piece(i) for i in range(len(model))}
    assert tokenizer.size == len(model) + len(TAGS)


def test_tokenizer_training_is_deterministic(make_tokenizer: ModuleType) -> None:
    texts = list(make_tokenizer.texts(make_tokenizer.TRAINING_FILES))
    assert make_tokenizer.train(texts) == make_tokenizer.train(texts)


def test_readme_states_the_measured_lengths(make_tokenizer: ModuleType) -> None:
    assert make_tokenizer.table() in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_model_config_fits_the_tokenizer(tokenizer: Tokenizer) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(FOLDER / "model")
    assert config.vocab_size == tokenizer.size - len(TAGS)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not config.tie_word_embeddings
