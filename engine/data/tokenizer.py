"""Loads a tokenizer folder or sentencepiece model as a ``Tokenizer`` with the seven tags, and writes a folder again.

Whatever the source, ids come from one ``tokenizers.Tokenizer``. A ``tokenizer.json`` is taken as it stands: classes
that rebuild it (transformers 5's LlamaTokenizer) tokenise a block that starts with a space differently.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from typing_extensions import assert_never

from reflectron.engine.data.sentencepiece_model import convert_sentencepiece
from reflectron.engine.files import printable, read_object

TAGS = ("<|user|>", "<|assistant|>", "<|text|>", "<|code|>", "<|execution|>", "<|endofblock|>", "<|endofmessage|>")
"""The tags of a rendered conversation, in the order in which they get their ids."""

MAGICODER_PROMPT = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\n{instruction}\n\n@@ Response\n{response}"
)
"""Magicoder's prompt for training and for evaluation (arXiv 2312.02120)."""

Template = Literal["reflection", "magicoder"]

# No BOS: the student never saw it. A list content holds our typed blocks, or OpenAI parts with their text in "text".
_REFLECTION_CHAT = """\
{%- macro blocks(message) -%}
{%- if message['content'] is string -%}
{{- '<|text|>' + message['content'] + '<|endofblock|>' -}}
{%- else -%}
{%- for block in message['content'] -%}
{{- '<|' + block['type'] + '|>' + (block['content'] if 'content' in block else block['text']) + '<|endofblock|>' -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = blocks(messages[0]) if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if message['role'] not in ['user', 'assistant'] or (system and loop.first and message['role'] != 'user') -%}
{{- raise_exception('roles are user and assistant; a system message comes first, before a user message') -}}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + (system if loop.first else '') + blocks(message) + '<|endofmessage|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

# BOS: training starts with it.
_MAGICODER_CHAT = """\
{%- if messages | map(attribute='role') | list not in [['user'], ['user', 'assistant']] -%}
{{- raise_exception('expected one user message and at most one assistant message') -}}
{%- endif -%}
{{- BOS + HEAD + messages[0]['content'] + TAIL -}}
{%- if messages | length == 2 -%}{{- messages[1]['content'] -}}{%- endif -%}"""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_LOOKS_SPECIAL = re.compile(r"<[|｜].+[|｜]>|<(fim|file|repo|reponame|issue|jupyter|gh)[_-]\w+>|▁?<(PRE|SUF|MID|EOT)>")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CARRIED_SETTINGS = ("model_max_length", "add_bos_token", "add_eos_token", "padding_side")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back; pickles cheaply, imports neither torch nor transformers."""

    backend: tokenizers.Tokenizer
    template: Template
    bos_id: int
    """First token of every sample: EOS where the tokenizer has no BOS (Qwen), which in pretraining stood between
    documents and so marks a start as well."""
    eos_id: int
    tag_ids: dict[str, int]
    """Empty for ``magicoder``."""
    tag_sub_tokens: dict[str, list[int]]
    """Ids that each tag split into before it was added; a tag that was there already is not listed."""
    settings: dict[str, Any]
    """Entries of the exported ``tokenizer_config.json`` that come from the source."""
    sentencepiece_file: Path | None = None
    """The source's ``tokenizer.model``, exported unchanged."""

    @property
    def size(self) -> int:
        """Ids in use, tags included: the rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def pad_id(self) -> int:
        """The padding token that an export names: the tokenizer's own, or EOS."""
        pad = self.settings.get("pad_token")
        found = None if pad is None else self.backend.token_to_id(_content(pad))
        return self.eos_id if found is None else found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that determines the ids of a text."""
        state = [self.backend.to_str(), self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Id and spelling of every token with a meaning beside its text, the seven tags excepted.

        These are the special ones, those with a name (EOS ...), and those that look special: in some tokenizers, such
        as Qwen2.5's, the ones for filling in the middle are ordinary added tokens.
        """
        named = {self.settings.get(name) for name in _NAMED_TOKENS}
        return {
            i: token.content
            for i, token in self.backend.get_added_tokens_decoder().items()
            if token.content not in TAGS
            and (token.special or token.content in named or _LOOKS_SPECIAL.fullmatch(token.content))
        }

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without BOS and EOS; special tokens spelt out in it become their ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_spelt_out(self, text: str) -> list[int]:
        """Encode with the seven tags as the only special tokens that become ids; the others are ordinary text."""
        # No part of a pickled tokenizer.
        self._tags_alone.encode_special_tokens = True
        return self._tags_alone.encode(text, add_special_tokens=False).ids

    @cached_property
    def _tags_alone(self) -> tokenizers.Tokenizer:
        """The same tokens, but special are those of ``special_tokens`` and no others, so that they can be ignored."""
        state = json.loads(self.backend.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["id"] in self.special_tokens
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def chat_template(self) -> str:
        """Return the Jinja template that renders messages as the training data are rendered."""
        if self.template == "reflection":
            return _REFLECTION_CHAT
        head, rest = MAGICODER_PROMPT.split("{instruction}")
        parts = {"BOS": self.backend.id_to_token(self.bos_id), "HEAD": head, "TAIL": rest.removesuffix("{response}")}
        template = _MAGICODER_CHAT
        for name, text in parts.items():
            template = template.replace(name, json.dumps(text, ensure_ascii=False))
        return template

    def save(self, folder: Path) -> None:
        """Write a folder that ``transformers.AutoTokenizer`` loads with the same ids.

        ``tokenizer_class`` is the one class that takes ``tokenizer.json`` as it stands, in transformers 4 and 5.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        # A name that the vocabulary does not have would be added to it when the folder is loaded.
        given = {name: self.settings[name] for name in _NAMED_TOKENS if self.settings.get(name) is not None}
        named = {name: token for name, token in given.items() if self.backend.token_to_id(_content(token)) is not None}
        named.setdefault("pad_token", named["eos_token"])
        special = {**named, "additional_special_tokens": self._additional_special_tokens()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: self.settings[name] for name in _CARRIED_SETTINGS if name in self.settings},
            **special,
            # Without it transformers 4 sets what tokenizer.json says to false.
            **_prefix_space(self.backend),
            "added_tokens_decoder": _added_tokens(self.backend),
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template(),
        }
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.sentencepiece_file is not None and self.sentencepiece_file.parent.resolve() != folder.resolve():
            shutil.copyfile(self.sentencepiece_file, folder / "tokenizer.model")

    def _additional_special_tokens(self) -> list[str]:
        declared = self.settings.get("additional_special_tokens") or self.settings.get("extra_special_tokens") or []
        contents = [_content(token) for token in (declared.values() if isinstance(declared, dict) else declared)]
        return list(dict.fromkeys([*contents, *self.tag_ids]))


def load_tokenizer(path: str, template: Template) -> Tokenizer:
    """Load a tokenizer and, for the template ``reflection``, add the tags it does not have.

    Args:
        path: folder with ``tokenizer.json`` (preferred) or ``tokenizer.model``, or a sentencepiece ``.model`` file.
        template: for ``magicoder`` nothing is added.

    Raises:
        ValueError: when there is no tokenizer at ``path``, it cannot be represented, or it has no EOS.
    """
    source = Path(path)
    folder = source if source.is_dir() else source.parent
    model_file = source / "tokenizer.model" if source.is_dir() else source
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    _check_names(settings, folder)
    json_file = source / "tokenizer.json"
    if json_file.is_file():
        backend = _from_json(json_file)
        _check_prefix_space(settings, backend, folder)
    elif model_file.is_file() and model_file.suffix == ".model":
        _check_settings(settings, folder)
        model = convert_sentencepiece(model_file)
        backend = model.tokenizer
        settings = {name: getattr(model, name) for name in _NAMED_TOKENS} | settings
    else:
        raise ValueError(f"no tokenizer at {source}: expected a folder with tokenizer.json or tokenizer.model")
    # Settings stored for inference must not cut or pad training samples.
    backend.no_truncation()
    backend.no_padding()
    own = backend.get_vocab(with_added_tokens=True)
    _add_declared(backend, settings, folder)
    named = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
    eos_id = _special_id(backend, named, "eos_token", source)
    bos_id = _special_id(backend, named, "bos_token", source) if "bos_token" in named else eos_id
    tag_ids: dict[str, int] = {}
    sub_tokens: dict[str, list[int]] = {}
    if template == "reflection":
        tag_ids, sub_tokens = _add_tags(backend)
    elif template != "magicoder":
        assert_never(template)
    _check_new_ids(own, backend, source)
    kept = model_file if model_file.is_file() else None
    return Tokenizer(backend, template, bos_id, eos_id, tag_ids, sub_tokens, settings | named, kept)


def _prefix_space(backend: tokenizers.Tokenizer) -> dict[str, bool]:
    """Return ``add_prefix_space`` of a byte-level ``tokenizer.json``, as its side file spells it; nothing for
    others."""
    state = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return {name: state[name] for name in ("add_prefix_space",) if name in state}


def _check_prefix_space(settings: dict[str, Any], backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Refuse a contradiction: transformers 4 follows the side file, 5 follows ``tokenizer.json``."""
    for name, value in _prefix_space(backend).items():
        if settings.get(name) not in (None, value):
            raise ValueError(
                f"{name} in {folder / 'tokenizer_config.json'} is {json.dumps(settings[name])}, expected "
                f"{json.dumps(value)} as in tokenizer.json, or none"
            )


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Refuse what would make transformers derive another tokenizer from a lone ``tokenizer.model``."""
    for name, ours in (("legacy", True), ("add_prefix_space", True)):
        if settings.get(name) not in (None, ours):
            raise ValueError(
                f"{name} in {folder / 'tokenizer_config.json'} is {settings[name]!r}, expected {json.dumps(ours)} or "
                "none beside a tokenizer.model alone; let transformers write tokenizer.json there"
            )


def _add_tags(backend: tokenizers.Tokenizer) -> tuple[dict[str, int], dict[str, list[int]]]:
    new = [tag for tag in TAGS if backend.token_to_id(tag) is None]
    sub_tokens = {tag: backend.encode(tag, add_special_tokens=False).ids for tag in new}
    # In transformers the default for special tokens: found in the raw text, before any normalisation.
    backend.add_special_tokens([tokenizers.AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    ids = backend.get_vocab(with_added_tokens=True)
    return {tag: ids[tag] for tag in TAGS}, sub_tokens


def _add_declared(backend: tokenizers.Tokenizer, settings: dict[str, Any], folder: Path) -> None:
    """Add tokens that only the side files of older folders declare, at the ids declared."""
    for i, token in sorted(_declared_tokens(settings, folder).items()):
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**token)])
        if (found := backend.token_to_id(token["content"])) != i:
            raise ValueError(f"token {token['content']!r} of {folder} has id {found}, expected {i} as declared there")


def _check_new_ids(own: dict[str, int], backend: tokenizers.Tokenizer, source: Path) -> None:
    """Refuse a new token with an old one's id: the package counts tokens, so it hits one where ids have gaps."""
    by_id = {i: content for content, i in own.items()}
    for content, i in backend.get_vocab(with_added_tokens=True).items():
        if content not in own and i in by_id:
            raise ValueError(
                f"the ids of the tokenizer {source} have gaps: the new token {printable(repr(content), 60)} would get "
                f"id {i}, which is that of {printable(repr(by_id[i]), 60)}; fill the gaps with unused tokens in "
                "tokenizer.json"
            )


def _declared_tokens(settings: dict[str, Any], folder: Path) -> dict[int, dict[str, Any]]:
    """Return content and flags of the tokens that the side files declare, by id."""
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(
            f"added_tokens_decoder in {folder / 'tokenizer_config.json'} is {printable(decoder, 100)}, "
            "expected an object of tokens by id"
        )
    declared = {}
    for i, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else None
        flags = {flag: token[flag] for flag in _FLAGS if flag in token} if isinstance(token, dict) else {}
        if not i.isdecimal() or not isinstance(content, str) or not {type(v) for v in flags.values()} <= {bool}:
            raise ValueError(
                f"added_tokens_decoder in {folder / 'tokenizer_config.json'} has {printable(i, 40)}: "
                f"{printable(token, 100)}, expected an id with a token's content and flags"
            )
        declared[int(i)] = {"content": content, **flags}
    for content, number in _read_json(folder / "added_tokens.json").items():
        if type(number) is not int:
            raise ValueError(
                f"{folder / 'added_tokens.json'} gives {printable(content, 60)} the id {printable(repr(number), 60)}, "
                "expected a whole number"
            )
        declared.setdefault(number, {"content": content, "special": True, "normalized": False})
    return declared


def _check_names(settings: dict[str, Any], folder: Path) -> None:
    """Refuse a named token that is no text, and a list of special tokens that holds something else."""
    listed = ("additional_special_tokens", "extra_special_tokens")
    values = {name: [settings.get(name)] for name in _NAMED_TOKENS}
    for name in listed:
        several = settings.get(name) or []
        values[name] = list(several.values()) if isinstance(several, dict) else several
    for name, tokens in values.items():
        is_list = isinstance(tokens, list)
        found = [token for token in tokens if token is not None] if is_list else []
        contents = [token.get("content") if isinstance(token, dict) else token for token in found]
        if not is_list or not all(isinstance(content, str) for content in contents):
            raise ValueError(
                f"{name} of the tokenizer {folder} is {printable(repr(settings[name]), 100)}, expected "
                f"{'texts' if name in listed else 'a text, or null'}: correct tokenizer_config.json"
            )


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The package raises plain Exception for everything that is wrong with a file.
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _special_id(backend: tokenizers.Tokenizer, named: dict[str, str], name: str, source: Path) -> int:
    if name not in named:
        raise ValueError(f"{name} of the tokenizer {source} is null, expected a token: set it in tokenizer_config.json")
    if (found := backend.token_to_id(named[name])) is None:
        raise ValueError(f"{name} of the tokenizer {source} is {named[name]!r}, expected a token of its vocabulary")
    return found


def _added_tokens(backend: tokenizers.Tokenizer) -> dict[str, dict[str, Any]]:
    flags = ("content", *_FLAGS)
    added = sorted(backend.get_added_tokens_decoder().items())
    return {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in added}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
