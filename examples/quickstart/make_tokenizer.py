"""Trains the quickstart's sentencepiece model on its training data: BPE with byte fallback, ids 0 to 2 for unknown, BOS
and EOS. The engine adds the seven tags. Afterwards the data are measured with the new tokenizer.

Decoding gives back every text exactly: nothing is normalised, and runs of spaces, newlines and tabs are kept.

    python examples/quickstart/make_tokenizer.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.tokenizer import load_tokenizer

FOLDER = Path(__file__).parent
TRAINING_FILES = ("reflection", "instruction", "instruction_query_answer")
FILES = (*TRAINING_FILES, "validation")
VOCABULARY = 2048
MAX_LENGTH = 512


def records(name: str) -> list[dict[str, object]]:
    """The records of one data file."""
    return [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(names: Iterable[str]) -> Iterator[str]:
    """The content of every block."""
    for name in names:
        for record in records(name):
            for message in parse_record(record).messages:
                for block in message.blocks:
                    yield block.content


def train(sentences: Iterable[str]) -> bytes:
    """A serialised model; the same sentences give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def lengths(name: str) -> np.ndarray:
    """Tokens of each sample of a file, tags, BOS and EOS included: int32 [samples].

    Raises:
        BadRecord: when the engine would reject a sample.
    """
    tokenizer = load_tokenizer(str(FOLDER / "tokenizer"), "reflection")
    samples = [tokenize(parse_record(record), tokenizer, "reflection", MAX_LENGTH) for record in records(name)]
    return np.array([len(sample.input_ids) for sample in samples], dtype=np.int32)


def table() -> str:
    """Counts and lengths of all files, in Markdown."""
    lines = ["| file | samples | tokens | shortest | median | longest |", "|---|--:|--:|--:|--:|--:|"]
    for name in FILES:
        n = lengths(name)
        lines.append(f"| `{name}.jsonl` | {len(n)} | {n.sum()} | {n.min()} | {np.median(n):.0f} | {n.max()} |")
    return "\n".join(lines)


def main() -> None:
    """Train, write and measure."""
    path = FOLDER / "tokenizer" / "tokenizer.model"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(train(texts(TRAINING_FILES)))
    print(table())


if __name__ == "__main__":
    main()
