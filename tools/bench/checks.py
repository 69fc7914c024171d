"""Compares with a truth what a GPU computes: the head's kernels, the backends of a model's parts, and training steps.

``python -m reflectron.tools.bench.checks NAME FOLDER DEVICE`` is a correctness stage of ``reflectron bench gpu``: a row
for each number that was compared, and exit code 1 when one is worse than it may be, or none could be compared. The
truth is the plain definition in float64, for training steps the same command on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import assert_never

from reflectron.engine.config import (
    AdamwBackend,
    BackendsConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    WeightGradientBackend,
)
from reflectron.engine.model.backends.attention_kernels import attention_kernel
from reflectron.engine.model.backends.checks import (
    LAYER_PROBLEMS,
    BackendProblem,
    LayerSizes,
    Outcome,
    ProblemMaker,
    attention_errors,
    attention_problem,
    random_tensor,
    relative_error,
)
from reflectron.engine.model.backends.choose import CANDIDATES, PLAIN, Use, attention_shape
from reflectron.tools.bench.harness import (
    BenchRows,
    Row,
    new_rows_file,
    read_rows,
    run_process,
    small_llama,
    write_tiny_run,
)
from reflectron.tools.provenance import provenance

Check = Literal["kernels", "parity", "step"]
DISTRIBUTIONS = ("reflectron", "torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "liger-kernel")


def run_check(name: Check, folder: Path, device_type: str) -> int:
    """Compare, keep every row, print what is wrong, and return the exit code."""
    rows = BenchRows(name, provenance(DISTRIBUTIONS, cuda=device_type == "cuda"), new_rows_file(folder))
    for row in check_rows(name, torch.device(device_type)):
        rows.add("error", "relative", [row.pop("error")] if "error" in row else (), **({"reason": None} | row))
    compared = [row for row in rows.rows if "passed" in row]
    wrong = [row for row in compared if not row["passed"]]
    for row in wrong:
        place = ", ".join(row[key] for key in ("case", "backend", "dtype", "tensor"))
        print(f"{place}: error {row['p50']:.3g}" if row["p50"] is not None else f"{place}: error {row['reason']}")
    print(f"{name}: {len(compared)} numbers compared, {len(wrong)} wrong")
    return int(bool(wrong) or not compared)


def check_rows(name: Check, device: torch.device) -> Iterator[Row]:
    """Yield what a check finds: ``error`` and ``passed`` of a number, or ``reason`` why there is none."""
    if name == "kernels":
        yield from kernel_rows(device)
    elif name == "parity":
        for dtype in ("bfloat16", "float32"):
            yield from parity_rows(device, dtype)
    elif name == "step":
        with tempfile.TemporaryDirectory() as scratch:
            yield from step_rows(device.type == "cuda", Path(scratch))
    else:
        assert_never(name)


# ---- the distillation head: pairs and unpaired rows, ignored labels, weights of zero, sizes that divide no tile ----

# Beside ``MOST_OF_PLAIN``, in units of the type's rounding: on the CPU the plain head rounds the logits' gradient less
# than kernels do before its products.
_TINY_OF_HEAD = {"cuda": 0.1, "cpu": 0.25}
# Of the loss and its terms, relative: the codes of a pair's logits have 16 bits.
_MOST_OF_LOSS = 1e-4
# d, V, pairs, unpaired rows; without CUDA the kernels run in Triton's interpreter
SIZES = {
    "cuda": ((1024, 32016, 513, 130), (200, 4099, 129, 1), (4096, 8004, 1024, 2048)),
    "cpu": ((72, 132, 9, 5),),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "forward KL": {"divergence": "forward_kl"},
    "forward KL, T 2": {"divergence": "forward_kl", "temperature": 2.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD 0.3": {"divergence": "jsd", "jsd_beta": 0.3},
}
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class HeadProblem:
    """Random numbers, the same at every call; logits have standard deviation 3, a student is near its teacher."""

    leaves: tuple[Tensor, ...]
    """Matrix [V, d], hidden rows of teacher and student [pairs, d], and unpaired ones [rows, d]."""
    labels: tuple[Tensor, ...]
    """Of teacher, student and unpaired rows."""
    weights: tuple[Tensor, ...]
    """Of the cross entropies of teacher and student, of the divergence, and of unpaired rows."""

    def solve(self, backend: Any, options: dict[str, Any]) -> Outcome:
        """Return loss, terms and gradients; that of the matrix is added to an accumulator that is not empty."""
        from reflectron.kernels.distill_head import distillation_head
        from reflectron.kernels.types import PairRows, Rows

        weight, teacher, student, hidden = self.leaves
        pairs = PairRows(teacher, student, *self.labels[:2], *self.weights[:3])
        rows = Rows(hidden, self.labels[2], self.weights[3])
        main_grad = torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False)
        out = distillation_head(weight, pairs, rows, backend=backend, main_grad=main_grad, **options)
        _, *gradients = torch.autograd.grad(out.loss, self.leaves)
        terms = {name: getattr(out, name).detach() for name in ("loss", "ce_teacher", "ce_student", "ce_rows", "kl")}
        names = ("grad teacher", "grad student", "grad rows")
        return terms | dict(zip(names, gradients, strict=True)) | {"grad matrix": main_grad.detach() - 1}

    def in_float64(self) -> HeadProblem:
        """Return the same numbers as new leaves."""
        return replace(self, leaves=tuple(leaf.detach().double().requires_grad_() for leaf in self.leaves))


def head_problem(d: int, vocab: int, pairs: int, rows: int, *, dtype: torch.dtype, device: torch.device) -> HeadProblem:
    """Return a problem of ``pairs`` and ``rows`` on a matrix of ``vocab`` columns."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def labels(count: int) -> Tensor:
        values = torch.randint(vocab, (count,), generator=random)
        values[::4] = -100
        return values.to(device)

    def weights(count: int, skip: int) -> Tensor:
        values = torch.rand(count, generator=random)
        values[skip::5] = 0
        return values.to(device)

    teacher, matrix = 3 * normal(pairs, d), normal(vocab, d) * d**-0.5
    student, unpaired = teacher + 0.2 * normal(pairs, d), 3 * normal(rows, d)
    return HeadProblem(
        tuple(x.to(device, dtype).requires_grad_() for x in (matrix, teacher, student, unpaired)),
        (labels(pairs), labels(pairs), labels(rows)),
        (weights(pairs, 1), weights(pairs, 2), weights(pairs, 3), weights(rows, 0)),
    )


def kernel_rows(device: torch.device) -> Iterator[Row]:
    """Yield a row for each result of each problem, the kernels beside the reference backend."""
    for d, vocab, pairs, rows in SIZES[device.type]:
        for dtype in DTYPES:
            problem = head_problem(d, vocab, pairs, rows, dtype=dtype, device=device)
            for name, options in OPTIONS.items():
                yield from _compared_head(f"d {d}, V {vocab}, {pairs} pairs, {rows} rows, {name}", problem, options)


def _compared_head(case: str, problem: HeadProblem, options: dict[str, Any]) -> Iterator[Row]:
    dtype = problem.leaves[0].dtype
    ours, again = (problem.solve("triton", options) for _ in range(2))
    plain, truth = problem.solve("reference", options), problem.in_float64().solve("reference", options)
    row = {"part": "distillation head", "case": case, "backend": "triton", "dtype": str(dtype).removeprefix("torch.")}
    for name, exact in truth.items():
        error, plain_error = relative_error(ours[name], exact), relative_error(plain[name], exact)
        limit = MOST_OF_PLAIN * plain_error + _TINY_OF_HEAD[exact.device.type] * torch.finfo(dtype).eps + 1e-6
        if exact.dim() == 0:
            limit = _MOST_OF_LOSS
        yield row | {"tensor": name, "error": error, "plain_error": plain_error, "passed": error <= limit}
    same = all(torch.equal(ours[name], again[name]) for name in truth)
    yield row | {"tensor": "same bits when repeated", "error": 0.0, "plain_error": 0.0, "passed": same}


# ---- the backends of a model's parts, beside the plain one in the same type ----

# A backend's error is at most so many times that of the plain one, and beside it, in units of the type's rounding, what
# two kernels that round in another order differ by.
MOST_OF_PLAIN, TINY = 1.2, 0.1
# Of the plain one, likewise: sums of products are float32 in either type, and only float32's rounding shows them.
_MOST_OF_PLAIN_ITSELF = {"bfloat16": 1.5, "float32": 10.0}
# Segments of one token, below, at and beyond the tiles of kernels; more keys than queries where a rank has a chunk.
_LENGTHS = (1, 127, 300, 1, 64, 129, 2)
_KEYS_OF_CHUNKS = (1, 254, 430, 77, 64, 300, 3)
_PADDING = 144
_SIZES = LayerSizes(hidden=96, ffn=96, heads=6, groups=2, head_dim=32)

Errors = Callable[[Any], dict[str, float]]
"""Name of a backend -> its error in each result and gradient."""


@dataclass(frozen=True)
class ParityCase:
    """A problem that the backends of one part of the configuration solve."""

    part: str
    errors: Callable[[Use], Errors]
    heads: tuple[int, int, int] = (8, 8, 128)
    """Query heads, key-value heads and their width, of the model that the backend is considered for."""
    chunks: bool = False
    """Whether context parallelism leaves a rank chunks of segments."""

    def use(self, backend: str, dtype: str, device: torch.device) -> Use:
        """Return the run that the backend is considered for."""
        heads, groups, head_dim = self.heads
        arch = small_llama(heads * head_dim, 8, heads, groups, layers=1, vocab=8)
        asked: dict[str, Any] = {self.part: backend}
        config = Config(
            model=ModelConfig(dtype="float32" if dtype == "float32" else "bfloat16"),
            parallel=ParallelConfig(context_parallel_size=2 if self.chunks else 1),
            backends=BackendsConfig(**asked),
        )
        return Use(config, arch if self.part == "attention" else None, device)


def parity_rows(
    device: torch.device, dtype: str, cases: Iterable[str] | None = None, backends: Iterable[str] | None = None
) -> Iterator[Row]:
    """Compare backends, all where none are named, on some of ``PARITY_CASES``, all where none are named.

    Yields:
        Of each pair a row for every result and gradient; a single one with ``reason`` where the backend cannot be used.
    """
    for name in PARITY_CASES if cases is None else cases:
        case = PARITY_CASES[name]
        for backend in CANDIDATES[case.part]:
            if backends is None or backend in backends:
                yield from _parity_rows(case, case.use(backend, dtype, device), name, backend)


def _parity_rows(case: ParityCase, use: Use, name: str, backend: str) -> Iterator[Row]:
    dtype, plain_backend = use.config.model.dtype, PLAIN.names[case.part]
    row = {"part": case.part, "case": name, "backend": backend, "dtype": dtype}
    if reason := CANDIDATES[case.part][backend](use):
        yield row | {"reason": reason}
        return
    errors_of = case.errors(use)
    errors, plain = errors_of(backend), errors_of(plain_backend)
    rounding = torch.finfo(getattr(torch, dtype)).eps
    for tensor, error in errors.items():
        limit = MOST_OF_PLAIN * plain[tensor] + TINY * rounding
        if backend == plain_backend:
            limit = _MOST_OF_PLAIN_ITSELF[dtype] * rounding
        yield row | {"tensor": tensor, "error": error, "plain_error": plain[tensor], "passed": error <= limit}


def _attention_errors(use: Use) -> Errors:
    dtype, shape = getattr(torch, use.config.model.dtype), attention_shape(use)
    keys = _LENGTHS if shape.whole_segments else _KEYS_OF_CHUNKS
    problem = attention_problem(shape, _LENGTHS, keys, _PADDING, dtype, use.device)
    return lambda backend: attention_errors(attention_kernel(backend, shape), problem, dtype)


def _problem_errors(make_problem: ProblemMaker) -> Callable[[Use], Errors]:
    return lambda use: make_problem(_SIZES, getattr(torch, use.config.model.dtype), use.device).errors


def _weight_gradient(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Add one more product [T, F]^T [T, H] to a float32 sum [F, H]."""
    from reflectron.engine.model.backends.weight_gradient import gradient_extension

    total = random_tensor(0, 2 * sizes.ffn, sizes.hidden, dtype=torch.float32, device=device)
    inputs = random_tensor(1, 64, sizes.hidden, dtype=dtype, device=device)
    gradient = random_tensor(2, 64, 2 * sizes.ffn, dtype=dtype, device=device)

    def solve(backend: WeightGradientBackend) -> Outcome:
        main_grad, extension = total.clone(), gradient_extension(backend)
        if extension is None:
            main_grad.add_(gradient.t().matmul(inputs))
        else:
            extension.wgrad_gemm_accum_fp32(inputs, gradient, main_grad)
        return {"sum": main_grad}

    return BackendProblem({"sum": total.double() + gradient.double().t() @ inputs.double()}, solve)


def _update(sizes: LayerSizes, dtype: torch.dtype, device: torch.device) -> BackendProblem:
    """Update parameters [H, H + 1] three times, which are float32 whatever the model's type is."""
    from reflectron.tools.bench.models import lone_adamw

    shape = (sizes.hidden, sizes.hidden + 1)

    def updated(backend: AdamwBackend, kind: torch.dtype) -> Outcome:
        parameter = torch.nn.Parameter(random_tensor(0, *shape, dtype=kind, device=device))
        optimizer = lone_adamw(backend, parameter, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(3):
            parameter.grad = random_tensor(step + 1, *shape, dtype=kind, device=device)
            optimizer.step()
        state = optimizer.state[parameter]
        return {"parameter": parameter.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    return BackendProblem(updated("torch", torch.float64), lambda backend: updated(backend, torch.float32))


PARITY_CASES = {
    "heads of 128": ParityCase("attention", _attention_errors),
    "heads of 64, grouped": ParityCase("attention", _attention_errors, heads=(8, 2, 64)),
    "heads of 128, grouped, chunks": ParityCase("attention", _attention_errors, heads=(8, 2, 128), chunks=True),
    **{name: ParityCase("layers", _problem_errors(maker)) for name, maker in LAYER_PROBLEMS.items()},
    "weight gradient": ParityCase("weight_gradient", _problem_errors(_weight_gradient)),
    "update": ParityCase("adamw", _problem_errors(_update)),
}


# ---- training steps: `reflectron train` on the GPU beside the same command on the CPU ----

STEPS = 5
# Relative. In float32 sums are added up in another order; bfloat16 rounds every activation to 8 bits. A gradient norm
# follows the weights of the steps before it.
TOLERANCES = {"float32": {"loss": 1e-4, "grad_norm": 1e-3}, "bfloat16": {"loss": 2e-2, "grad_norm": 5e-2}}
# Heads of 64: what attention kernels for GPUs can do.
_STEP_SIZES = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}


def step_rows(cuda: bool, scratch: Path) -> Iterator[Row]:
    """Yield a row for each number of each step; without ``cuda`` both runs are on the CPU, to test the comparison.

    Raises:
        RuntimeError: when a run fails; its last line.
    """
    truth = _train(scratch / "cpu", "float32", cuda=False)
    for dtype, tolerances in TOLERANCES.items():
        found = _train(scratch / dtype, dtype, cuda=cuda)
        for step, (mine, theirs) in enumerate(zip(found, truth, strict=True), 1):
            row = {
                "part": "training step",
                "case": f"step {step}",
                "backend": "cuda" if cuda else "cpu",
                "dtype": dtype,
            }
            for key, limit in tolerances.items():
                error = abs(mine[key] / theirs[key] - 1)
                yield row | {"tensor": key, "error": error, "limit": limit, "passed": error <= limit}


def _train(folder: Path, dtype: str, cuda: bool) -> list[Row]:
    """Return the rows of ``metrics.jsonl`` of a run of ``STEPS`` steps with one rank."""
    folder.mkdir(parents=True)
    path, model = write_tiny_run(folder), folder / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text(encoding="utf-8")) | _STEP_SIZES), encoding="utf-8")
    words = ["-m", "reflectron.tools.cli", "train", str(path), f"model.dtype={dtype}", f"train.steps={STEPS}"]
    words += ["parallel.data_parallel_size=1", "checkpoint.save_every=0", "optimizer.learning_rate=1e-3"]
    env = os.environ | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    done = run_process(words, folder / "train.log", env=env)
    if done.code:
        raise RuntimeError(f"reflectron train with {dtype} ended with {done.code}: {done.last_line}")
    return read_rows(folder / "run" / "metrics.jsonl")


if __name__ == "__main__":
    if sys.argv[3] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
    sys.exit(run_check(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))  # type: ignore[arg-type]
