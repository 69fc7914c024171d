"""Looks at a step: whether its loss stands out, where a number that is not finite arises, what the loss of one sample
is, and where the time goes.

``SpikeDetector`` compares each step's loss with those before it. ``find_nonfinite`` runs a skipped step's microbatches
once more, one at a time and without summing over ranks, and leaves weights and optimizer as they are. ``sample_loss``
and ``gradient_norms`` are for inspection and tests.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from reflectron.engine.config import LossConfig
from reflectron.engine.data.global_batch import GlobalBatch
from reflectron.engine.data.microbatch import pack, to_device
from reflectron.engine.data.views import SampleViews, row_weights
from reflectron.engine.model.architecture import Architecture
from reflectron.engine.model.gpt import PackedGPT
from reflectron.engine.model.hf_mapping import hf_pieces
from reflectron.engine.parallel.process_groups import ParallelGroups
from reflectron.engine.training.step import forward_backward, run_model
from reflectron.engine.training.terms import TERMS, LossSums

# ---- spikes ----

_LEAST_LOSSES = 20
# The standard deviation of a normal distribution over its median absolute deviation, which spikes do not move.
_ROBUST = 1.4826
# A loss that hardly varies has only harmless outliers.
_LEAST_DEVIATION = 0.005


@dataclass(frozen=True)
class Spike:
    """The window of losses that a loss stands out from."""

    median: float
    """Median of the window."""
    deviation: float
    """Robust standard deviation of the window, at least half a percent of the median."""


class SpikeDetector:
    """Keeps a window of losses; a loss is a spike when it exceeds their median by many robust standard deviations.

    Args:
        window: losses that a new one is compared with, once there are 20.
        threshold: robust standard deviations above the median from which a loss is a spike; 0 finds none.
        losses: those so far.
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self._losses = deque(losses, maxlen=window)

    def look(self, loss: float) -> Spike | None:
        """Return the window that ``loss`` stands out from, or None; then add ``loss`` to the window."""
        found = self._compared(loss) if self.threshold and len(self._losses) >= _LEAST_LOSSES else None
        self._losses.append(loss)
        return found

    def _compared(self, loss: float) -> Spike | None:
        median = statistics.median(self._losses)
        spread = statistics.median(abs(other - median) for other in self._losses)
        deviation = max(_ROBUST * spread, _LEAST_DEVIATION * abs(median))
        return Spike(median, deviation) if loss > median + self.threshold * deviation else None


# ---- a step that is not finite ----


@dataclass(frozen=True, kw_only=True)
class NonfiniteFinding:
    """The numbers of one rank that are not finite, in one microbatch or in its weights."""

    rank: int
    weights: tuple[str, ...] = ()
    """Parts of the model whose weights are not finite."""
    loss_terms: tuple[str, ...] = ()
    """Terms of the loss (``TERMS``) that are not finite."""
    activations: tuple[str, ...] = ()
    """Parts whose output is not finite, in the order of the forward."""
    gradients: tuple[str, ...] = ()
    """Parts whose gradient is not finite."""
    samples: tuple[int, ...] = ()
    """The microbatch's samples, as positions in the global batch."""

    def __bool__(self) -> bool:
        return bool(self.weights or self.loss_terms or self.activations or self.gradients)

    def __str__(self) -> str:
        parts = [f"{kind} of {_abridged(names)}" for kind, names in self.not_finite().items() if names]
        return f"rank {self.rank}: not finite: {'; '.join(parts)}"

    def not_finite(self) -> dict[str, tuple[str, ...]]:
        """Return the names by kind, as a user reads them."""
        return {
            "weights": self.weights,
            "loss": self.loss_terms,
            "activations": self.activations,
            "gradients": self.gradients,
        }


def find_nonfinite(
    chunks: Sequence[PackedGPT],
    wrapped: Sequence[DistributedDataParallel],
    groups: ParallelGroups,
    batch: GlobalBatch,
) -> list[NonfiniteFinding]:
    """Return every rank's findings, by rank; every rank calls it and gets the same.

    The list is empty when all numbers are finite this time: the fault was a passing one of hardware or communication.

    Args:
        chunks: this rank's part of the model.
        wrapped: ``chunks`` inside data parallelism, their gradients no longer needed.
        groups: process groups.
        batch: the step's data.
    """
    rank = dist.get_rank()
    part_of = {parameter: name for name, module in _modules(chunks).items() for parameter in module.parameters()}
    # The output layer has no output of its own: the loss takes its weight.
    parameters = [
        (part_of.get(parameter, "output layer"), parameter) for chunk in chunks for parameter in chunk.parameters()
    ]
    findings = [NonfiniteFinding(rank=rank, weights=_not_finite(parameters))]
    # The interleaved schedule runs no fewer microbatches than there are stages.
    copies = groups.pp.size() if len(chunks) > 1 else 1
    for microbatch, samples in zip(batch.microbatches, batch.members, strict=True):
        with _watched_outputs(chunks) as outputs, _gradients_of_this_rank(wrapped):
            sums = forward_backward(wrapped, groups, replace(batch, microbatches=(microbatch,) * copies))
        findings.append(
            NonfiniteFinding(
                rank=rank,
                loss_terms=tuple(term for term, total in zip(TERMS, sums.sum(dim=0), strict=True) if _wrong(total)),
                activations=tuple(outputs),
                gradients=_not_finite((name, parameter.main_grad) for name, parameter in parameters),
                samples=samples,
            )
        )
    gathered: list[Sequence[NonfiniteFinding]] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, [finding for finding in findings if finding])
    return [finding for of_rank in gathered for finding in of_rank]


@contextmanager
def _gradients_of_this_rank(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Keep a backward from reducing: this rank's own gradients stay in ``main_grad``."""
    config = wrapped[0].config
    reducing = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func")
    functions = {name: getattr(config, name) for name in reducing}
    for name in reducing:
        setattr(config, name, None)
    try:
        with ExitStack() as stack:
            for chunk in wrapped:
                # Before no_sync, which it would undo.
                chunk.zero_grad_buffer()
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        for name, function in functions.items():
            setattr(config, name, function)


@contextmanager
def _watched_outputs(chunks: Sequence[PackedGPT]) -> Iterator[list[str]]:
    """Yield a list of the parts whose output is not finite, which fills while the model runs."""
    found: list[str] = []

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(module: torch.nn.Module, inputs: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # A layer that is recomputed runs twice.
            if isinstance(hidden, torch.Tensor) and _wrong(hidden) and name not in found:
                found.append(name)

        return module_of[name].register_forward_hook(look)

    module_of = _modules(chunks)
    handles = [watch(name) for name in module_of]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _modules(chunks: Sequence[PackedGPT]) -> dict[str, torch.nn.Module]:
    """Return the parts of the model that a finding tells apart; layers by their 0-based number in the whole model."""
    found: dict[str, torch.nn.Module] = {}
    for chunk in chunks:
        if hasattr(chunk, "embedding"):
            found["embedding"] = chunk.embedding
        found |= {f"layer {layer.layer_number - 1}": layer for layer in chunk.decoder.layers}
        if chunk.decoder.final_layernorm is not None:
            found["final norm"] = chunk.decoder.final_layernorm
    return found


def _not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    """Return the names of the tensors that hold NaN or infinity, each once."""
    return tuple(dict.fromkeys(name for name, tensor in named if _wrong(tensor)))


def _wrong(tensor: torch.Tensor) -> bool:
    return not torch.isfinite(tensor).all().item()


def _abridged(names: Sequence[str]) -> str:
    """Join the names, neighbouring layers as a range: ``layers 0-31, embedding``."""
    numbers = sorted(int(name.removeprefix("layer ")) for name in names if name.startswith("layer "))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    layers = [f"layer {first}" if first == last else f"layers {first}-{last}" for first, last in ranges]
    return ", ".join(layers + [name for name in names if not name.startswith("layer ")])


# ---- one sample ----


@dataclass(frozen=True)
class SampleLoss:
    """Loss of one sample in nats; ``ce`` and ``kl`` are means over their loss tokens, the others sums over theirs."""

    loss: float
    """ce + kl, with the weights of the configuration."""
    ce: float
    """Teacher's and student's cross entropy together."""
    kl: float
    """Divergence of the student from the teacher; 0 for a generation sample."""
    ce_teacher_sum: float
    ce_student_sum: float
    kl_sum: float


def sample_loss(model: PackedGPT, views: SampleViews) -> tuple[torch.Tensor, SampleLoss]:
    """Return the loss of one sample, differentiable and in numbers, exactly as training computes it.

    Args:
        model: an unsharded model on one rank whose output processor has the default term weights.
        views: the sample.
    """
    tokens = len(views.input_ids) + len(views.student_positions)
    (weights,) = row_weights([views], LossConfig())
    microbatch = to_device(pack([views], [weights], tokens), next(model.parameters()).device)
    terms = run_model(model, microbatch)
    sums = LossSums.of(terms.tolist())
    ce_tokens = views.ce_teacher_rows + views.ce_student_rows
    return terms[0], SampleLoss(
        loss=sums.loss,
        ce=sums.ce_teacher + sums.ce_generation + sums.ce_student,
        kl=sums.kl,
        ce_teacher_sum=(sums.ce_teacher + sums.ce_generation) * ce_tokens,
        ce_student_sum=sums.ce_student * ce_tokens,
        kl_sum=sums.kl * views.kl_rows,
    )


def gradient_norms(model: PackedGPT, arch: Architecture) -> dict[str, float]:
    """Return the L2 norm of each parameter's gradient by its Hugging Face name, and ``global`` over all of them.

    ``model`` is unsharded; its gradients are in ``.grad``.
    """
    norms: dict[str, float] = {}
    for parameter, pieces in hf_pieces([model], arch, tensor_parallel_size=1):
        assert parameter.grad is not None, "the backward reaches every parameter"
        norms |= {piece.name: piece.view(parameter.grad).double().norm().item() for piece in pieces}
    return {"global": math.sqrt(sum(norm**2 for norm in norms.values())), **norms}


# ---- where the time of a step goes ----

TIME_GROUPS = ("matmul", "attention", "head", "norm and elementwise", "communication", "optimizer", "copies")
# What a launching operation lies in decides first, then the kernel's own name. "Head" is all of the head with its
# products; the baseline's losses have no function of their own in the backward, where their kernels' names tell.
_INSIDE = (
    (re.compile(r"_DistillationHead|eager loss"), "head"),
    (re.compile(r"scaled_dot_product|ScaledDotProduct|flash_attn|FlashAttn|varlen_attn"), "attention"),
    (re.compile(r"^Optimizer\."), "optimizer"),
)
_NAMES = (
    (re.compile(r"nccl|c10d::|gloo:", re.I), "communication"),
    (re.compile(r"softmax|nll_loss|kl_div", re.I), "head"),
    (re.compile(r"flash|fmha|attention|sdpa", re.I), "attention"),
    (re.compile(r"gemm|cutlass|nvjet|cublas|xmma|aten::(mm|addmm|bmm|matmul|linear)\b", re.I), "matmul"),
    (re.compile(r"memcpy|memset|aten::(copy_|zero_|fill_)", re.I), "copies"),
)


def time_by_group(events: Iterable[Any], cuda: bool) -> dict[str, float]:
    """Return milliseconds by ``TIME_GROUPS`` of torch.profiler's events: of a GPU's kernels, or the CPU's operations.

    A kernel that no operation is known to have launched goes by its name; an operation counts without those inside it.
    """
    spent: dict[str, float] = defaultdict(float)
    unattributed: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CPU" and not cuda:
            spent[_group(event.name, event)] += event.self_cpu_time_total / 1e3
        elif event.device_type.name == "CPU":
            for kernel in event.kernels:
                spent[_group(kernel.name, event)] += kernel.duration / 1e3
                unattributed[kernel.name] -= kernel.duration / 1e3
        # Ranges that a user names appear on the device's track, too, and hold kernels that are counted themselves.
        elif event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            unattributed[event.name] += event.device_time_total / 1e3
    for name, milliseconds in unattributed.items():
        spent[_group(name, None)] += max(milliseconds, 0.0)
    return spent


def _group(name: str, launcher: Any) -> str:
    """Return the group of a kernel, from the operations that it was launched inside of and its name."""
    outer = launcher
    while outer is not None:
        for pattern, group in _INSIDE:
            if pattern.search(outer.name):
                return group
        outer = outer.cpu_parent
    names = (name, launcher.name) if launcher is not None else (name,)
    for pattern, group in _NAMES:
        if any(pattern.search(one) for one in names):
            return group
    return "norm and elementwise"
