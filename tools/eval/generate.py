"""Generates a model's answers to a benchmark's problems, as a JSONL file.

A row is one sample of one task, with the prompt, the raw answer and the program made of it. Beside the file stands what
determines it (``.settings.json``): the same command continues a file, another one refuses it. A sample depends on the
settings, its task and its number only, so a continued file is the file that would have been written at once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import assert_never

from reflectron.engine.files import end_of_rows
from reflectron.engine.job_lock import take_lock
from reflectron.engine.terminal import console
from reflectron.tools.benchmarks.benchmark import (
    Benchmark,
    BenchmarkProblem,
    Style,
    make_ask,
    render,
    stop_strings,
)
from reflectron.tools.benchmarks.catalogue import ProblemFile, load_problems, read_json_lines
from reflectron.tools.eval.backends import (
    Decoding,
    EndpointBackend,
    GeneratedAnswer,
    GenerationBackend,
    Prompt,
    Unanswered,
)
from reflectron.tools.llm.arguments import json_object
from reflectron.tools.llm.request import shown_url

BackendName = Literal["transformers", "vllm", "endpoint"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A request for answers; the names of the fields are those of the command line's options."""

    dataset: str
    data: str | None = None
    model: str
    """Checkpoint folder, or the name that the endpoint knows."""
    prompt: Style = "reflection"
    backend: BackendName = "transformers"
    endpoint: str | None = None
    endpoint_body: str = "{}"
    samples: int = 1
    """A problem."""
    limit: int | None = None
    """Only the first problems."""
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8
    dtype: str = "auto"
    bos: bool = False

    def check(self) -> None:
        """Find contradictions.

        Raises:
            ValueError: naming the options.
        """
        if self.samples < 1 or self.batch_size < 1:
            raise ValueError(f"--samples is {self.samples} and --batch-size {self.batch_size}, expected at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"--samples is {self.samples} with --temperature 0: greedy samples are all the same")
        at_endpoint = self.backend == "endpoint"
        if at_endpoint != bool(self.endpoint):
            raise ValueError("--backend endpoint and --endpoint URL belong together")
        if at_endpoint and self.bos:
            raise ValueError("--bos cannot be asked of an endpoint: its own tokenizer decides")

    def decoding(self, benchmark: Benchmark) -> Decoding:
        """Return how text is drawn from the model."""
        return Decoding(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=stop_strings(self.prompt, benchmark),
        )


@dataclass(frozen=True)
class _Wanted:
    problem: BenchmarkProblem
    number: int
    prompt: Prompt


def generate(asked: Generation, file: ProblemFile, out: Path) -> int:
    """Write what is missing in ``out``; return how many rows it then has.

    Raises:
        ValueError: when options contradict each other, or ``out`` holds samples of other settings.
        Unanswered: when a server fails; what it answered is written.
    """
    asked.check()
    out.parent.mkdir(parents=True, exist_ok=True)
    with take_lock(out.with_name(f"{out.name}.lock"), "--out"):
        return _generate_alone(asked, file, out)


def report_unanswered(failure: Unanswered, out: str | Path) -> int:
    """Say on stderr that ``out`` is not complete; return the exit code."""
    print(f"stopped: {failure}. Answers so far are in {out}; the same command resumes.", file=sys.stderr)
    return 1


def _generate_alone(asked: Generation, file: ProblemFile, out: Path) -> int:
    benchmark = file.benchmark
    problems = load_problems(benchmark, file.path)[: asked.limit]
    done = _written(out, generation_settings(asked, file))
    numbers = range(asked.samples)
    missing = [(one, number) for one in problems for number in numbers if (one.task_id, number) not in done]
    if missing:
        backend = _backend(asked)
        texts = {p.task_id: _prompt_text(asked.prompt, benchmark, p, backend) for p, _ in missing}
        wanted = [
            _Wanted(p, number, Prompt(texts[p.task_id], _seed(asked.seed, p.task_id, number))) for p, number in missing
        ]
        with out.open("a", encoding="utf-8", buffering=1) as rows:
            for sample, answer in _answers(backend, wanted, asked.decoding(benchmark), asked.batch_size):
                rows.write(json.dumps(_row(asked.prompt, benchmark, sample, answer)) + "\n")
    return len(done) + len(missing)


def _backend(asked: Generation) -> GenerationBackend:
    if asked.backend == "endpoint":
        assert asked.endpoint is not None, "both are given or none"
        body = json_object("--endpoint-body", asked.endpoint_body)
        return EndpointBackend(asked.endpoint, asked.model, chat=asked.prompt == "chat", body=body)
    elif asked.backend == "vllm":
        from reflectron.tools.eval.local_backends import VllmBackend

        return VllmBackend(asked.model, dtype=asked.dtype, bos=asked.bos)
    elif asked.backend == "transformers":
        from reflectron.tools.eval.local_backends import TransformersBackend

        return TransformersBackend(asked.model, dtype=asked.dtype, bos=asked.bos)
    else:
        assert_never(asked.backend)


def _prompt_text(style: Style, benchmark: Benchmark, problem: BenchmarkProblem, backend: GenerationBackend) -> str:
    ask = make_ask(style, benchmark, problem)
    rendered_there = style == "chat" and backend.tokenizer is None
    return ask.instruction if rendered_there else render(style, ask, backend.tokenizer)


def _answers(
    backend: GenerationBackend, samples: Sequence[_Wanted], decoding: Decoding, batch_size: int
) -> Iterator[tuple[_Wanted, GeneratedAnswer]]:
    from rich.progress import track

    # Prompts of like length share a batch: less padding.
    ordered = sorted(samples, key=lambda sample: len(sample.prompt.text))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    page, hidden = console(stderr=True), not sys.stderr.isatty()
    for batch in track(batches, description="generating", console=page, disable=hidden, transient=True):
        try:
            answers = backend.complete([sample.prompt for sample in batch], decoding)
        except Unanswered as failure:
            yield from ((sample, answer) for sample, answer in zip(batch, failure.answers, strict=True) if answer)
            raise
        yield from zip(batch, answers, strict=True)


def _row(style: Style, benchmark: Benchmark, sample: _Wanted, answer: GeneratedAnswer) -> dict[str, Any]:
    return {
        "task_id": sample.problem.task_id,
        "sample": sample.number,
        "solution": benchmark.solution(style, sample.problem, answer.text),
        "raw": answer.text,
        "prompt": sample.prompt.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
    }


def _seed(seed: int, task_id: str, number: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, task_id, number]).encode()).digest()
    # Servers take 32 bits, signed.
    return int.from_bytes(digest[:4], "big") >> 1


def generation_settings(asked: Generation, file: ProblemFile) -> dict[str, Any]:
    """Return all that determines a sample, but its task and number."""
    decoding = asked.decoding(file.benchmark)
    return {
        "model": asked.model,
        "weights": weight_files(Path(asked.model)),
        "dataset": file.benchmark.name,
        "data (SHA-256)": hashlib.sha256(file.path.read_bytes()).hexdigest(),
        "prompt": asked.prompt,
        "backend": asked.backend,
        "endpoint": [shown_url(asked.endpoint), json_object("--endpoint-body", asked.endpoint_body)]
        if asked.endpoint
        else None,
        "dtype": asked.dtype,
        "bos": asked.bos,
        "max-new-tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        # Greedy answers depend on neither.
        "top-p": decoding.top_p if decoding.temperature else None,
        "seed": asked.seed if decoding.temperature else None,
    }


def weight_files(folder: Path) -> list[list[Any]]:
    """Return name, size in bytes and time of change of a checkpoint's weight files: a later export is another model."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _written(out: Path, settings: dict[str, Any]) -> set[tuple[str, int]]:
    """Return (task, number) of the samples in ``out``, which must be of these settings."""
    beside = out.with_suffix(".settings.json")
    _drop_unfinished_row(out)
    done = {(row["task_id"], row["sample"]) for _, row in read_json_lines(out)} if out.exists() else set()
    if done:
        found = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        for key, value in settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{out} holds samples with {key} {found.get(key)!r}, expected {value!r}: delete it or choose "
                    "another --out"
                )
    else:
        beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return done


def _drop_unfinished_row(path: Path) -> None:
    """Cut off what a stopped writer left behind the last whole line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(end_of_rows(file.fileno()))
