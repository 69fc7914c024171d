"""The engine's own parts, as ``reflectron bench calibrate`` runs them: each function here returns one to be timed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reflectron.engine.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, ParallelConfig
from reflectron.engine.data.tokenization import TokenizedSample
from reflectron.engine.data.views import SampleViews, make_views
from reflectron.engine.model.hf_config import parse_architecture

if TYPE_CHECKING:
    from reflectron.kernels.distill_head import Backend
    from reflectron.tools.bench.calibration_ranks import Clock

_WIDTH = 1024
Action = Callable[[], object]


def made_up_views(lengths: Sequence[int], vocab_size: int) -> list[SampleViews]:
    """Instruction and reflection samples in turn; a student sees the second half of its sample."""
    random = np.random.default_rng(0)
    return [_views(int(length), bool(i % 2), vocab_size, random) for i, length in enumerate(lengths)]


def _views(length: int, reflection: bool, vocab_size: int, random: np.random.Generator) -> SampleViews:
    final = length - length // 6
    sample = TokenizedSample(
        kind="reflection" if reflection else "generation",
        input_ids=random.integers(0, vocab_size, length, dtype=np.int32),
        supervised=np.arange(length) >= length // 8,
        blocks=np.empty((0, 3), np.int32),
        prefix_end=final if reflection else 0,
        final_start=final if reflection else -1,
    )
    return make_views(sample, np.arange(length) >= length // 2 if reflection else None)


def core_attention(
    backend: str, device: torch.device, dtype: torch.dtype, length: int, segments: int, heads: int, width: int
) -> Action:
    """Forward and backward of a pack of equal segments, laid out by token afterwards."""
    from reflectron.engine.data.microbatch import segments_of, to_device
    from reflectron.engine.model.backends.attention_kernels import AttentionShape, attention_kernel

    shape = AttentionShape(
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=width,
        softmax_scale=width**-0.5,
        whole_segments=True,
    )
    attend, tokens = attention_kernel(backend, shape), length * segments
    packed = to_device(segments_of([length] * segments, [length] * segments, tokens), device)
    q, k, v, gradient = (
        torch.randn(tokens, heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(4)
    )
    joined = gradient.detach().reshape(tokens, -1)
    return lambda: torch.autograd.grad(attend(q, k, v, packed).reshape(tokens, -1), (q, k, v), joined)


def parts_of_layers(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[int], Action]]:
    """By name, forward and backward over a number of elements of what ``backends.layers`` computes beside products.

    Args:
        backend: ``torch`` or ``liger``.
        device: what computes.
        dtype: of the elements.
    """
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=_WIDTH, num_attention_heads=8, params_dtype=dtype)
    norm_class, rotation_at, gate = _liger_parts() if backend == "liger" else _torch_parts(dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def backward_too(forward: Callable[[], Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> Action:
        gradients = [torch.randn_like(output) for output in forward()]
        return lambda: torch.autograd.grad(forward(), inputs, gradients)

    def norm(count: int) -> Action:
        module, x = norm_class(config, _WIDTH).to(device), random(count // _WIDTH, 1, _WIDTH)
        return backward_too(lambda: [x + module(x)], [x, module.weight])

    def rotation(count: int) -> Action:
        tokens, width = count // _WIDTH, 128
        # Three query heads share a key head.
        query, key = (random(tokens, 1, heads, width) for heads in (6, 2))
        # All layers of a microbatch share what is made of its positions.
        rotate = rotation_at(torch.arange(tokens, device=device), torch.rand(width // 2, device=device))
        return backward_too(lambda: rotate(query, key), [query, key])

    def gated(count: int) -> Action:
        x = random(count // _WIDTH, 1, 2 * _WIDTH)
        return backward_too(lambda: [gate(x)], [x])

    return {"norm": norm, "rotation": rotation, "gated": gated}


def _torch_parts(dtype: torch.dtype) -> tuple[Callable[..., Any], ...]:
    from reflectron.engine.model.norm import RMSNorm
    from reflectron.engine.model.rope import rotary_tables, rotate

    def rotation_at(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> Callable[..., list[torch.Tensor]]:
        tables = rotary_tables(position_ids, inv_freq, dtype)
        return lambda query, key: [rotate(x.squeeze(1), *tables) for x in (query, key)]

    def gate(x: torch.Tensor) -> torch.Tensor:
        """As megatron-core's MLP, which adds an offset of 0 (0.16.1)."""
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.nn.functional.silu(first) * (second + 0.0)

    return RMSNorm, rotation_at, gate


def _liger_parts() -> tuple[Callable[..., Any], ...]:
    from reflectron.engine.model.backends import liger
    from reflectron.engine.model.rope import cosines_and_sines

    def rotation_at(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        tables = cosines_and_sines(position_ids, inv_freq)
        return lambda query, key: liger.rotate(query, key, tables)

    return liger.LigerRMSNorm, rotation_at, liger.swiglu


def summed_or_copied(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[int], Action]]:
    """By name: a tensor of a number of elements cloned, or added to a float32 sum."""

    def random(count: int) -> torch.Tensor:
        return torch.randn(count, device=device, dtype=dtype)

    def copy(count: int) -> Action:
        return random(count).clone

    def summed(count: int) -> Action:
        gradient, total = random(count), torch.zeros(count, device=device)
        return lambda: total.add_(gradient)

    return {"copy": copy, "sum": summed}


def update(adamw: str, device: torch.device, dtype: torch.dtype, count: int) -> Action:
    """What a step does to float32 gradients and parameters after the backward, and to the gradients before it."""
    from reflectron.engine.optim.optimizer import adamw_class

    parameter = torch.nn.Parameter(torch.randn(count, device=device))
    parameter.grad = torch.randn(count, device=device)
    model = torch.empty(count, device=device, dtype=dtype)
    options: dict[str, Any] = {"fused": True} if adamw == "torch_fused" else {}
    optimizer = adamw_class(adamw)([parameter], lr=1e-5, **options)

    def run() -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(1 / max(1.0, float(parameter.grad.norm())))
        optimizer.step()
        if dtype != torch.float32:
            model.copy_(parameter.data)
        parameter.grad.zero_()

    return run


def head(backend: Backend, device: torch.device, dtype: torch.dtype, rows: int, hidden: int, columns: int) -> Action:
    """Forward and backward of the head on ``rows`` of width ``hidden``, a third of them of pairs, and ``columns``."""
    from reflectron.kernels.distill_head import PairRows, Rows, distillation_head

    pairs = rows // 6
    alone = rows - 2 * pairs

    def labels(count: int) -> torch.Tensor:
        return torch.randint(0, columns, (count,), device=device)

    def states(count: int) -> torch.Tensor:
        return torch.randn(count, hidden, device=device, dtype=dtype, requires_grad=True)

    weight, teacher, student, single = states(columns), states(pairs), states(pairs), states(alone)
    # Logits of a model: the exponentials of larger ones underflow, which is slow on the CPU.
    weight.data.mul_(hidden**-0.5)
    total, ones = torch.zeros(columns, hidden, device=device), torch.ones(rows, device=device)
    one, paired = ones[:alone], ones[:pairs]

    def run() -> None:
        result = distillation_head(
            weight,
            PairRows(teacher, student, labels(pairs), labels(pairs), paired, paired, paired),
            Rows(single, labels(alone), one),
            backend=backend,
            main_grad=total,
        )
        torch.autograd.grad(result.loss, (weight, teacher, student, single))

    return run


def host_seconds(clock: Clock) -> dict[str, float]:
    """Of steps whose tensors are next to nothing: by step and microbatch, for each layer and beside them."""
    layers, microbatches = (1, 5), (1, 5)
    times = {size: _tiny_step(clock, *size) for size in itertools.product(layers, microbatches)}
    a, b, c, d = (times[layer, micro] for layer in layers for micro in microbatches)
    # time = step + step_layer L + microbatch M + microbatch_layer L M
    both = (d - b - c + a) / ((layers[1] - layers[0]) * (microbatches[1] - microbatches[0]))
    micro = (b - a) / (microbatches[1] - microbatches[0]) - both * layers[0]
    layer = (c - a) / (layers[1] - layers[0]) - both * microbatches[0]
    step = a - layer * layers[0] - micro * microbatches[0] - both * layers[0] * microbatches[0]
    named = {"step": step, "step_layer": layer, "microbatch": micro, "microbatch_layer": both}
    return {name: max(seconds, 0.0) for name, seconds in named.items()}


def _tiny_step(clock: Clock, layers: int, microbatches: int) -> float:
    """Seconds of a step without parallelism, on every rank alike."""
    from megatron.core import parallel_state

    from reflectron.engine.data.global_batch import assemble
    from reflectron.engine.model.backends.choose import PLAIN
    from reflectron.engine.model.gpt import build_chunks, transformer_config
    from reflectron.engine.model.parallelize import parallelize
    from reflectron.engine.optim.optimizer import build_optimizer
    from reflectron.engine.parallel.process_groups import model_parallel_groups
    from reflectron.engine.training.flops import decoder_shape, training_cost
    from reflectron.engine.training.loss import PackLoss
    from reflectron.engine.training.step import train_step

    arch = dataclasses.replace(TINY, num_layers=layers)
    config = Config(
        model=ModelConfig(dtype="float32" if clock.device.type == "cpu" else "bfloat16"),
        loss=LossConfig(backend="reference"),
        data=DataConfig(max_length=64),
        batch=BatchConfig(tokens_per_microbatch=64),
        parallel=ParallelConfig(device=clock.device.type),  # type: ignore[arg-type]
    )
    groups = model_parallel_groups(config.parallel, clock.device, seed=1)
    dtype = getattr(torch, config.model.dtype)
    loss = PackLoss(config.loss, arch.vocab_size, groups.tp, groups.cp, False)
    chunks = build_chunks(arch, transformer_config(arch, config.parallel, dtype, PLAIN), arch.vocab_size, loss, PLAIN)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    wrapped = parallelize(chunks, config.parallel, shard_optimizer=False)
    optimizer = build_optimizer(config.optimizer, wrapped, chunks, arch, groups, shard=False)
    # One instruction and one reflection sample a microbatch.
    views = made_up_views([24] * 2 * microbatches, arch.vocab_size)
    cost = training_cost(decoder_shape(arch, config), "none")
    ranks = groups.dp.size()
    batch = assemble(list(views) * ranks, config, cost, 0.5, groups.dp.rank(), ranks)
    assert len(batch.microbatches) == microbatches
    seconds = clock.seconds(lambda: train_step(wrapped, optimizer, groups, batch, 1e-5), least=0.2)
    parallel_state.destroy_model_parallel()
    return seconds


TINY = parse_architecture(
    {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "vocab_size": 128,
    }
)
