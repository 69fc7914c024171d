"""Compares two checkpoints of either format, tensor by tensor and by their logits on a text.

Hidden states come from the engine's own layers, so that what is compared is what is trained; they are loaded one after
the other, so that a model of any size runs where one layer fits. T tokens, H hidden.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from reflectron.engine.config import ParallelConfig
from reflectron.engine.data.microbatch import segments_of, to_device
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.attention import PackedRows
from reflectron.engine.model.backends.choose import PLAIN
from reflectron.engine.model.gpt import PackedGPT, build_chunks, transformer_config
from reflectron.engine.model.hf_mapping import EMBEDDING, OUTPUT_LAYER, hf_pieces
from reflectron.engine.model.rope import attention_factor, inverse_frequencies
from reflectron.engine.parallel.process_groups import stop_process_groups
from reflectron.engine.weights.readers import TensorSource
from reflectron.tools.convert.model_folder import ModelFolder
from reflectron.tools.ranks import start_only_rank

SAMPLE_TEXT = '''def is_prime(n: int) -> bool:
    """Whether n has no divisor but 1 and itself."""
    if n < 2:
        return False
    for divisor in range(2, int(n**0.5) + 1):
        if n % divisor == 0:
            return False
    return True


assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]
'''
# Columns of the vocabulary whose logits are held at a time.
_COLUMNS = 4096


@dataclass(frozen=True)
class CheckpointComparison:
    """Records the differences between two checkpoints of one architecture."""

    tensors: int
    """Number of tensors of each."""
    different_tensors: int
    """Number of tensors whose values differ as float32."""
    largest_tensor_difference: float
    """Largest absolute difference over all elements."""
    where: str
    """Name of the tensor with that difference; empty when none differs."""
    sha256: tuple[str, str]
    """Digest of each over all its tensors in the order of the forward: name, type, shape and bytes."""
    tokens: int
    """Number of tokens of the text."""
    largest_logit_difference: float
    """Largest absolute difference over all tokens and the whole vocabulary, computed in float32."""


def compare(first: ModelFolder, second: ModelFolder, text: str, max_tokens: int) -> CheckpointComparison:
    """Compare two checkpoints, each read once for the tensors and once for the logits; at most a layer of each is held.

    Raises:
        ValueError: when they are of different architectures, naming what differs.
    """
    _check_same_architecture(first, second)
    digests, differences = _compare_tensors(first, second)
    token_ids = torch.tensor(first.tokenizer().encode(text)[:max_tokens])
    if not len(token_ids):
        raise ValueError("--text has no tokens, expected some text")
    where = max(differences, key=lambda name: differences[name])
    return CheckpointComparison(
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
    """Tell whether both rotate alike, however their keys spell it."""
    frequencies = [inverse_frequencies(arch.rope, arch.head_dim) for arch in (one, other)]
    return torch.equal(*frequencies) and attention_factor(one.rope) == attention_factor(other.rope)


def _compare_tensors(first: ModelFolder, second: ModelFolder) -> tuple[tuple[str, str], dict[str, float]]:
    """Return the SHA-256 of all tensors of each, and the largest difference in each tensor."""
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
    data: memoryview = tensor.contiguous().view(torch.uint8).numpy().data
    return data


def _largest_logit_difference(first: ModelFolder, second: ModelFolder, token_ids: torch.Tensor) -> float:
    groups = start_only_rank(ParallelConfig(), seed=0)

    # Imported after the start, which quiets megatron-core's warnings about missing CUDA extensions.

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


@torch.no_grad()
def last_hidden_states(
    arch: Architecture, weights: TensorSource, token_ids: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Return what the output layer would be given, in float32.

    Args:
        arch: of the model.
        weights: its tensors.
        token_ids: [T] int64, one sequence.
        device: where the layer runs; process groups of one rank have been started there.

    Returns:
        [T, H] float32.
    """
    # One layer, and none of the vocabulary: the model is only the place where each layer runs.
    one_layer = replace(arch, num_layers=1)
    config = transformer_config(one_layer, ParallelConfig(), torch.float32, PLAIN)
    (model,) = build_chunks(one_layer, config, 1, lambda hidden, *_: hidden, PLAIN)
    positions = torch.arange(len(token_ids), device=device)
    length = [len(token_ids)]
    segments = to_device(segments_of(length, length, len(token_ids)), device)
    rows = model.with_rotation(PackedRows(segments=segments, position_ids=positions))
    embedding = weights.read(EMBEDDING, (arch.vocab_size, arch.hidden_size), None, 0, 0)
    hidden = embedding[token_ids].float().to(device)[:, None]
    for layer in range(arch.num_layers):
        _load(model, one_layer, weights, layer)
        hidden, _ = model.decoder.layers[0](hidden, attention_mask=None, packed_seq_params=rows)
    return model.decoder.final_layernorm(hidden)[:, 0]


def _load(model: PackedGPT, one_layer: Architecture, weights: TensorSource, layer: int) -> None:
    """Load one layer of ``weights`` into the model's only layer, and their final norm into the model's."""
    # The table names a layer's tensors by its number.
    model.decoder.layers[0].layer_number = layer + 1
    for parameter, pieces in hf_pieces([model], one_layer, 1):
        for piece in pieces:
            if piece.name.startswith(("model.layers.", "model.norm.")):
                view = piece.view(parameter)
                view.copy_(weights.read(piece.name, piece.shape, None, 0, 0).reshape(view.shape))
