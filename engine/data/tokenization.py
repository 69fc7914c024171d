"""A conversation and a tokenizer come in, the token ids of one sample and their structure go out.

The whole text is encoded at once and the structure is read off the tags' ids, so ids equal the reference's. A sample
is never cut. N tokens; positions are indices into ``input_ids``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from typing_extensions import assert_never

from reflectron.engine.data.conversation import BadRecord, Conversation, Kind
from reflectron.engine.data.tokenizer import MAGICODER_PROMPT, Template, Tokenizer

SpecialTokens = Literal["keep", "spell_out"]
TOO_LONG = "too long"
"""The fault of records that are skipped for their length alone, which is no fault of the data."""

# To be raised when some record comes to other ids or another structure than before: stores are then made anew, and a
# run in progress is refused rather than changed.
PARSER_VERSION = 2

_BLOCK_TAGS = ("<|text|>", "<|code|>", "<|execution|>")


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """One sample as token ids.

    The privileged part is what only the teacher is sure to see: the student sees of the tokens before ``prefix_end``
    nothing but visible blocks of the reflection sequence.
    """

    kind: Kind
    input_ids: np.ndarray
    """int32 [N], BOS ... EOS."""
    supervised: np.ndarray
    """bool [N]: the token is a next-token target. BOS, user turns and execution blocks are not."""
    blocks: np.ndarray
    """int32 [blocks, 3]: (0 text | 1 code | 2 execution, start, end) of the reflection sequence, the first assistant
    turn; tag and ``<|endofblock|>`` included, end exclusive. Empty for other kinds."""
    prefix_end: int
    """One past the privileged part. reflection: one past the ``<|endofmessage|>`` of the first assistant turn;
    privileged: the second ``<|user|>``; generation: 0."""
    final_start: int
    """The last ``<|assistant|>``; -1 for generation."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the contents spell, each once; whether ``input_ids`` has their ids is the caller's choice."""


def render(conversation: Conversation) -> str:
    """Return the text of a conversation in the papers' format, without BOS and EOS."""
    parts = []
    for message in conversation.messages:
        blocks = "".join(f"<|{block.type}|>{block.content}<|endofblock|>" for block in message.blocks)
        parts.append(f"<|{message.role}|>{blocks}<|endofmessage|>")
    return "".join(parts)


def tokenize(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
    special_tokens: SpecialTokens = "spell_out",
) -> TokenizedSample:
    """Turn a conversation into one sample.

    Args:
        max_length: most tokens of a sample, BOS and EOS included.
        special_tokens: what becomes of special tokens that contents spell; the seven tags aside, which none does.

    Raises:
        BadRecord: when the sample is longer, or ``template`` cannot express the conversation.
    """
    if template == "magicoder":
        return _tokenize_magicoder(conversation, tokenizer, max_length, special_tokens)
    text = _Encoded.of([render(conversation)], tokenizer, special_tokens)
    input_ids = _framed(text.parts[0], tokenizer, max_length)
    return _with_structure(conversation, input_ids, tokenizer.tag_ids, text.special_tokens)


@dataclass(frozen=True)
class _Encoded:
    """Texts that are encoded apart, and the special tokens that they spell."""

    parts: list[list[int]]
    special_tokens: tuple[str, ...]

    @classmethod
    def of(cls, texts: list[str], tokenizer: Tokenizer, special_tokens: SpecialTokens) -> _Encoded:
        parts = [tokenizer.encode(text) for text in texts]
        found = _spelt(texts, parts, tokenizer)
        if found and special_tokens == "spell_out":
            parts = [tokenizer.encode_spelt_out(text) for text in texts]
            # A vocabulary may have the token as an ordinary piece as well.
            if left := _spelt(texts, parts, tokenizer):
                raise BadRecord(f"special token in content: {left[0]}, which this tokenizer cannot spell out")
        return cls(parts, found)


def _spelt(texts: list[str], parts: list[list[int]], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the special tokens among the ids of ``texts``; <unk> also stands for what the vocabulary does not have."""
    special = tokenizer.special_tokens
    found = special.keys() & {i for ids in parts for i in ids}
    unknown = tokenizer.settings.get("unk_token")
    return tuple(special[i] for i in sorted(found) if special[i] != unknown or any(unknown in text for text in texts))


def _with_structure(
    conversation: Conversation, input_ids: np.ndarray, tag_ids: dict[str, int], special_tokens: tuple[str, ...]
) -> TokenizedSample:
    kind = conversation.kind

    def positions(tag: str) -> np.ndarray:
        return np.flatnonzero(input_ids == tag_ids[tag])

    users, assistants = positions("<|user|>"), positions("<|assistant|>")
    message_ends, block_ends = positions("<|endofmessage|>"), positions("<|endofblock|>")
    supervised = np.ones(len(input_ids), dtype=bool)
    supervised[0] = False
    answers = [message for message in conversation.messages if message.role == "assistant"]
    unsupervised = assistants[[not message.supervised for message in answers]]
    # EOS ends the last turn.
    supervised[-1] = conversation.messages[-1].supervised
    for starts, ends in ((users, message_ends), (unsupervised, message_ends), (positions("<|execution|>"), block_ends)):
        for start, end in zip(starts, _next(ends, starts), strict=True):
            supervised[start : end + 1] = False
    blocks = np.empty((0, 3), dtype=np.int32)
    prefix_end, final_start = 0, -1
    if kind == "generation":
        pass
    elif kind == "reflection":
        prefix_end = int(_next(message_ends, assistants[:1])[0]) + 1
        tagged = sorted(
            (s, t) for t, tag in enumerate(_BLOCK_TAGS) for s in positions(tag) if assistants[0] < s < prefix_end
        )
        last = _next(block_ends, np.array([start for start, _ in tagged]))
        blocks = np.array([(t, s, e + 1) for (s, t), e in zip(tagged, last, strict=True)], dtype=np.int32)
        final_start = int(assistants[-1])
    elif kind == "privileged":
        prefix_end = int(users[1])
        final_start = int(assistants[-1])
    else:
        assert_never(kind)
    return TokenizedSample(kind, input_ids, supervised, blocks, prefix_end, final_start, special_tokens)


def _tokenize_magicoder(
    conversation: Conversation, tokenizer: Tokenizer, max_length: int, special_tokens: SpecialTokens
) -> TokenizedSample:
    """Join BOS, prompt, response and EOS; prompt and response are encoded apart, as in Magicoder's ``train.py``."""
    messages = conversation.messages
    roles = [message.role for message in messages]
    if conversation.kind != "generation" or roles != ["user", "assistant"] or any(len(m.blocks) != 1 for m in messages):
        raise BadRecord(
            f"not for template magicoder: found {conversation.kind} with {', '.join(roles)}; "
            "expected generation with user, assistant, of one block each"
        )
    instruction, response = (message.blocks[0].content for message in messages)
    texts = [MAGICODER_PROMPT.format(instruction=instruction, response=""), response]
    text = _Encoded.of(texts, tokenizer, special_tokens)
    prompt_ids, response_ids = text.parts
    input_ids = _framed(prompt_ids + response_ids, tokenizer, max_length)
    supervised = np.arange(len(input_ids)) > len(prompt_ids)
    no_blocks = np.empty((0, 3), dtype=np.int32)
    return TokenizedSample("generation", input_ids, supervised, no_blocks, 0, -1, text.special_tokens)


def _framed(text_ids: list[int], tokenizer: Tokenizer, max_length: int) -> np.ndarray:
    if len(text_ids) > max_length - 2:
        most = max_length - 2
        raise BadRecord(f"{TOO_LONG}: {len(text_ids)} tokens, expected at most {most} (data.max_length less 2)")
    return np.array([tokenizer.bos_id, *text_ids, tokenizer.eos_id], dtype=np.int32)


def _next(ends: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return for each start the first of ``ends`` (ascending) behind it."""
    return ends[np.searchsorted(ends, starts)]
