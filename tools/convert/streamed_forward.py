"""Hidden states of a model whose layers are loaded one after the other: any size runs where one layer fits.

The layer is the engine's own, so that what is compared is what is trained. T tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from reflectron.engine.config import ParallelConfig
from reflectron.engine.data.microbatch import segments_of, to_device
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.attention import PackedRows
from reflectron.engine.model.backends.choose import PLAIN
from reflectron.engine.model.gpt import PackedGPT, build_chunks, transformer_config
from reflectron.engine.model.hf_mapping import EMBEDDING, hf_pieces
from reflectron.engine.weights.readers import TensorSource


@torch.no_grad()
def last_hidden_states(
    arch: Architecture, weights: TensorSource, token_ids: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """What the output layer would be given, in float32.

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
    """Fill the model's only layer with that one of ``weights``, and the final norm with theirs."""
    # The table names a layer's tensors by its number.
    model.decoder.layers[0].layer_number = layer + 1
    for parameter, pieces in hf_pieces([model], one_layer, 1):
        for piece in pieces:
            if piece.name.startswith(("model.layers.", "model.norm.")):
                view = piece.view(parameter)
                view.copy_(weights.read(piece.name, piece.shape, None, 0, 0).reshape(view.shape))
