"""``reflectron eval generate``: from a model and a benchmark's problems to a JSONL file of answers.

A row is one sample of one task, with the prompt, the raw answer and the program made of it. Beside the file stands what
determines it (``.settings.json``): the same command continues a file, another one refuses it. A sample depends on the
settings, its task and its number only, so a continued file is the file that would have been written at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectron.engine.job_lock import take_lock
from reflectron.engine.terminal import console
from reflectron.tools.eval.decoding import Answer, Backend, Decoding, Prompt, Unanswered
from reflectron.tools.eval.problems import (
    Dataset,
    Problem,
    ProblemFile,
    add_problem_arguments,
    find_problems,
    load_problems,
)
from reflectron.tools.eval.prompts import STYLES, Style, make_ask, render, solution, stop_strings
from reflectron.tools.eval.rows import drop_unfinished_row, read_json_lines
from reflectron.tools.llm.arguments import json_object
from reflectron.tools.llm.secrets import shown_url


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL file of answers; continued if it exists")
    add_generation_arguments(parser)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``eval generate`` and ``eval run`` have in common."""
    parser.add_argument("--model", required=True, help="checkpoint folder, or the name that the endpoint knows")
    add_answer_arguments(parser)
    parser.add_argument("--prompt", choices=STYLES, default="reflection", help="style (default: reflection)")
    parser.add_argument("--backend", choices=("transformers", "vllm", "endpoint"), default="transformers")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--endpoint-body", metavar="JSON", default="{}", help="more fields of a request's body")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="answers a problem (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``eval ablate`` has in common with them."""
    add_problem_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once; endpoint: requests")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--bos", action="store_true", help="put BOS before prompts; the student never saw it")


def run(args: argparse.Namespace) -> int:
    """Generate what is missing in the file; 1 when a server does not answer."""
    try:
        rows = generate(args, find_problems(args.dataset, args.data), Path(args.out))
    except Unanswered as failure:
        return stopped(failure, args.out)
    print(f"{rows} samples in {args.out}")
    return 0


def stopped(failure: Unanswered, out: str | Path) -> int:
    """Say that ``out`` is not complete; the exit code."""
    print(f"stopped: {failure}. Answers so far are in {out}; the same command goes on.", file=sys.stderr)
    return 1


@dataclass(frozen=True)
class _Sample:
    problem: Problem
    number: int
    prompt: Prompt


def generate(args: argparse.Namespace, file: ProblemFile, out: Path) -> int:
    """Write what is missing in ``out``; returns its rows.

    Raises:
        ValueError: when arguments contradict each other, or ``out`` holds samples of other settings.
        Unanswered: when a server fails; what it answered is written.
    """
    _check(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    with take_lock(out.with_name(f"{out.name}.lock"), "--out"):
        return _generate_alone(args, file, out)


def _generate_alone(args: argparse.Namespace, file: ProblemFile, out: Path) -> int:
    problems = load_problems(file.dataset, file.path)[: args.limit]
    decoding = _decoding(args, file)
    done = _written(out, generation_settings(args, file))
    missing = [
        (problem, number)
        for problem in problems
        for number in range(args.samples)
        if (problem.task_id, number) not in done
    ]
    if missing:
        backend = _backend(args)
        texts = {p.task_id: _prompt_text(args.prompt, file.dataset, p, backend) for p, _ in missing}
        samples = [
            _Sample(p, number, Prompt(texts[p.task_id], _seed(args.seed, p.task_id, number))) for p, number in missing
        ]
        with out.open("a", encoding="utf-8", buffering=1) as rows:
            for sample, answer in _answers(backend, samples, decoding, args.batch_size):
                rows.write(json.dumps(_row(args.prompt, file.dataset, sample, answer)) + "\n")
    return len(done) + len(missing)


def _check(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.batch_size < 1:
        raise ValueError(f"--samples is {args.samples} and --batch-size {args.batch_size}, expected at least 1")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples is {args.samples} with --temperature 0: greedy samples are all the same")
    if (args.backend == "endpoint") != bool(args.endpoint):
        raise ValueError("--backend endpoint and --endpoint URL belong together")
    if args.backend == "endpoint" and args.bos:
        raise ValueError("--bos cannot be asked of an endpoint: its own tokenizer decides")


def _decoding(args: argparse.Namespace, file: ProblemFile) -> Decoding:
    return Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        stop=stop_strings(args.prompt, file.dataset),
    )


def _backend(args: argparse.Namespace) -> Backend:
    if args.backend == "endpoint":
        from reflectron.tools.eval.with_endpoint import EndpointBackend

        body = json_object("--endpoint-body", args.endpoint_body)
        return EndpointBackend(args.endpoint, args.model, chat=args.prompt == "chat", body=body)
    if args.backend == "vllm":
        from reflectron.tools.eval.with_vllm import VllmBackend

        return VllmBackend(args.model, dtype=args.dtype, bos=args.bos)
    from reflectron.tools.eval.with_transformers import TransformersBackend

    return TransformersBackend(args.model, dtype=args.dtype, bos=args.bos)


def _prompt_text(style: Style, dataset: Dataset, problem: Problem, backend: Backend) -> str:
    ask = make_ask(style, dataset, problem)
    tokenizer = getattr(backend, "tokenizer", None)
    # A server renders the chat itself.
    return ask.instruction if style == "chat" and tokenizer is None else render(style, ask, tokenizer)


def _answers(
    backend: Backend, samples: Sequence[_Sample], decoding: Decoding, batch_size: int
) -> Iterator[tuple[_Sample, Answer]]:
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


def _row(style: Style, dataset: Dataset, sample: _Sample, answer: Answer) -> dict[str, Any]:
    return {
        "task_id": sample.problem.task_id,
        "sample": sample.number,
        "solution": solution(style, dataset, sample.problem, answer.text),
        "raw": answer.text,
        "prompt": sample.prompt.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
    }


def _seed(seed: int, task_id: str, number: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, task_id, number]).encode()).digest()
    # Servers take 32 bits, signed.
    return int.from_bytes(digest[:4], "big") >> 1


def generation_settings(args: argparse.Namespace, file: ProblemFile) -> dict[str, Any]:
    """All that determines a sample, but its task and number."""
    decoding = _decoding(args, file)
    return {
        "model": args.model,
        "weights": weights_identity(Path(args.model)),
        "dataset": file.dataset,
        "data (SHA-256)": hashlib.sha256(file.path.read_bytes()).hexdigest(),
        "prompt": args.prompt,
        "backend": args.backend,
        "endpoint": [shown_url(args.endpoint), json_object("--endpoint-body", args.endpoint_body)]
        if args.endpoint
        else None,
        "dtype": args.dtype,
        "bos": args.bos,
        "max-new-tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        # Greedy answers depend on neither.
        "top-p": decoding.top_p if decoding.temperature else None,
        "seed": args.seed if decoding.temperature else None,
    }


def weights_identity(folder: Path) -> list[list[Any]]:
    """Name, size in bytes and time of change of a checkpoint's weight files: a later export is another model."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _written(out: Path, settings: dict[str, Any]) -> set[tuple[str, int]]:
    """(task, number) of the samples in ``out``, which must be of these settings."""
    beside = out.with_suffix(".settings.json")
    drop_unfinished_row(out)
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
