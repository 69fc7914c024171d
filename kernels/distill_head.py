"""The distillation head: output matrix, teacher, student and unpaired hidden rows -> one weighted, differentiable loss.

The loss is the weighted sum of three cross entropies and a divergence; rows carry their labels and fp32 weights, and
each rank holds a shard of the output matrix. The full logits never exist, and rows of weight zero have no influence
whatever they hold.

Legend: N pairs, M unpaired rows, d hidden width, d_t the teacher's, V_local columns of the vocabulary on this rank.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import assert_never

from reflectron.kernels.autograd import HeadPasses, apply_head
from reflectron.kernels.reference import ReferencePasses
from reflectron.kernels.types import (
    IGNORE_INDEX,
    Divergence,
    HeadBackend,
    HeadLoss,
    HeadOptions,
    PairRows,
    Rows,
    field_kinds,
)

_ROW_FIELDS = {rows: field_kinds(rows) for rows in (PairRows, Rows)}


def distillation_head(
    weight: Tensor,
    pairs: PairRows | None = None,
    rows: Rows | None = None,
    *,
    teacher_weight: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: HeadBackend = "auto",
    main_grad: Tensor | None = None,
) -> HeadLoss:
    """Return the weighted sum of CE(teacher), CE(student), CE(unpaired) and the divergence from the detached teacher.

    Args:
        weight: [V_local, d] in float64, float32, bfloat16 or float16. With ``tp_group``, rank r holds the columns
            [r V_local, (r + 1) V_local) of the vocabulary; V_local is the same on all ranks.
        pairs, rows: the supervised rows, the same on all ranks of the group. Either may be absent or empty.
            Their weights are constants: no gradient flows into them.
        teacher_weight: [V_local, d_t] output matrix of a teacher with weights of its own, sharded as ``weight`` is and
            of its dtype; ``pairs.teacher_hidden`` is then [N, d_t]. The teacher's cross entropy gives it a gradient, in
            its own dtype, if it requires one. None: teacher and student share ``weight``.
        divergence: ``forward_kl`` KL(p_t || p_s), ``reverse_kl`` KL(p_s || p_t), or ``jsd``, with m = beta p_t +
            (1 - beta) p_s: beta KL(p_t || m) + (1 - beta) KL(p_s || m). p is softmax(logits / temperature).
        jsd_beta: weight of the teacher in ``jsd``, 0 to 1; 0 is ``forward_kl`` and 1 is ``reverse_kl``, the limits of
            jsd / (beta (1 - beta)), as in generalised knowledge distillation (arXiv 2306.13649) and TRL.
        temperature: T of the divergence, which is multiplied by T^2 (Hinton et al., arXiv 1503.02531): its gradient
            then keeps its size when T changes, and kl_weight need not be tuned again. For the unscaled divergence
            (TRL) divide kl_weight by T^2. The cross entropies have no temperature.
        vocab_size: true size of the vocabulary, all columns when None; later columns are padding, take no part and
            receive zero gradient.
        tp_group: the ranks among which the vocabulary is split; None for a whole ``weight``. Collective: every rank
            of the group makes the same call.
        backend: ``reference`` is plain torch; ``triton`` the fused kernels, which keep up to 1 GiB from the forward to
            the backward, 4 bytes a pair of logits in bfloat16, 8 in other types; ``auto`` takes the reference as long
            as the kernels have been proven in Triton's interpreter and by compilation only, not on a GPU.
        main_grad: [V_local, d] float32 (float64 for a float64 ``weight``) buffer that the backward adds the gradient of
            ``weight`` to. ``weight.grad`` then receives zeros: the hooks of the parameter fire, and whoever adds the
            gradient to ``main_grad`` once more changes nothing. With megatron-core's DDP pass ``weight.main_grad``;
            tied embeddings need no more, since the embedding's gradient arrives with those zeros. For an untied
            matrix ``weight.grad_added_to_main_grad = True`` before the backward saves that empty addition.

    Returns:
        The loss and its terms. The gradient of a hidden row is this rank's PARTIAL sum over its own columns; the
        reduction over ``tp_group`` belongs to the operation that hands over the rows, as behind any column-parallel
        layer: ``gather_from_sequence_parallel_region`` (reduce-scatters in its backward) with sequence parallelism,
        ``copy_to_tensor_model_parallel_region`` (all-reduces) without. The gradients of ``weight`` and
        ``teacher_weight`` are summed over the chunks in float32 and complete.

        A row with NaN or infinite values makes the loss, the gradient of ``weight`` and its own hidden gradient NaN,
        and leaves the gradients of other pairs and rows alone. Rows of weight zero are skipped exactly. Results
        are the same to the bit from run to run, and under ``torch.autocast``, which is switched off inside. Compiled
        code around the call (``torch.compile``) computes the same within rounding.

    Raises:
        ValueError: on shapes, types, devices or options that do not fit, on a ``triton`` that cannot run, and on labels
            outside the vocabulary.
            On an accelerator labels are not read back, which would wait for the device at each call: there a label
            outside the vocabulary makes the loss and the row's gradient NaN, provided that the row's weight is not 0.
        RuntimeError: under a transform of ``torch.func``, and when a gradient is differentiated again.
        NotImplementedError: in forward mode.
    """
    _check_options(divergence, jsd_beta, temperature, backend)
    _check_matrices(weight, teacher_weight, main_grad)
    if teacher_weight is weight:
        teacher_weight = None
    pairs, rows = pairs or _no_pairs(weight, teacher_weight), rows or _no_rows(weight)
    tp_rank, tp_size = _position(tp_group)
    all_columns = len(weight) * tp_size
    vocab_size = all_columns if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= all_columns:
        raise ValueError(f"vocab_size is {vocab_size}, expected 1 to {all_columns}, the columns of weight on all ranks")
    _check_rows(pairs, "pairs", weight, teacher_weight, vocab_size)
    _check_rows(rows, "rows", weight, teacher_weight, vocab_size)

    if divergence == "jsd" and jsd_beta in (0, 1):
        divergence = "forward_kl" if jsd_beta == 0 else "reverse_kl"
    first_column = tp_rank * len(weight)
    options = HeadOptions(
        divergence=divergence,
        jsd_beta=jsd_beta,
        temperature=temperature,
        first_column=first_column,
        columns=min(max(vocab_size - first_column, 0), len(weight)),
        teacher_learns=pairs.ce_teacher_weight is not None,
        tp_group=tp_group,
        main_grad=main_grad,
    )
    return apply_head(_passes(backend, weight), weight, teacher_weight, pairs, rows, options)


def _passes(backend: HeadBackend, weight: Tensor) -> type[HeadPasses]:
    """Return the passes over the logits. Triton is imported where it is used: machines without a GPU may lack it."""
    if backend == "auto" or backend == "reference":
        return ReferencePasses
    if backend == "triton":
        if (obstacle := _obstacle_to_triton(weight)) is not None:
            raise ValueError(f"backend is 'triton', but {obstacle}; use 'reference' or 'auto'")
        from reflectron.kernels.triton_passes import TritonPasses

        return TritonPasses
    assert_never(backend)


def _obstacle_to_triton(weight: Tensor) -> str | None:
    """Return why the kernels cannot run on this matrix, or None."""
    if not _triton_is_installed():
        return "triton is not installed"
    if weight.dtype == torch.float64:
        return "weight has dtype torch.float64, expected torch.float32, torch.bfloat16 or torch.float16"
    if torch.__version__ < "2.8":
        return f"torch is {torch.__version__}, expected 2.8 or later, which sums bfloat16 products in float32"
    if weight.is_cuda:
        return _obstacle_of_gpu(weight.device)
    if weight.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"weight is on {weight.device}, expected a CUDA device, or the CPU with TRITON_INTERPRET=1 set"


def _obstacle_of_gpu(device: torch.device) -> str | None:
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if device.index != torch.cuda.current_device():  # where Triton launches
        return f"weight is on {device}, expected the current device cuda:{torch.cuda.current_device()}"
    found = torch.cuda.get_device_capability(device)
    return None if found >= (8, 0) else f"the GPU has compute capability {found}, expected (8, 0) or later"


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _no_rows(weight: Tensor) -> Rows:
    empty = torch.empty(0, device=weight.device)
    return Rows(weight.new_empty(0, weight.shape[-1]), empty.long(), empty)


def _no_pairs(weight: Tensor, teacher_weight: Tensor | None) -> PairRows:
    none = _no_rows(weight)
    teacher = none if teacher_weight is None else _no_rows(teacher_weight)
    return PairRows(
        teacher.hidden, none.hidden, none.labels, none.labels, none.ce_weight, none.ce_weight, none.ce_weight
    )


def _position(tp_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the rank in the group and the size of the group."""
    if tp_group is None:
        return 0, 1
    if not isinstance(tp_group, dist.ProcessGroup):
        raise ValueError(f"tp_group is {tp_group!r}, expected a torch.distributed process group of this rank, or None")
    return dist.get_rank(tp_group), dist.get_world_size(tp_group)


def _check_options(divergence: str, jsd_beta: float, temperature: float, backend: str) -> None:
    for name, value, choices in (
        ("divergence", divergence, get_args(Divergence)),
        ("backend", backend, get_args(HeadBackend)),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    if not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta is {jsd_beta}, expected 0 to 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")


def _check_matrices(weight: Tensor, teacher_weight: Tensor | None, main_grad: Tensor | None) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V_local, d] with at least one column")
    if weight.dtype not in dtypes:
        raise ValueError(f"weight has dtype {weight.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if main_grad is not None:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        _check_tensor("main_grad", main_grad, list(weight.shape), dtype, weight.device)
    if teacher_weight is not None:
        if teacher_weight.dim() != 2 or 0 in teacher_weight.shape:
            raise ValueError(f"teacher_weight has shape {list(teacher_weight.shape)}, expected [{len(weight)}, d_t]")
        shape = [len(weight), teacher_weight.shape[1]]
        _check_tensor("teacher_weight", teacher_weight, shape, weight.dtype, weight.device)


def _check_rows(
    group: PairRows | Rows, name: str, weight: Tensor, teacher_weight: Tensor | None, vocab_size: int
) -> None:
    """Check every field by the kind that its annotation states."""
    kinds = _ROW_FIELDS[type(group)]
    n = getattr(group, next(iter(kinds))).shape[:1].numel()
    for field, kind in kinds.items():
        key, tensor = f"{name}.{field}", getattr(group, field)
        if tensor is None:
            continue
        if kind == "teacher_hidden":
            width = (weight if teacher_weight is None else teacher_weight).shape[1]
            _check_tensor(key, tensor, [n, width], weight.dtype, weight.device)
        elif kind == "hidden":
            _check_tensor(key, tensor, [n, weight.shape[1]], weight.dtype, weight.device)
        elif kind == "label":
            _check_tensor(key, tensor, [n], torch.int64, weight.device)
            _check_labels(key, tensor, vocab_size)
        elif kind == "weight":
            _check_tensor(key, tensor, [n], torch.float32, weight.device)
        else:
            assert_never(kind)


def _check_tensor(key: str, tensor: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
    found = (list(tensor.shape), tensor.dtype, tensor.device)
    if found != (shape, dtype, device):
        raise ValueError(
            f"{key} is {found[0]} {found[1]} on {found[2]}, expected {shape} {dtype} on {device} to fit weight"
        )


def _check_labels(key: str, labels: Tensor, vocab_size: int) -> None:
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != IGNORE_INDEX)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{key}[{row}] is {int(labels[row])}, expected 0 to {vocab_size - 1}, or {IGNORE_INDEX}")
