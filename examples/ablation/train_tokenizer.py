"""Trains a tokenizer of byte-level BPE tokens on the training data; the engine adds the seven tags.

Digits stand alone, so that constants are copied and not looked up. Afterwards the lengths of the samples are printed.

    python examples/ablation/train_tokenizer.py --data outputs/ablation/data --out outputs/ablation/tokenizer
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from reflectron.engine.data.conversation import Conversation
from reflectron.engine.data.sources import parse_record
from reflectron.engine.data.tokenization import tokenize
from reflectron.engine.data.tokenizer import load_tokenizer

VOCABULARY = 633
"""With the tags 640: no row of the embedding is padding."""
_NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def conversations(file: Path) -> Iterator[Conversation]:
    """The samples of a file."""
    yield from (parse_record(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines())


def train(files: list[Path]) -> tokenizers.Tokenizer:
    """The same files give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_NAMED.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (b.content for file in files for c in conversations(file) for m in c.messages for b in m.blocks)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def lengths(file: Path, folder: Path) -> np.ndarray:
    """Tokens of each sample of a file, tags, BOS and EOS included: int32 [samples]."""
    tokenizer = load_tokenizer(str(folder), "reflection")
    samples = [tokenize(c, tokenizer, "reflection", 1 << 20) for c in conversations(file)]
    return np.array([len(sample.input_ids) for sample in samples], dtype=np.int32)


def main() -> None:
    """Train, write and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of instruction.jsonl and reflection.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tokenizer")
    args = parser.parse_args()
    files = [args.data / f"{name}.jsonl" for name in ("instruction", "reflection")]
    args.out.mkdir(parents=True, exist_ok=True)
    train(files).save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(_NAMED, indent=2) + "\n", encoding="utf-8")
    for file in files:
        n = lengths(file, args.out)
        print(
            f"{file.name}: {len(n)} samples, {n.sum()} tokens, {n.min()} to {n.max()} each, median {np.median(n):.0f}"
        )


if __name__ == "__main__":
    main()
