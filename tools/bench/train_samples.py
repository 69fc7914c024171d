"""The samples of the measured step: made up from the papers' lengths, or the user's own.

The made-up ones have the lengths of the planner's distribution ``papers`` (its notes say where that is from), taken at
even distances from the sorted list, so that a few samples stand for all. Their tokens are random; their structure is
that of a real sample, with the shares below.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reflectron.engine.config import Config, DataFile
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import SampleRef, mask_draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.tokenization import TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import load_tokenizer
from reflectron.engine.data.views import SampleViews, make_views
from reflectron.tools.planner.samples import assumed_samples, typical_batch

# Of a reflection sample's tokens: the first user turn, the blocks of the reflection sequence by type, and the answer;
# the rest is the second user turn. Of a generation sample, the answer.
_USER, _BLOCKS, _FINAL_ANSWER = 0.12, {0: 0.20, 1: 0.30, 2: 0.22}, 0.12
_ANSWER = 0.70
_ROUNDS = 3
"""Times that text, code and execution follow each other."""


def synthetic_samples(count: int, config: Config, vocab_size: int) -> list[TokenizedSample]:
    """``count`` samples, the same at every call."""
    batch = typical_batch(assumed_samples("papers", config), 0, count)
    random = np.random.default_rng(config.seed)
    return [
        synthetic_sample(int(length), bool(reflection), random, vocab_size)
        for length, reflection in zip(batch.teacher, batch.reflection, strict=True)
    ]


def synthetic_sample(length: int, reflection: bool, random: np.random.Generator, vocab_size: int) -> TokenizedSample:
    """A sample of ``length`` random tokens."""
    input_ids = random.integers(0, vocab_size, length).astype(np.int32)
    supervised = np.zeros(length, bool)
    if not reflection:
        supervised[-round(_ANSWER * length) :] = True
        return TokenizedSample("generation", input_ids, supervised, np.empty((0, 3), np.int32), 0, -1)
    start = max(3, round(_USER * length))
    blocks = []
    position = start
    for _ in range(_ROUNDS):
        for kind, share in _BLOCKS.items():
            end = position + max(1, round(share * length / _ROUNDS))
            blocks.append((kind, position, end))
            supervised[position:end] = kind != 2
            position = end
    # <|assistant|> before the sequence, <|endofmessage|> behind it.
    supervised[start - 1] = supervised[position] = True
    final_start = length - 2 - max(1, round(_FINAL_ANSWER * length))
    assert position + 1 < final_start, "the shares leave room for the second user turn"
    supervised[final_start:] = True
    return TokenizedSample("reflection", input_ids, supervised, np.array(blocks, np.int32), position + 1, final_start)


def samples_of_file(path: Path, tokenizer_path: str, count: int, config: Config) -> tuple[list[TokenizedSample], int]:
    """Samples of a file of conversations at even distances from the list sorted by length; the tokenizer's size.

    Raises:
        ValueError: when the file has fewer samples that fit than ``count``.
    """
    tokenizer = load_tokenizer(tokenizer_path, config.data.template)
    found = []
    for record in read_records(DataFile(path=str(path))):
        try:
            found.append(tokenize(record.conversation(), tokenizer, config.data.template, config.data.max_length))
        except BadRecord:
            continue
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} samples that fit, expected at least --samples {count}")
    found.sort(key=lambda sample: (sample.kind, len(sample.input_ids)))
    chosen = ((np.arange(count) + 0.5) / count * len(found)).astype(int)
    return [found[index] for index in chosen], tokenizer.size


def views_at(samples: list[TokenizedSample], rate: float, config: Config) -> list[SampleViews]:
    """What teacher and student see of each sample at a mask rate."""
    return [
        make_views(s, visible_tokens(s, config.mask, rate, mask_draws(config.seed, SampleRef(0, index, 0))))
        for index, s in enumerate(samples)
    ]
