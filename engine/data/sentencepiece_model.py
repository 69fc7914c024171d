"""A sentencepiece model file comes in, the ``tokenizers.Tokenizer`` with the same ids goes out.

Between special tokens the ids equal sentencepiece's own ``encode`` of each piece of text ("legacy" behaviour: with
``add_dummy_prefix`` every such piece gets the leading space). What cannot be represented exactly is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE, Unigram

_SPACE = "▁"
_NEVER_CHOSEN = -1e6


@dataclass(frozen=True)
class SentencePieceModel:
    """A converted model and the names of its special tokens (None where the model has none)."""

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    unk_token: str
    pad_token: str | None


def convert_sentencepiece(path: Path) -> SentencePieceModel:
    """Convert a BPE or Unigram model, with or without byte fallback.

    Control pieces and ``<unk>`` become special tokens, so a text that spells one out yields its id, as in transformers.
    Unigram: a run of one character can often be cut into the same pieces in another order, all equally likely;
    sentencepiece lets its float32 rounding choose, here the order may differ.

    Raises:
        ValueError: when the file is no sentencepiece model, or naming the field that cannot be represented.
    """
    proto = _read(path)
    _check_representable(proto, path)
    kinds = type(proto).SentencePiece
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    tokenizer = Tokenizer(_bpe(proto, pieces) if proto.trainer_spec.model_type == 2 else _unigram(proto, pieces))
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


def _read(path: Path) -> Any:
    # Imported here: only this kind of tokenizer needs protobuf.
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        content = SentencePieceProcessor(model_file=str(path)).serialized_model_proto()
    except RuntimeError:
        raise ValueError(f"{path} is not a sentencepiece model") from None
    return sentencepiece_model_pb2.ModelProto.FromString(content)


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
        (trainer.model_type in (1, 2), "trainer_spec.model_type", trainer.model_type, "1 (unigram) or 2 (bpe)"),
        (kinds.UNUSED not in types, "pieces.type", "UNUSED", "no unused piece"),
        (not (trainer.model_type == 1 and user_defined), "pieces.type", "USER_DEFINED", "none in a unigram model"),
    )
    for ok, field, value, expected in wanted:
        if not ok:
            raise ValueError(f"{field} of {path} is {value!r}, expected {expected}; or give a tokenizer.json")


def _bpe(proto: Any, pieces: list[tuple[str, float, int]]) -> BPE:
    """Sentencepiece merges the pair whose result scores highest; here merges are ranked by that score.

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


def _unigram(proto: Any, pieces: list[tuple[str, float, int]]) -> Unigram:
    """Bytes are reached by fallback only; their score keeps a text that spells ``<0x0A>`` from matching the piece."""
    kinds = type(proto).SentencePiece
    vocabulary = [(piece, _NEVER_CHOSEN if kind == kinds.BYTE else score) for piece, score, kind in pieces]
    unk_id = next(i for i, (_, _, kind) in enumerate(pieces) if kind == kinds.UNKNOWN)
    return Unigram(vocabulary, unk_id, proto.trainer_spec.byte_fallback)
