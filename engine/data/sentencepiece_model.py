"""Converts a sentencepiece model file into the ``tokenizers.Tokenizer`` with the same ids.

Between special tokens the ids equal sentencepiece's own ``encode`` of each piece of text ("legacy" behaviour: with
``add_dummy_prefix`` every such piece gets the leading space). What cannot be represented exactly is refused by name;
so are unigram models, because sentencepiece lets float32 rounding choose among equally likely ways to cut a run of
one character, such as indentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

_SPACE = "▁"
# Lengths of the runs of one character on which a conversion is compared with the original.
_RUNS = (*range(1, 40), 63, 64, 65, 96, 127, 128, 129)


@dataclass(frozen=True)
class SentencePieceModel:
    """A converted model and the names of its special tokens (None where the model has none)."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    unk_token: str
    pad_token: str | None


def convert_sentencepiece(path: Path) -> SentencePieceModel:
    """Convert a BPE model, with or without byte fallback.

    Control pieces and ``<unk>`` become special tokens, so a text that spells one out yields its id, as in transformers.

    Raises:
        ValueError: when the file is no sentencepiece model, or naming the field that cannot be represented.
    """
    processor, proto = _read(path)
    _check_representable(proto, path)
    kinds = type(proto).SentencePiece
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    tokenizer = Tokenizer(_bpe(proto, pieces))
    prefixed = proto.normalizer_spec.add_dummy_prefix
    steps = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = (kinds.CONTROL, kinds.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(p, normalized=False, special=True) for p, _, t in pieces if t in special])
    # Sentencepiece looks for them in the text with escaped spaces, so one with a plain space is never found.
    user_defined = [p for p, _, t in pieces if t == kinds.USER_DEFINED and " " not in p]
    tokenizer.add_tokens([AddedToken(p, normalized=True, special=False) for p in user_defined])
    _check_ties(pieces, kinds.NORMAL, path)
    _check_runs(tokenizer, processor, pieces, path)
    return _with_special_names(tokenizer, proto.trainer_spec, {piece: i for i, (piece, _, _) in enumerate(pieces)})


def _with_special_names(tokenizer: Tokenizer, spec: Any, ids: dict[str, int]) -> SentencePieceModel:
    def name(piece: str, declared: int) -> str | None:
        return piece if declared >= 0 and piece in ids else None

    bos = name(spec.bos_piece, spec.bos_id)
    if bos is not None:
        pair = f"{bos} $A {bos}:1 $B:1"
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", pair, [(bos, ids[bos])])
    eos, pad = name(spec.eos_piece, spec.eos_id), name(spec.pad_piece, spec.pad_id)
    return SentencePieceModel(tokenizer, bos, eos, spec.unk_piece, pad)


def _check_ties(pieces: list[tuple[str, float, int]], normal: int, path: Path) -> None:
    """Refuse pieces that score alike, unless they are runs of one character: the leftmost has no rank."""
    alike: dict[float, set[str]] = {}
    for piece, score, kind in pieces:
        if kind == normal and len(piece) > 1:
            alike.setdefault(score, set()).add(piece)
    for score, tied in alike.items():
        if len(tied) > 1 and len(set("".join(tied))) > 1:
            first, second, *_ = sorted(tied)
            raise ValueError(
                f"{path} cannot be represented: its pieces {first!r} and {second!r} have the same score {score:g}; "
                "give a tokenizer.json"
            )


def _check_runs(tokenizer: Tokenizer, processor: Any, pieces: list[tuple[str, float, int]], path: Path) -> None:
    """Compare the ids of runs of one character, where merges that give the same piece compete."""
    repeated = {piece[0] for piece, _, _ in pieces if len(piece) > 1 and len(set(piece)) == 1}
    for character in sorted(repeated):
        for length in _RUNS:
            text = character.replace(_SPACE, " ") * length
            if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
                raise ValueError(
                    f"{path} cannot be represented: {length} times {character!r} has other ids in sentencepiece; give "
                    "a tokenizer.json"
                )


def _read(path: Path) -> tuple[Any, Any]:
    # Imported here: only this kind of tokenizer needs protobuf.
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is not a sentencepiece model") from None
    return processor, sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())


def _check_representable(proto: Any, path: Path) -> None:
    kinds = type(proto).SentencePiece
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    types = {piece.type for piece in proto.pieces}
    user_defined = kinds.USER_DEFINED in types
    wanted = (
        (not normalizer.precompiled_charsmap, "normalizer_spec.name", normalizer.name, "'identity'"),
        (
            not normalizer.remove_extra_whitespaces,
            "normalizer_spec.remove_extra_whitespaces",
            True,
            "false (it would remove the indentation of code)",
        ),
        (normalizer.escape_whitespaces, "normalizer_spec.escape_whitespaces", False, "true"),
        (
            not (normalizer.add_dummy_prefix and user_defined),
            "normalizer_spec.add_dummy_prefix",
            True,
            "false in a model with user-defined pieces",
        ),
        (not trainer.treat_whitespace_as_suffix, "trainer_spec.treat_whitespace_as_suffix", True, "false"),
        (trainer.model_type == 2, "trainer_spec.model_type", trainer.model_type, "2 (bpe)"),
        (kinds.UNUSED not in types, "pieces.type", "UNUSED", "no unused piece"),
    )
    for ok, field, value, expected in wanted:
        if not ok:
            raise ValueError(f"{field} of {path} is {value!r}, expected {expected}; or give a tokenizer.json")


def _bpe(proto: Any, pieces: list[tuple[str, float, int]]) -> BPE:
    """Sentencepiece merges the pair whose result scores highest; here merges are ranked by that score.

    Of pairs that score alike sentencepiece takes the leftmost, and in a run of one character that is the one with the
    longest left part: those of one piece score alike, and in Llama's and Mistral's models all runs of spaces do.

    Only normal pieces arise by merging: bytes, control and user-defined pieces never do.
    """
    normal = type(proto).SentencePiece.NORMAL
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == normal}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -len(left), ids[piece], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    fallback = proto.trainer_spec.byte_fallback
    return BPE(ids, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=fallback)
