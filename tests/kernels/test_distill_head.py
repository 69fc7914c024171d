"""The distillation head against plain autograd on full logits: what it promises whatever the backend."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reflectron.kernels import distill_head, reference, softmax_statistics
from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import Divergence, PairRows, Rows
from testkit.head_problem import (
    DEVICE,
    DIVERGENCES,
    HIDDEN,
    VOCAB,
    assert_close,
    autograd_head,
    convert,
    leaves,
    make_problem,
    relative_error,
    solve,
    solve_exactly,
)

# Numbers that are not finite are part of these tests, and the interpreter computes with numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]

BACKENDS = ("reference", "triton")
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", get_args(Divergence))
# The interpreter is slow: by default it is compared with the truth, and its other promises are for the whole suite.
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
# One beta runs all that Triton compiles for the JSD.
EVERY_BETA_AND_BACKEND = pytest.mark.parametrize(
    ("divergence", "jsd_beta", "backend"),
    [(*case, backend) for case in DIVERGENCES for backend in BACKENDS if backend == "reference" or case[1] == 0.5],
)


def exact_type(backend: str) -> torch.dtype:
    """The type in which a backend's results should equal the truth but for rounding."""
    return torch.float64 if backend == "reference" else torch.float32


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else torch.device("cpu")


def limit_chunks(backend: str, rows: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a chunk hold ``rows`` rows of fp32 (a pair being two of Triton's, one of the reference's)."""
    if backend == "reference":
        monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", rows * vocab)
    else:
        from reflectron.kernels import triton_passes

        monkeypatch.setattr(triton_passes, "MAX_CODE_BYTES", rows * (-(-vocab // 64) * 64) * 4)


@EVERY_BETA_AND_BACKEND
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_autograd_on_full_logits(
    divergence: str, jsd_beta: float, temperature: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_chunks(backend, 12, VOCAB, monkeypatch)
    problem = make_problem(dtype=exact_type(backend), device=device_of(backend))
    options = {"divergence": divergence, "jsd_beta": jsd_beta, "temperature": temperature}
    ours = solve(problem, backend=backend, **options)
    assert ours["loss"].dtype == exact_type(backend)
    assert_close(ours, solve_exactly(problem, **options), 1e-11 if backend == "reference" else 1e-5)


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_padded_vocabulary_takes_no_part(divergence: str, backend: str) -> None:
    weight, pairs, rows = make_problem(dtype=exact_type(backend), device=device_of(backend))
    padding = torch.full((11, HIDDEN), 50.0, dtype=weight.dtype, device=weight.device)
    padded = torch.cat([weight.detach(), padding]).requires_grad_()
    options = {"divergence": divergence, "vocab_size": VOCAB}
    ours = solve((padded, pairs, rows), backend=backend, **options)
    truth = solve_exactly((padded, pairs, rows), **options)
    assert_close(ours, truth, 1e-11 if backend == "reference" else 1e-5)
    assert not ours["grad_weight"][VOCAB:].any()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sizes", [(37,), (20, 17), (1, 12, 23, 1), (16, 16, 5, 0)])
def test_merged_shards_are_the_whole_vocabulary(sizes: tuple[int, ...], temperature: float) -> None:
    """Uneven shards, labels on the first and last column of each, and a shard that holds padding only."""
    rng = torch.Generator().manual_seed(1)
    ends = list(itertools.accumulate(sizes))
    columns = sorted({*(end - 1 for end in ends), *(end - size for end, size in zip(ends, sizes, strict=True) if size)})
    z_t, z_s = (7 * torch.randn(len(columns), VOCAB, generator=rng, dtype=torch.float64) for _ in range(2))
    label = torch.tensor(columns)
    shards = []
    for end, size in zip(ends, sizes, strict=True):
        part = [z[:, end - size : end] for z in (z_t, z_s)]
        stats = torch.zeros(5, len(label), dtype=torch.float64)
        stats[0] = stats[3] = -torch.inf
        if size:
            stats = reference.row_statistics(
                part[0], label - (end - size), (part[0] - part[1]) / temperature, temperature
            )
        shards.append(stats)
    merged = softmax_statistics.merge_statistics(torch.stack(shards), temperature)
    tolerance = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(merged.max + merged.sum_exp.log(), z_t.logsumexp(1), **tolerance)
    torch.testing.assert_close(
        merged.max / temperature + merged.sum_exp_t.log(), (z_t / temperature).logsumexp(1), **tolerance
    )
    torch.testing.assert_close(merged.label_logit, z_t[torch.arange(len(label)), label], rtol=0, atol=0)
    mean_x = ((z_t / temperature).softmax(1) * (z_t - z_s) / temperature).sum(1)
    torch.testing.assert_close(merged.sum_x / merged.sum_exp_t, mean_x, **tolerance)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_DIVERGENCE
def test_extreme_logits(divergence: str, dtype: torch.dtype, backend: str) -> None:
    """Logits of +-2e4 and constant offsets of 2e4 between teacher and student, in fp32 against fp64."""
    rng = torch.Generator().manual_seed(2)
    weight = torch.cat([torch.randn(VOCAB, HIDDEN - 1, generator=rng), torch.ones(VOCAB, 1)], 1)
    student, teacher = torch.randn(2, 6, HIDDEN, generator=rng)
    student[:, -1] = 0
    teacher[:, -1] = torch.tensor([2e4, -2e4, 0.0, 2e4, -2e4, 0.0])
    teacher[2:4, :-1] *= 2e3
    student[3:5, :-1] *= 2e3
    label, one = torch.arange(6), torch.ones(6)
    none = Rows(student[:0], label[:0], one[:0])
    problem = convert((weight, PairRows(teacher, student, label, label, one, one, one), none), dtype)
    truth = solve_exactly(problem, divergence=divergence)
    ours = solve(convert(problem, dtype, device_of(backend)), backend=backend, divergence=divergence)
    for name in ("loss", "ce_teacher", "ce_student", "kl"):
        torch.testing.assert_close(ours[name].cpu().double(), truth[name], rtol=5e-5, atol=5e-3)
    # An fp32 logit of 2e4 is itself rounded by 1e-3. A 16-bit code rounds a log ratio of 2e4 by 8, and the reverse KL
    # looks at it where the student is sure; elsewhere large ratios belong to probabilities of 0.
    narrow = backend == "triton" and dtype == torch.bfloat16 and divergence == "reverse_kl"
    for name in ("grad_weight", "grad_teacher", "grad_student"):
        assert ours[name].isfinite().all()
        assert relative_error(ours[name].cpu(), truth[name]) < (0.1 if narrow and name != "grad_teacher" else 5e-3)


@EVERY_BETA_AND_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_rows_have_exactly_zero_divergence(
    divergence: str, jsd_beta: float, dtype: torch.dtype, backend: str
) -> None:
    weight, pairs, _ = make_problem(n=33, dtype=dtype, device=device_of(backend))
    storage = torch.cat([torch.zeros_like(pairs.teacher_hidden[:1]), pairs.teacher_hidden]).detach()
    student = storage[1:].requires_grad_()  # not aligned as the teacher's rows are
    none = torch.zeros_like(pairs.kl_weight)
    pairs = replace(pairs, student_hidden=student, ce_teacher_weight=none, ce_student_weight=none)
    options = {"divergence": divergence, "jsd_beta": jsd_beta, "temperature": 1.7, "backend": backend}
    out = distillation_head(weight, pairs, **options)
    assert out.loss.item() == 0
    for gradient in torch.autograd.grad(out.loss, [weight, student]):
        assert not gradient.any()


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EVERY_DIVERGENCE
@pytest.mark.usefixtures("large_tiles")
def test_accuracy_at_small_divergence(divergence: str, dtype: torch.dtype, backend: str) -> None:
    """Self-distillation lives at small KL: gradients must be as near the fp64 truth as torch's from fp32 logits."""
    n, vocab = 64, 1000
    weight, pairs, rows = make_problem(n, 0, dtype=dtype, vocab=vocab, distance=0.01, device=device_of(backend))
    none = torch.zeros_like(pairs.kl_weight)
    problem = weight, replace(pairs, ce_teacher_weight=none, ce_student_weight=none, kl_weight=none + 1), rows
    truth = solve_exactly(problem, divergence=divergence)
    assert 1e-6 < truth["kl"] / n < 1e-3
    ours = solve(problem, divergence=divergence, backend=backend)
    theirs = solve(problem, autograd_head, divergence=divergence)
    for name in ("grad_student", "grad_weight"):
        assert relative_error(ours[name], truth[name]) <= 1.2 * relative_error(theirs[name], truth[name])
    torch.testing.assert_close(ours["kl"].double(), truth["kl"], rtol=2e-3, atol=0)


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_zero_weights_skip_rows_exactly(divergence: str, backend: str) -> None:
    """Whatever a row without weight holds, every result equals to the bit that of zeros in its place."""
    weight, pairs, rows = make_problem(dtype=torch.float32, device=device_of(backend))
    assert pairs.ce_student_weight[2] == pairs.kl_weight[2] == rows.ce_weight[0] == 0
    no_teacher = torch.ones_like(pairs.kl_weight)
    no_teacher[4] = 0
    pairs = replace(pairs, ce_teacher_weight=no_teacher, kl_weight=pairs.kl_weight * no_teacher)
    results = []
    for value in (0.0, torch.inf, torch.nan):
        problem = convert((weight, pairs, rows), torch.float32)
        with torch.no_grad():
            for hidden, row in zip(leaves(*problem)[1:], (4, 2, 0), strict=True):
                hidden[row] = value
        results.append(solve(problem, divergence=divergence, backend=backend).values())
    for zeros, infinite, nan in zip(*results, strict=True):
        assert zeros.isfinite().all()
        assert torch.equal(zeros, infinite)
        assert torch.equal(zeros, nan)


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_a_teacher_that_only_teaches_costs_no_backward(divergence: str, backend: str) -> None:
    weight, pairs, rows = make_problem(dtype=torch.float32, device=device_of(backend))
    results, products = [], []
    for ce_teacher_weight in (torch.zeros_like(pairs.kl_weight), None):
        problem = (weight, replace(pairs, ce_teacher_weight=ce_teacher_weight), rows)
        with FlopCounterMode(display=False) as counter:
            results.append(solve(problem, divergence=divergence, backend=backend))
        products.append(counter.get_total_flops())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-6)
    assert not results[1]["grad_teacher"].any()
    # The teacher's dH; torch does not count products that are added in place, such as its part of dW.
    assert products[0] - products[1] == 2 * len(pairs.kl_weight) * VOCAB * HIDDEN


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_DIVERGENCE
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_rows_poison_themselves_only(value: float, divergence: str, dtype: torch.dtype, backend: str) -> None:
    weight, pairs, rows = make_problem(dtype=dtype, device=device_of(backend))
    one = torch.ones_like(pairs.kl_weight)
    pairs = replace(pairs, kl_weight=one, ce_teacher_weight=one, ce_student_weight=one)
    rows = replace(rows, ce_weight=torch.ones_like(rows.ce_weight))
    clean = solve((weight, pairs, rows), divergence=divergence, backend=backend)
    problem = convert((weight, pairs, rows), dtype)
    with torch.no_grad():
        problem[1].student_hidden[3, 1] = problem[2].hidden[2, 0] = value
    ours = solve(problem, divergence=divergence, backend=backend)
    assert ours["loss"].isnan()
    assert ours["grad_weight"].isnan().any()
    # The teacher of a bad student is detached from it, but the rounding of its code is not.
    tolerance = {"rtol": 0, "atol": 0} if backend == "reference" else {"rtol": 4e-3, "atol": 4e-3}
    torch.testing.assert_close(ours["grad_teacher"], clean["grad_teacher"], **tolerance)
    for name, row in (("grad_student", 3), ("grad_rows", 2)):
        others = torch.arange(len(clean[name]), device=weight.device) != row
        assert ours[name][row].isnan().all()
        assert torch.equal(ours[name][others], clean[name][others])


@EVERY_BACKEND
def test_no_rows_and_no_labels(backend: str) -> None:
    weight, pairs, rows = make_problem(dtype=exact_type(backend), device=device_of(backend))
    empty_pairs = PairRows(*(field[:0] for field in vars(pairs).values()))
    empty_rows = Rows(*(field[:0] for field in vars(rows).values()))
    for first, second in ((None, rows), (empty_pairs, rows), (pairs, None), (pairs, empty_rows)):
        ours = distillation_head(weight, first, second, backend=backend)
        truth = autograd_head(weight, first or empty_pairs, second or empty_rows)
        torch.testing.assert_close(ours.loss, truth.loss)
        ours_weight, true_weight = (torch.autograd.grad(out.loss, weight)[0] for out in (ours, truth))
        torch.testing.assert_close(ours_weight, true_weight)

    ignored = replace(rows, labels=torch.full_like(rows.labels, -100))
    for args in ((None, None), (empty_pairs, empty_rows), (None, ignored)):
        out = distillation_head(weight, *args, backend=backend)
        assert out.loss.item() == 0
        assert not torch.autograd.grad(out.loss, weight)[0].any()


@EVERY_BACKEND
@EVERY_DIVERGENCE
def test_result_does_not_depend_on_the_chunk(divergence: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(dtype=torch.float32, device=device_of(backend))
    results = []
    for chunk_rows in (5, 1000):
        limit_chunks(backend, chunk_rows, VOCAB, monkeypatch)
        results.append(solve(problem, divergence=divergence, temperature=2.0, backend=backend))
    for other in results[1:]:
        assert_close(other, results[0], 2e-6)


@EVERY_BACKEND
def test_bitwise_deterministic(backend: str) -> None:
    problem = make_problem(40, 20, dtype=torch.bfloat16, device=device_of(backend))
    first, second = (solve(problem, divergence="jsd", backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype, backend: str) -> None:
    """Gradients come back in the type of their tensor, within its rounding of the fp64 truth; the loss is fp32."""
    problem = make_problem(dtype=dtype, device=device_of(backend))
    ours, truth = solve(problem, backend=backend), solve_exactly(problem)
    assert ours["loss"].dtype == torch.float32
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=1e-5, atol=0)
    for name in ("grad_weight", "grad_teacher", "grad_student", "grad_rows"):
        assert ours[name].dtype == dtype
        assert relative_error(ours[name], truth[name]) < torch.finfo(dtype).eps


@EVERY_BACKEND
def test_weight_gradient_is_summed_in_fp32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen chunks summed in bf16 would lose 5e-3; rounding once loses at most half a unit of bf16."""
    problem = make_problem(64, 64, dtype=torch.bfloat16, device=device_of(backend))
    whole = solve(problem, backend=backend)["grad_weight"]
    limit_chunks(backend, 8, VOCAB, monkeypatch)
    assert relative_error(solve(problem, backend=backend)["grad_weight"], whole.double()) < 1e-3


@EVERY_BACKEND
def test_main_grad_over_two_microbatches(backend: str) -> None:
    """The gradient is added to what main_grad holds, in the backward only, and the parameter's hook fires."""
    device = device_of(backend)
    weight, *first = make_problem(dtype=torch.float32, device=device)
    second = make_problem(dtype=torch.float32, seed=5, device=device)[1:]
    expected = [solve((weight, *batch), backend=backend)["grad_weight"] for batch in (first, second)]
    start = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).to(device)
    main_grad, seen = start.clone(), []

    def megatron_hook(*_) -> None:
        assert weight.grad is not None
        seen.append(True)
        main_grad.add_(weight.grad)
        weight.grad = None

    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(megatron_hook)
    for batch in (first, second):
        loss = distillation_head(weight, *batch, main_grad=main_grad, backend=backend).loss
        before = main_grad.clone()
        loss.backward()
        assert not torch.equal(before, main_grad)
    assert seen == [True, True]
    torch.testing.assert_close(main_grad, start + expected[0] + expected[1])

    main_grad.zero_()
    tied = (weight * weight).sum()  # another use of the same parameter, as a tied embedding is
    (distillation_head(weight, *first, main_grad=main_grad, backend=backend).loss + tied).backward()
    torch.testing.assert_close(main_grad, expected[0] + 2 * weight.detach())


@EVERY_BACKEND
def test_main_grad_waits_for_the_backward(backend: str) -> None:
    problem = make_problem(dtype=torch.bfloat16, device=device_of(backend))
    weight = problem[0]
    main_grad = torch.zeros(weight.shape, device=weight.device)
    loss = distillation_head(*problem, main_grad=main_grad, backend=backend).loss
    assert not main_grad.any()
    (1024 * loss).backward(retain_graph=True)
    once = main_grad.clone()
    loss.backward()
    torch.testing.assert_close(main_grad, once * (1 + 1 / 1024))
    assert weight.grad is not None
    assert not weight.grad.any()
    exact = 1024 * solve(convert(problem, torch.float32), backend=backend)["grad_weight"]
    # The reference multiplies an fp32 dz on the CPU, the kernels write it in bf16; main_grad is rounded by neither.
    assert relative_error(once, exact.double()) < (1e-6 if backend == "reference" else 3e-3)
    assert not torch.equal(once, once.bfloat16().float())


@EVERY_BACKEND
@EVERY_DIVERGENCE
@pytest.mark.parametrize("chunk_rows", [12, 1000])
def test_upstream_scale_and_second_backward(
    chunk_rows: int, divergence: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_chunks(backend, chunk_rows, VOCAB, monkeypatch)
    problem = make_problem(dtype=exact_type(backend), device=device_of(backend))
    inputs = leaves(*problem)
    loss = distillation_head(*problem, divergence=divergence, backend=backend).loss
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(loss * 0.37 / 8, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for first, small, second in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(small, first * 0.37 / 8)
        assert torch.equal(first, second)


@EVERY_BACKEND
def test_frozen_tensors_and_forward_only(backend: str) -> None:
    weight, pairs, rows = problem = make_problem(dtype=exact_type(backend), device=device_of(backend))
    full = list(solve(problem, backend=backend).values())[-4:]
    frozen, main_grad = weight.detach(), torch.zeros_like(weight)
    out = distillation_head(frozen, pairs, rows, main_grad=main_grad, backend=backend)
    for value, expected in zip(torch.autograd.grad(out.loss, leaves(*problem)[1:]), full[1:], strict=True):
        assert torch.equal(value, expected)
    assert not main_grad.any()

    constant = replace(
        pairs, teacher_hidden=pairs.teacher_hidden.detach(), student_hidden=pairs.student_hidden.detach()
    )
    out = distillation_head(weight, constant, replace(rows, hidden=rows.hidden.detach()), backend=backend)
    assert torch.equal(torch.autograd.grad(out.loss, weight)[0], full[0])
    assert not any(term.requires_grad for name, term in vars(out).items() if name != "loss")
    with torch.no_grad():
        forward_only = distillation_head(weight, pairs, rows, backend=backend).loss
    assert not forward_only.requires_grad
    assert torch.equal(forward_only, out.loss)


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that torch operations made and Python still reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, tuple[int, int]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        count = self.holders.get(key, (0, 0))[0]
        self.holders[key] = (count + 1, size)
        weakref.finalize(tensor, self._release, key)
        self.peak = max(self.peak, sum(size for _, size in self.holders.values()))
        self.largest = max(self.largest, size)

    def _release(self, key: int) -> None:
        count, size = self.holders.pop(key)
        if count > 1:
            self.holders[key] = (count - 1, size)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_scratch_does_not_grow_with_rows(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of eight rows: the peak may grow by statistics and hidden gradients, never by logits."""
    vocab, chunk = 512, 8 * 512
    monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", chunk)
    peaks = []
    for n in (32, 128):
        weight, pairs, rows = make_problem(n, n, dtype=torch.float32, vocab=vocab)
        with LiveBytes() as live:
            distillation_head(weight, pairs, rows, divergence=divergence).loss.backward()
        assert live.largest <= 4 * max(chunk, weight.numel())
        peaks.append(live.peak)
    per_row = (peaks[1] - peaks[0]) / (3 * 96)
    assert peaks[0] > 4 * 4 * chunk  # the meter does see the logits
    assert per_row <= 4 * (HIDDEN + 32)  # against 4 * 512 bytes of logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "tv"}, "divergence is 'tv', expected one of forward_kl, reverse_kl, jsd"),
        ({"backend": "cuda"}, "backend is 'cuda', expected one of auto, reference, triton"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number above 0"),
        ({"jsd_beta": 1.5}, "jsd_beta is 1.5, expected 0 to 1"),
        ({"vocab_size": 38}, "vocab_size is 38, expected 1 to 37"),
        ({"vocab_size": 0}, "vocab_size is 0, expected 1 to 37"),
        ({"tp_group": "tp"}, "tp_group is 'tp', expected a torch.distributed process group"),
        ({"main_grad": torch.zeros(37, 11)}, r"main_grad is \[37, 11\] torch.float32 on cpu, expected \[37, 12\]"),
        ({"weight": torch.zeros(37)}, r"weight has shape \[37\], expected \[V_local, d\]"),
        ({"weight": torch.zeros(37, 12, dtype=torch.int8)}, "weight has dtype torch.int8, expected one of"),
        ({"hidden": torch.zeros(5, 11)}, r"rows.hidden is \[5, 11\] torch.float32 on cpu, expected \[5, 12\]"),
        ({"hidden": torch.zeros(5, 12).bfloat16()}, r"rows.hidden is \[5, 12\] torch.bfloat16 on cpu, expected"),
        ({"hidden": torch.zeros(5, 12, device="meta")}, "rows.hidden is .* on meta, expected .* on cpu"),
        ({"labels": torch.zeros(5)}, "rows.labels is .* torch.float32 on cpu, expected .* torch.int64"),
        ({"labels": torch.tensor([0, -100, 36, 37, 99])}, r"rows.labels\[3\] is 37, expected 0 to 36, or -100"),
        ({"labels": torch.tensor([0, -1, 1, 1, 1])}, r"rows.labels\[1\] is -1, expected 0 to 36, or -100"),
        ({"ce_weight": torch.zeros(4)}, r"rows.ce_weight is \[4\] .*, expected \[5\]"),
        ({"ce_weight": torch.zeros(5).double()}, r"rows.ce_weight is \[5\] torch.float64 .*, expected \[5\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    weight, _, rows = make_problem(dtype=torch.float32)
    fields = {key: change.pop(key) for key in ("hidden", "labels", "ce_weight") if key in change}
    arguments = {"weight": weight, "rows": replace(rows, **fields), **change}
    with pytest.raises(ValueError, match=f"^{message}"):
        distillation_head(**arguments)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_no_value_is_read_back_from_the_device(divergence: str) -> None:
    """Meta tensors have no values, so any wait for a device would fail here."""
    weight, pairs, rows = make_problem(dtype=torch.bfloat16)
    weight = weight.detach().to("meta").requires_grad_()
    pairs = PairRows(*(field.detach().to("meta") for field in vars(pairs).values()))
    rows = Rows(*(field.detach().to("meta") for field in vars(rows).values()))
    main_grad = torch.zeros(weight.shape, device="meta")
    out = distillation_head(weight, pairs, rows, divergence=divergence, vocab_size=VOCAB - 1, main_grad=main_grad)
    out.loss.backward()
    assert weight.grad is not None


@EVERY_BACKEND
def test_lost_label_is_nan_where_labels_are_not_read_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator: nobody owns the label, so the loss and the row's gradient are NaN, others are not."""
    monkeypatch.setattr(distill_head, "_check_labels", lambda *_: None)
    weight, _, rows = make_problem(dtype=torch.float32, device=device_of(backend))
    labels = torch.tensor([0, 1, VOCAB, 3, -7], device=weight.device)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], device=weight.device)
    loss = distillation_head(weight, rows=Rows(rows.hidden, labels, weights), backend=backend).loss
    gradient = torch.autograd.grad(loss, rows.hidden)[0]
    assert loss.isnan()
    assert gradient[2].isnan().all()
    assert gradient[[0, 1, 3, 4]].isfinite().all()
