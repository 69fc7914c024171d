"""The model and the tokenizer that a run starts from, and whether the two belong together.

Another model's tokenizer trains without an error, on ids that mean something else. Its tokens are held against the
rows of the model, its vocabulary and ids against the model's: what shows another model is rejected, what is only odd
is returned as a line to print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reflectron.engine.config import Config
from reflectron.engine.data.tokenizer import Tokenizer, load_tokenizer
from reflectron.engine.files import printable
from reflectron.engine.model.architecture import Architecture, check_parallel, layers_per_stage
from reflectron.engine.model.hf_config import parse_architecture, read_hf_config

# A fine-tune adds a handful of tokens; a vocabulary that is larger by more than this is another model's.
_MOST_NEW_TOKENS = 1024


def check_tokenizer(
    arch: Architecture, tokenizer: Tokenizer, tokenizer_path: str, hf_config: Mapping[str, Any], model_path: str | None
) -> tuple[str, ...]:
    """Compare ``tokenizer``, read from ``tokenizer_path``, with the model.

    Args:
        arch: with the rows of the checkpoint.
        hf_config: its ``config.json``.
        model_path: folder of its weights, which may hold a tokenizer as well; None for a random initialisation.

    Returns:
        Lines for the user.

    Raises:
        ValueError: when it is another model's, naming what shows it.
    """
    notes = _new_rows(arch, tokenizer, tokenizer_path)
    is_own = model_path is None or Path(tokenizer_path).resolve() == Path(model_path).resolve()
    compared = not is_own and model_path is not None and _compare_vocabularies(tokenizer, tokenizer_path, model_path)
    for note in _other_ids(tokenizer, tokenizer_path, hf_config):
        # Whoever names another folder, beside a model that comes without a tokenizer, has nothing else that is checked.
        if not is_own and not compared:
            raise ValueError(
                f"{note}: it is another model's, or config.json's id has to be set to that of the tokenizer"
            )
        notes.append(note)
    return tuple(notes)


def _new_rows(arch: Architecture, tokenizer: Tokenizer, tokenizer_path: str) -> list[str]:
    """Note the tokens beyond the model's rows, which get new ones; tags are not mentioned."""
    tags = {tokenizer.tag_ids[tag] for tag in tokenizer.tag_sub_tokens}
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    new = sorted(i for i in set(vocabulary.values()) - tags if i >= arch.vocab_size)
    if not new:
        return []
    # Ids may have gaps, and each needs a row.
    if (rows := new[-1] + 1 - arch.vocab_size) > _MOST_NEW_TOKENS:
        raise ValueError(
            f"{tokenizer_path}: the tokenizer has ids up to {new[-1]}, which need {rows} more rows than the model has "
            f"(vocab_size {arch.vocab_size}), expected at most {_MOST_NEW_TOKENS}: it is another model's; set "
            "tokenizer.path"
        )
    return [
        f"the tokenizer has {len(new)} tokens that the model has no rows for (ids {new[0]} to {new[-1]}, vocab_size "
        f"{arch.vocab_size}): they get new rows, each the mean of the old ones"
    ]


def _compare_vocabularies(tokenizer: Tokenizer, tokenizer_path: str, model_path: str) -> bool:
    """Compare with the tokenizer in the model's folder; return whether there is one.

    Raises:
        ValueError: when an ordinary token of it has another id in ``tokenizer``.
    """
    if not any((Path(model_path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return False
    try:
        own = load_tokenizer(model_path, "magicoder").backend.get_vocab(with_added_tokens=False)
    except ValueError:
        return False  # why another one is named
    for content, i in sorted(own.items(), key=lambda item: item[1]):
        found = tokenizer.backend.id_to_token(i)
        if found != content:
            raise ValueError(
                f"{tokenizer_path}: token {i} is {_shown(found)}, but {_shown(content)} in the tokenizer of "
                f"{model_path}: it is another model's; leave tokenizer.path out, or name one that extends that one"
            )
    return True


def _other_ids(tokenizer: Tokenizer, tokenizer_path: str, hf_config: Mapping[str, Any]) -> list[str]:
    """Note ids of BOS and EOS in ``config.json``, which may name several, that are not the tokenizer's."""
    ids = {"eos": tokenizer.eos_id}
    if tokenizer.settings.get("bos_token") is not None:
        ids["bos"] = tokenizer.bos_id
    notes = []
    for name, found in ids.items():
        declared = hf_config.get(f"{name}_token_id")
        expected = declared if isinstance(declared, list) else [declared]
        if declared is not None and found not in expected:
            notes.append(
                f"{tokenizer_path}: {name}_token of the tokenizer has id {found}, "
                f"{name}_token_id of config.json is {printable(declared)}"
            )
    return notes


def _shown(token: str | None) -> str:
    return "no token" if token is None else printable(repr(token), 60)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The model that is trained, before its weights are read."""

    hf_config: dict[str, Any]
    """``config.json`` of the original."""
    arch: Architecture
    """Its architecture, with a vocabulary that holds the tokenizer's tags."""
    original_vocab_size: int
    """Rows of the original's embedding."""
    tokenizer: Tokenizer
    """The tokenizer, with the tags."""
    notes: tuple[str, ...] = ()
    """Lines for the user on how the two go together."""


def read_model_inputs(config: Config) -> ModelInputs:
    """Read architecture and tokenizer, checked against the parallel layout.

    Raises:
        ValueError: naming the key or file at fault.
    """
    source = config.model.path or config.model.config
    if source is None:
        raise ValueError("model.path is null, expected a checkpoint folder, or model.config a config.json")
    hf_config = read_hf_config(source)
    arch = parse_architecture(hf_config, str(source))
    tokenizer_path = config.tokenizer.path or config.model.path
    assert tokenizer_path is not None, "check_relations asks for tokenizer.path beside model.config"
    tokenizer = load_tokenizer(tokenizer_path, config.data.template)
    notes = check_tokenizer(arch, tokenizer, tokenizer_path, hf_config, config.model.path)
    check_parallel(arch, config.parallel)
    layers_per_stage(arch.num_layers, config.parallel)
    return ModelInputs(
        hf_config=hf_config,
        arch=replace(arch, vocab_size=max(arch.vocab_size, tokenizer.size)),
        original_vocab_size=arch.vocab_size,
        tokenizer=tokenizer,
        notes=notes,
    )
