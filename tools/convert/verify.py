"""``reflectron convert verify``: two checkpoints of any format, tensor by tensor and by their logits on a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from reflectron.engine.model.architecture import Architecture
    from reflectron.tools.convert.model_folder import ModelFolder

_TEXT = '''def is_prime(n: int) -> bool:
    """Whether n has no divisor but 1 and itself."""
    if n < 2:
        return False
    for divisor in range(2, int(n**0.5) + 1):
        if n % divisor == 0:
            return False
    return True


assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]
'''
# Columns of the vocabulary whose logits are there at a time.
_COLUMNS = 4096


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints differ in."""

    tensors: int
    """Of each."""
    different_tensors: int
    """Those whose shape or whose values, as float32, differ."""
    largest_tensor_difference: float
    """Over all elements, absolute; infinite where shapes differ."""
    where: str
    """The tensor with that difference; empty when none differs."""
    sha256: tuple[str, str]
    """Of all tensors in the order of the forward: name, type, shape and bytes."""
    tokens: int
    """Of the text; 0 when shapes differ and no logits can be compared."""
    largest_logit_difference: float
    """Over all tokens and the whole vocabulary, absolute, computed in float32."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    for name in ("first", "second"):
        parser.add_argument(name, metavar=name.upper(), help="checkpoint folder of either format")
    parser.add_argument("--text", metavar="FILE", help="text to compute logits on; a short program by default")
    parser.add_argument("--max-tokens", type=int, default=512, help="of the text that are used (default 512)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="logit difference that passes (default 0)")
    parser.add_argument("--json", metavar="OUT", help="write the numbers there as well")


def run(args: argparse.Namespace) -> int:
    """Compare; 0 when the largest logit difference is within the tolerance, else 1."""
    from reflectron.tools.convert.model_folder import open_model_folder

    text = Path(args.text).read_text(encoding="utf-8") if args.text else _TEXT
    folders = open_model_folder(args.first), open_model_folder(args.second)
    comparison = compare(*folders, text, args.max_tokens)
    for folder, digest in zip(folders, comparison.sha256, strict=True):
        print(f"{folder.folder}: {comparison.tensors} tensors, SHA-256 {digest}")
    worst = f", most in {comparison.where}" if comparison.where else ""
    print(
        f"{comparison.different_tensors} of {comparison.tensors} tensors differ, by at most "
        f"{comparison.largest_tensor_difference:.3g}{worst}"
    )
    print(f"logits over {comparison.tokens} tokens differ by at most {comparison.largest_logit_difference:.3g}")
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(comparison)) + "\n", encoding="utf-8")
    return 0 if comparison.largest_logit_difference <= args.tolerance else 1


def compare(first: ModelFolder, second: ModelFolder, text: str, max_tokens: int) -> Comparison:
    """Read both once for the tensors and once for the logits; no more than a layer of each is held.

    Raises:
        ValueError: when they are of different architectures, naming what differs.
    """
    import torch

    _check_same_architecture(first, second)
    digests, differences = _compare_tensors(first, second)
    token_ids = torch.tensor(first.tokenizer().encode(text)[:max_tokens])
    if not len(token_ids):
        raise ValueError("--text has no tokens, expected some text")
    where = max(differences, key=lambda name: differences[name])
    return Comparison(
        tensors=len(differences),
        different_tensors=sum(difference > 0 for difference in differences.values()),
        largest_tensor_difference=differences[where],
        where=where if differences[where] else "",
        sha256=digests,
        tokens=len(token_ids),
        largest_logit_difference=_largest_logit_difference(first, second, token_ids),
    )


def _check_same_architecture(first: ModelFolder, second: ModelFolder) -> None:
    found, expected = vars(second.arch), vars(first.arch)
    for key, value in expected.items():
        if key == "rope" and _is_same_rotation(first.arch, second.arch):
            continue
        if found[key] != value:
            raise ValueError(f"{second.folder}: {key} is {found[key]}, expected {value} as in {first.folder}")


def _is_same_rotation(one: Architecture, other: Architecture) -> bool:
    """Whether both rotate alike, however their keys spell it."""
    import torch

    from reflectron.engine.model.rope import attention_factor, inverse_frequencies

    frequencies = [inverse_frequencies(arch.rope, arch.head_dim) for arch in (one, other)]
    return torch.equal(*frequencies) and attention_factor(one.rope) == attention_factor(other.rope)


def _compare_tensors(first: ModelFolder, second: ModelFolder) -> tuple[tuple[str, str], dict[str, float]]:
    """SHA-256 of all tensors of each, and the largest difference in each tensor."""
    import hashlib

    digests = hashlib.sha256(), hashlib.sha256()
    differences = {}
    for piece in first.pieces:
        tensors = [folder.weights.read(piece.name, piece.shape, None, 0, 0) for folder in (first, second)]
        for digest, tensor in zip(digests, tensors, strict=True):
            digest.update(f"{piece.name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        differences[piece.name] = (tensors[0].float() - tensors[1].float()).abs().max().item()
    return (digests[0].hexdigest(), digests[1].hexdigest()), differences


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    data: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return data


def _largest_logit_difference(first: ModelFolder, second: ModelFolder, token_ids: torch.Tensor) -> float:
    import os

    from reflectron.engine.config import ParallelConfig
    from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER
    from reflectron.engine.parallel.process_groups import start_process_groups, stop_process_groups

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    groups = start_process_groups(ParallelConfig(), seed=0)

    # Imported after the start, which quiets megatron-core's warnings about missing CUDA extensions.
    from reflectron.tools.convert.streamed_forward import last_hidden_states

    arch = first.arch
    name = EMBEDDING if arch.tied_embeddings else OUTPUT_LAYER
    hidden = [last_hidden_states(arch, folder.weights, token_ids, groups.device) for folder in (first, second)]
    outputs = [folder.weights.read(name, (arch.vocab_size, arch.hidden_size), None, 0, 0) for folder in (first, second)]
    largest = 0.0
    for start in range(0, arch.vocab_size, _COLUMNS):
        one, other = (
            states @ output[start : start + _COLUMNS].float().to(groups.device).T
            for states, output in zip(hidden, outputs, strict=True)
        )
        largest = max(largest, (one - other).abs().max().item())
    stop_process_groups()
    return largest
