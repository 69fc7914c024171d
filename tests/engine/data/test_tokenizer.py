"""Ids equal the reference's and sentencepiece's own; a saved folder gives the same ids and prompts in transformers."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import pickle
import random
import shutil
import sysconfig
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import render
from reflectron.engine.data.tokenizer import MAGICODER_PROMPT, TAGS, load_tokenizer
from testkit.places import TESTS_DIR

GOLDEN = TESTS_DIR / "golden"
SAMPLES = [json.loads(line) for line in (GOLDEN / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
RENDERED = [render(parse_record(sample)) for sample in SAMPLES]
CONTENTS = [block["content"] for sample in SAMPLES for message in sample["messages"] for block in message["content"]]
CORPUS = [line for text in CONTENTS for line in text.split("\n") if line] + ['"<0x0A>" \t|\\ ▁ {é} ☕ 数 𝒳 \r']
PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "é",
    "☕",
    "数",
    "𝒳",
    "▁",
    "def ",
    "x=",
    "<",
    "|>",
    "<0x0A>",
    "\r",
    "ﬁ",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))


def hard_texts() -> list[str]:
    rng = random.Random(3407)
    drawn = ["".join(rng.choices(PIECES, k=rng.randint(0, 40))) for _ in range(300)]
    spaces = [" " * n + "x" for n in range(40)]
    return ["", " ", "  ", "\n", "\t\tx", " a", "a ", "   a   b    ", *spaces, *drawn, *CORPUS, "\n".join(CORPUS)]


def sentencepiece_model(
    path: Path, corpus: Sequence[str] = CORPUS, **settings: Any
) -> sentencepiece.SentencePieceProcessor:
    """Train a tiny model, fit for code unless ``settings`` say otherwise."""
    fit_for_code = {
        "vocab_size": 620,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, **(fit_for_code | settings)
    )
    path.write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def qwen_like(folder: Path) -> Path:
    """A byte-level BPE folder without BOS, as Qwen2's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.enable_truncation(8)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_end|>"],
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sources(folder: Path) -> dict[str, Path]:
    """One source of each kind."""
    (folder / "bpe").mkdir()
    sentencepiece_model(folder / "bpe" / "tokenizer.model", model_type="bpe")
    return {
        "golden": GOLDEN / "llama_before",
        "qwen": qwen_like(folder / "qwen"),
        "bpe": folder / "bpe",
    }


def test_tags_get_the_golden_ids_and_sub_tokens() -> None:
    expected = golden()["tokenizer"]["llama"]
    before = load_tokenizer(str(GOLDEN / "tokenizer_before"), "reflection")
    assert before.size == expected["vocab_after"]
    assert before.tag_ids == expected["special"]
    assert list(before.tag_ids) == list(TAGS)
    assert before.tag_sub_tokens == expected["subtokens"]
    assert (before.bos_id, before.eos_id) == (expected["bos"], expected["eos"])
    after = load_tokenizer(str(GOLDEN / "tokenizer_after"), "reflection")
    assert after.tag_ids == expected["special"]
    assert after.tag_sub_tokens == {}
    assert after.fingerprint == before.fingerprint
    plain = load_tokenizer(str(GOLDEN / "tokenizer_before"), "magicoder")
    assert (plain.size, plain.tag_ids, plain.tag_sub_tokens) == (expected["vocab_before"], {}, {})
    assert plain.fingerprint != before.fingerprint


def test_pickled_tokenizer_is_the_same() -> None:
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer_before"), "reflection")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(RENDERED[12]) == tokenizer.encode(RENDERED[12])


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(qwen_like(tmp_path / "qwen")), "reflection")
    for text in RENDERED:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_equal_sentencepiece(tmp_path: Path, byte_fallback: bool, add_dummy_prefix: bool) -> None:
    path = tmp_path / "tokenizer.model"
    settings = {"model_type": "bpe", "byte_fallback": byte_fallback, "add_dummy_prefix": add_dummy_prefix}
    reference = sentencepiece_model(path, **settings, vocab_size=620 if byte_fallback else 360)
    tokenizer = load_tokenizer(str(path), "reflection")
    for text in hard_texts():
        expected, found = reference.encode(text), tokenizer.encode(text)
        assert found == expected, text
        if byte_fallback:
            assert tokenizer.decode(found) == reference.decode(expected)


def runs(rng: random.Random, alphabet: str) -> str:
    return "".join(rng.choice(alphabet) * rng.choice([1, 1, 2, 3, 4, 8, 12]) for _ in range(rng.randint(1, 12)))


@pytest.mark.parametrize("alphabet", [" a", "ab", "= "])
@pytest.mark.parametrize("seed", range(2))
def test_runs_of_a_character_are_cut_as_sentencepiece_cuts_them(tmp_path: Path, seed: int, alphabet: str) -> None:
    """As in deep indentation, where several merges give the same piece."""
    rng, path = random.Random(seed), tmp_path / "tokenizer.model"
    corpus = [runs(rng, alphabet) for _ in range(200)]
    reference = sentencepiece_model(path, corpus, model_type="bpe", vocab_size=330, split_by_whitespace=seed % 2 == 0)
    tokenizer = load_tokenizer(str(path), "reflection")
    for text in [*(runs(rng, alphabet) for _ in range(500)), *(c * n for c in alphabet for n in range(100))]:
        assert tokenizer.encode(text) == reference.encode(text), text


def model_of_pieces(path: Path, pieces: Sequence[str], score: float) -> None:
    """A model whose normal pieces are these, all with one score."""
    sentencepiece_model(path, model_type="bpe")
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    fixed = [piece for piece in proto.pieces if piece.type != piece.NORMAL]
    del proto.pieces[:]
    proto.pieces.extend(fixed)
    for piece in pieces:
        proto.pieces.add(piece=piece, score=score)
    path.write_bytes(proto.SerializeToString())


def test_indentation_is_cut_as_sentencepiece_cuts_it(tmp_path: Path) -> None:
    """The runs of spaces that Mistral's model holds, in its order: 17 spaces are 16 and 1, not 14 and 3."""
    lengths = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1)
    model_of_pieces(tmp_path / "tokenizer.model", [*("▁" * length for length in lengths), "a", "x"], -1e9)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(str(tmp_path), "reflection")
    assert reference.encode_as_pieces(" " * 16) == ["▁" * 16, "▁"]
    for text in (f"{before}{' ' * n}{after}" for before in ("", "a", "\n") for after in ("", "x") for n in range(400)):
        assert tokenizer.encode(text) == reference.encode(text), text


def test_pieces_that_score_alike_are_refused(tmp_path: Path) -> None:
    """As those that were added to a vocabulary with score 0: sentencepiece takes the leftmost, merges have ranks."""
    model_of_pieces(tmp_path / "tokenizer.model", ["bc", "ab", "a", "b", "c", "▁"], 0.0)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert reference.encode_as_pieces("abc") == ["▁", "ab", "c"]
    with pytest.raises(ValueError, match=r"its pieces 'ab' and 'bc' have the same score 0; give"):
        load_tokenizer(str(tmp_path), "reflection")


def standard_library(megabytes: float) -> list[str]:
    """Python's own sources in four layouts: as they are, CRLF, tabs, deep indentation."""
    texts, size = list[str](), 0.0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        texts += [text, text.replace("\n", "\r\n"), text.replace("    ", "\t"), text.replace("    ", " " * 11)]
        size += len(text) / 1e6
        if size > megabytes:
            break
    return texts


@pytest.mark.parametrize(
    ("source", "megabytes"), [("golden", 0.05), pytest.param("mistral", 1.0, marks=pytest.mark.slow)]
)
def test_ids_of_code_equal_sentencepiece(tmp_path: Path, source: str, megabytes: float) -> None:
    path = GOLDEN / "tokenizer_before" / "tokenizer.model"
    if source == "mistral":
        # A real model of 32000 pieces: pip install --no-deps mistral-common.
        package = importlib.util.find_spec("mistral_common")
        if package is None or not package.submodule_search_locations:
            pytest.skip("the package mistral-common is not installed")
        path = Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(tmp_path), "magicoder")
    indented = [f"{before}{c * n}x" for before in ("", "a", "\n") for c in " \t=#" for n in (*range(70), 128, 300)]
    for text in [*hard_texts(), *indented, *standard_library(megabytes)]:
        # What spells <s> is no special token to sentencepiece.
        assert tokenizer.encode_spelt_out(text) == reference.encode(text), text[:80]


@pytest.mark.parametrize(("name", "value"), [("legacy", False), ("add_prefix_space", False)])
def test_settings_that_change_the_ids_of_a_plain_model_are_refused(tmp_path: Path, name: str, value: bool) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"^{name} in .*tokenizer_config.json is False, expected true or none beside"):
        load_tokenizer(str(tmp_path), "reflection")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: not value}))
    load_tokenizer(str(tmp_path), "reflection")


@pytest.mark.parametrize("prefix_space", [True, False])
def test_a_prefix_space_stays_as_tokenizer_json_has_it(tmp_path: Path, prefix_space: bool) -> None:
    """transformers 4 sets it to what the side file says, and to false without; transformers 5 does not."""
    folder = qwen_like(tmp_path / "qwen")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    load_tokenizer(str(folder), "reflection").save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is prefix_space
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": not prefix_space}))
    with pytest.raises(
        ValueError, match=r"^add_prefix_space in .*tokenizer_config.json is .*, expected .* as in tokeniz"
    ):
        load_tokenizer(str(folder), "reflection")


SPELT = {
    "golden": ["<s>", "</s>", "<unk>"],
    "bpe": ["<s>", "</s>", "<unk>"],
    "qwen": ["<|endoftext|>", "<|im_end|>", "<|fim_prefix|>"],
}


@pytest.mark.parametrize("name", SPELT)
def test_special_tokens_are_spelt_out_as_ordinary_text(tmp_path: Path, name: str) -> None:
    source = sources(tmp_path)[name]
    if name == "qwen":
        # As Qwen2.5's: an added token that is not special.
        state = json.loads((source / "tokenizer.json").read_text())
        last = max(token["id"] for token in state["added_tokens"])
        fim = {"id": last + 1, "content": "<|fim_prefix|>", "special": False, "normalized": False}
        think = fim | {"id": last + 2, "content": "<think>"}
        state["added_tokens"] += [
            token | {"single_word": False, "lstrip": False, "rstrip": False} for token in (fim, think)
        ]
        (source / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(str(source), "reflection")
    assert set(tokenizer.special_tokens.values()) == set(SPELT[name])
    model = None if name == "qwen" else sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    rng = random.Random(1)
    for _ in range(200):
        content = "".join(rng.choices([*PIECES, *SPELT[name]], k=rng.randint(1, 12)))
        ids = tokenizer.encode_spelt_out(f"<|code|>{content}<|endofblock|>")
        assert ids[0] == tokenizer.tag_ids["<|code|>"]
        assert ids[-1] == tokenizer.tag_ids["<|endofblock|>"]
        if model is None:
            assert not set(ids) & set(tokenizer.special_tokens)
            assert tokenizer.decode(ids[1:-1]) == unicodedata.normalize("NFC", content)
        else:
            assert ids[1:-1] == model.encode(content)
        if not any(token in content for token in SPELT[name]):
            assert ids == tokenizer.encode(f"<|code|>{content}<|endofblock|>")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_spelt_out(content) == tokenizer.encode_spelt_out(content)
    if name == "qwen":
        assert len(tokenizer.encode_spelt_out("<think>")) == 1


def test_every_piece_between_tags_is_encoded_on_its_own(tmp_path: Path) -> None:
    reference = sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    tokenizer = load_tokenizer(str(tmp_path), "reflection")
    texts = hard_texts()
    for first, second in itertools.pairwise(texts):
        ids = [tokenizer.tag_ids["<|code|>"], *reference.encode(first), tokenizer.tag_ids["<|endofblock|>"]]
        assert tokenizer.encode(f"<|code|>{first}<|endofblock|>{second}") == ids + reference.encode(second)


def test_user_defined_pieces_are_found_where_sentencepiece_finds_them(tmp_path: Path) -> None:
    symbols = ["<sym>", "▁▁", "\t\t", "<sym>▁"]
    path = tmp_path / "tokenizer.model"
    reference = sentencepiece_model(path, model_type="bpe", user_defined_symbols=symbols, add_dummy_prefix=False)
    tokenizer = load_tokenizer(str(path), "reflection")
    for text in [*hard_texts(), "a<sym>b", " <sym> <sym>\t\t\tx", "     x"]:
        assert tokenizer.encode(text) == reference.encode(text), text


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"normalization_rule_name": "nfkc"}, "normalizer_spec.name"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "trainer_spec.treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["<sym>"]}, "normalizer_spec.add_dummy_prefix"),
        ({"model_type": "char"}, "trainer_spec.model_type"),
        ({"model_type": "unigram"}, "trainer_spec.model_type"),
    ],
)
def test_what_cannot_be_represented_is_named(tmp_path: Path, settings: dict[str, Any], field: str) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model", **({"model_type": "bpe"} | settings))
    with pytest.raises(ValueError, match=f"^{field} of .*tokenizer.model is .*, expected "):
        load_tokenizer(str(tmp_path), "reflection")


def test_missing_or_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*: expected a folder with tokenizer.json or tokenizer.mod"):
        load_tokenizer(str(tmp_path / "none"), "reflection")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(str(tmp_path), "reflection")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer: "):
        load_tokenizer(str(tmp_path), "reflection")
    folder = qwen_like(tmp_path / "qwen")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"eos_token of the tokenizer .* is null"):
        load_tokenizer(str(folder), "reflection")


def test_without_bos_a_sample_starts_with_eos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(qwen_like(tmp_path / "qwen")), "reflection")
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.backend.token_to_id("<|endoftext|>")
    assert min(tokenizer.tag_ids.values()) == tokenizer.backend.token_to_id("<|im_end|>") + 1


def test_a_tag_that_is_there_keeps_its_id(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path / "qwen")
    size = load_tokenizer(str(folder), "magicoder").size
    (folder / "added_tokens.json").write_text(json.dumps({"<|code|>": size}))
    tokenizer = load_tokenizer(str(folder), "reflection")
    others = [tag for tag in TAGS if tag != "<|code|>"]
    assert tokenizer.tag_ids == {"<|code|>": size} | {tag: size + 1 + i for i, tag in enumerate(others)}
    assert list(tokenizer.tag_sub_tokens) == others
    assert tokenizer.encode("".join(TAGS)) == list(tokenizer.tag_ids.values())


def test_tokens_that_only_side_files_declare_are_added(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    size = load_tokenizer(str(tmp_path), "magicoder").size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    tokenizer = load_tokenizer(str(tmp_path), "reflection")
    assert tokenizer.encode("a[PAD]") == [*tokenizer.encode("a"), size]
    assert tokenizer.tag_ids["<|user|>"] == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size + 5}))
    with pytest.raises(ValueError, match=f"'\\[PAD\\]' of .* has id {size}, expected {size + 5}"):
        load_tokenizer(str(tmp_path), "reflection")


def test_a_new_token_takes_no_id_that_another_has(tmp_path: Path) -> None:
    folder = qwen_like(tmp_path / "qwen")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["zz"] = max(load_tokenizer(str(folder), "reflection").tag_ids.values())
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(str(folder), "magicoder").encode("a")
    with pytest.raises(ValueError, match=r"have gaps: the new token '<\|.* would get id \d+, which is that of 'zz'"):
        load_tokenizer(str(folder), "reflection")


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "a list": ("tokenizer_config.json", [], "holds a list, expected a JSON object"),
    "null": ("special_tokens_map.json", None, "holds a NoneType, expected a JSON object"),
    "a list of tokens": ("added_tokens.json", ["<a>"], "holds a list, expected a JSON object"),
    "an id in quotes": ("added_tokens.json", {"<a>": "5"}, "gives <a> the id '5', expected a whole number"),
    "tokens without ids": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder in "),
    "an id of letters": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "has x: "),
    "no content": ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"special": True}}}, "has 5: "),
    "a bare content": ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<a>"}}, "has 5: <a>, expected"),
    "a number as content": ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": 5}}}, "has 5: "),
    "a flag of 0": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"5": {"content": "a", "special": None}}},
        "5: ",
    ),
    "a number": ("tokenizer_config.json", {"eos_token": 2}, "is 2, expected a text, or null"),
    "false": ("tokenizer_config.json", {"eos_token": False}, "is False, expected a text, or null"),
    "several": ("tokenizer_config.json", {"eos_token": ["</s>"]}, "is ['</s>'], expected a text"),
    "an object": ("special_tokens_map.json", {"bos_token": {"id": 1}}, "is {'id': 1}, expected a text"),
    "a name": ("tokenizer_config.json", {"additional_special_tokens": "<a>"}, "is '<a>', expected texts"),
    "a number of names": ("tokenizer_config.json", {"extra_special_tokens": 5}, "is 5, expected texts"),
    "numbers": ("tokenizer_config.json", {"extra_special_tokens": {"image": 5}}, "is {'image': 5}, expected texts"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_side_files_are_one_line(tmp_path: Path, name: str) -> None:
    file, content, said = MISTAKES[name]
    sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"^\S") as caught:
        load_tokenizer(str(tmp_path), "magicoder")
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_side_files_nested_without_end_are_no_json(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model", model_type="bpe")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON: maximum recursion depth"):
        load_tokenizer(str(tmp_path), "magicoder")


@pytest.mark.parametrize("template", ["reflection", "magicoder"])
def test_transformers_loads_the_saved_folder(tmp_path: Path, template: Any) -> None:
    for name, source in sources(tmp_path).items():
        tokenizer = load_tokenizer(str(source), template)
        folder = tmp_path / "saved" / name
        tokenizer.save(folder)
        model_type = "qwen2" if name == "qwen" else "llama"
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        loaded = AutoTokenizer.from_pretrained(folder)
        for text in [*RENDERED, *hard_texts()[:200]]:
            assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert len(loaded) == tokenizer.size
        assert loaded.eos_token_id == tokenizer.eos_id
        assert loaded.bos_token_id == (None if name == "qwen" else tokenizer.bos_id)
        assert loaded.pad_token_id == tokenizer.eos_id
        assert {tag: loaded.convert_tokens_to_ids(tag) for tag in tokenizer.tag_ids} == tokenizer.tag_ids
        assert set(tokenizer.tag_ids) <= set(loaded.all_special_tokens)
        again = load_tokenizer(str(folder), template)
        assert (again.tag_ids, again.tag_sub_tokens, again.size) == (tokenizer.tag_ids, {}, tokenizer.size)
        if name in ("golden", "bpe"):
            assert (folder / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_chat_template_renders_what_was_trained_on(tmp_path: Path) -> None:
    load_tokenizer(str(GOLDEN / "llama_before"), "reflection").save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("system", " s\n"), ("user", "u {{ x }}"), ("assistant", "\n a "), ("user", ""), ("assistant", "b")]
    plain = [{"role": role, "content": content} for role, content in turns]
    parts = [plain[0], {"role": "user", "content": [{"type": "text", "text": "u {{ x }}"}]}, *plain[2:]]
    for messages in [*(sample["messages"] for sample in SAMPLES), plain]:
        kind = {"messages": messages, "type": "generation"}
        expected = render(parse_record(kind))
        assert loaded.apply_chat_template(messages, tokenize=False) == expected
        prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == expected + "<|assistant|>"
    same = loaded.apply_chat_template(parts, tokenize=False)
    assert same == loaded.apply_chat_template(plain, tokenize=False)
    user = [{"role": "user", "content": "q"}]
    ids = loaded.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert ids == loaded.encode(
        "<|user|><|text|>q<|endofblock|><|endofmessage|><|assistant|>", add_special_tokens=False
    )
    for bad in ([{"role": "tool", "content": "x"}], [plain[0], plain[2]]):
        with pytest.raises(Exception, match="roles are user and assistant"):
            loaded.apply_chat_template(bad, tokenize=False)


@pytest.mark.parametrize("name", ["golden", "qwen"])
def test_magicoder_chat_template_is_its_prompt(tmp_path: Path, name: str) -> None:
    source = GOLDEN / "llama_before" if name == "golden" else qwen_like(tmp_path / "qwen")
    tokenizer = load_tokenizer(str(source), "magicoder")
    tokenizer.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    instruction = 'say "{response}"\n  and é'
    user, assistant = {"role": "user", "content": instruction}, {"role": "assistant", "content": " done\n"}
    prompt = MAGICODER_PROMPT.format(instruction=instruction, response="")
    ids = loaded.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(prompt)]
    whole = loaded.apply_chat_template([user, assistant], tokenize=False)
    assert whole == tokenizer.backend.id_to_token(tokenizer.bos_id) + prompt + " done\n"
    with pytest.raises(Exception, match="expected one user message"):
        loaded.apply_chat_template([user, assistant, user], tokenize=False)
