"""The subcommands of ``reflectron bench``: their arguments, what is wrong with them, and the benchmark that they start.

Benchmarks are imported when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reflectron.tools.bench.train import TrainPlan

NO_DEVICE = "no CUDA device is visible; --device cpu runs the stages that can do without one, on tiny sizes"


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much of the table is measured, and where the rows go."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep rows.jsonl, head.md and head.png in DIR")
    parser.add_argument("--quick", action="store_true", help="a few shapes instead of all")
    parser.add_argument("--providers", metavar="A,B", help="only these; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop starting work after this time (default 8)")
    parser.add_argument("--profile", action="store_true", help="show where the time of one call goes, instead")


def head(args: argparse.Namespace) -> int:
    """Measure, or profile; return 0 when it ran to its end, also where a provider could not."""
    from reflectron.tools.bench.head import bench_head

    names = None if args.providers is None else tuple(args.providers.split(","))
    return bench_head(args.out, quick=args.quick, names=names, minutes=args.minutes, profile=args.profile)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, on which samples, for how long."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the engine, for every variant")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows.jsonl, train.md and train.png")
    parser.add_argument("--shapes", metavar="A,B", help="codellama-7b, codellama-34b, deepseek-coder-33b, config.json")
    parser.add_argument("--layers", metavar="N", default="auto", help="layers of each shape; auto: as many as fit")
    parser.add_argument("--budget", type=int, default=8192, metavar="N", help="tokens of a microbatch (default 8192)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="samples of a step (default 64)")
    parser.add_argument("--max-length", type=int, default=4096, metavar="N", help="longest sample (default 4096)")
    parser.add_argument("--mask-rates", metavar="A,B", default="schedule", help="0 to 1 each; schedule: three phases")
    parser.add_argument("--variants", metavar="A,B", help="only these; all by default")
    parser.add_argument("--build", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="also the engine so")
    parser.add_argument("--data", metavar="FILE", help="conversations to train on, instead of the papers' lengths")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer for --data")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, one a GPU (default 1)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each variant (default 5)")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no more work after this time (default 30)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="rates for the predictions beside the rows")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: a tiny shape, no results")


def train(args: argparse.Namespace) -> int:
    """Measure every shape, and report."""
    from reflectron.tools.bench.train import bench_train

    shapes = args.shapes or ("tiny" if args.device == "cpu" else "codellama-7b,codellama-34b,deepseek-coder-33b")
    settings = {
        "model": {"dtype": "float32" if args.device == "cpu" else "bfloat16"},
        "data": {"max_length": args.max_length},
        "batch": {"global_batch_size": args.samples, "tokens_per_microbatch": args.budget},
        "parallel": {"device": args.device},
        "output_dir": str(args.out),
    }
    return bench_train([_train_plan(args, shape) for shape in shapes.split(",")], settings, args.out, args.gpus)


def _train_plan(args: argparse.Namespace, shape: str) -> TrainPlan:
    from reflectron.tools.bench.report import BASELINE, SCHEDULE
    from reflectron.tools.bench.train import VARIANTS, TrainPlan, hf_config_of

    known = (BASELINE, *VARIANTS)
    variants = args.variants.split(",") if args.variants else list(known)
    if unknown := set(variants) - set(known):
        raise ValueError(f"--variants names {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    if bool(args.data) != bool(args.tokenizer):
        raise ValueError("--data and --tokenizer come together: a file of conversations and what cuts it into tokens")
    if args.layers != "auto" and not (args.layers.isdigit() and int(args.layers)):
        raise ValueError(f"--layers is {args.layers!r}, expected auto or a number above 0")
    for name in ("samples", "rounds", "gpus"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    hf_config_of(shape)
    return TrainPlan(
        shape=shape,
        config=str(args.out / "engine.yaml"),
        overrides=args.overrides,
        layers=None if args.layers == "auto" else int(args.layers),
        samples=args.samples,
        data=args.data,
        tokenizer=args.tokenizer,
        mask_rates=list(SCHEDULE) if args.mask_rates == "schedule" else _rates(args.mask_rates),
        variants=variants,
        builds=dict(map(parse_build, args.build)),
        rounds=args.rounds,
        deadline=time.time() + 60 * args.minutes,
        calibration=None if args.calibration is None else str(args.calibration),
        rows=str(args.out / "rows.jsonl"),
    )


def parse_build(text: str) -> tuple[str, list[str]]:
    """Return the name and the overrides of ``name:key=value,key=value``.

    Raises:
        ValueError: when it is spelt otherwise.
    """
    name, colon, settings = text.partition(":")
    overrides = settings.split(",") if settings else []
    if not name or not colon or not all("=" in word for word in overrides) or not overrides:
        raise ValueError(f"--build is {text!r}, expected name:key=value,key=value")
    return name, overrides


def _rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"--mask-rates is {text!r}, expected schedule or numbers from 0 to 1")
    return rates


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Add which stages run, for how long, and where the rows go."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: examples/benchmarks/<GPU>")
    parser.add_argument("--stages", metavar="A,B", help="only these; all by default")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all stages together (default 9)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: a test of this command")


def gpu(args: argparse.Namespace) -> int:
    """Run the stages; return 1 when one that checks correctness failed."""
    import torch

    from reflectron.tools.bench.gpu import bench_gpu, chosen_stages

    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(NO_DEVICE)
    stages = chosen_stages(args.stages.split(",") if args.stages else ())
    if args.minutes <= 0:
        raise ValueError(f"--minutes is {args.minutes}, expected a number above 0")
    return bench_gpu(args.out, stages, args.minutes, cuda=args.device != "cpu")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how large the models are, how many ranks there are, and where the rows go."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows.jsonl and scratch space")
    parser.add_argument(
        "--layers", metavar="N,N", default="1,4,8", help="layers of each model, 12.6 million parameters a layer"
    )
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the state (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="saves and loads of each model (default 5)")


def checkpoint(args: argparse.Namespace) -> int:
    """Measure; prints each row as it is known."""
    layers = _numbers(args.layers, "--layers", "1,4,8")
    from reflectron.tools.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(args.out, layers, args.processes, args.rounds)


def _numbers(text: str, option: str, example: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"{option} is {text!r}, expected numbers such as {example}")
    return [int(word) for word in text.split(",")]


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many documents there are, and where the rows go."""
    parser.add_argument("--documents", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--peer-documents", type=int, default=20_000, help="for datasketch; 0 skips it")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 means one per core (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="rows.jsonl, and scratch space")


def corpus(args: argparse.Namespace) -> int:
    """Measure; prints each row as it is known."""
    from reflectron.tools.bench.data import bench_corpus

    return bench_corpus(args.out, args.documents, args.peer_documents, args.workers)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much is made, and where the rows go."""
    from reflectron.tools.sandbox.process import add_sandbox_arguments

    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of rows.jsonl")
    parser.add_argument("--interpreters", default="1,2,4", metavar="N,N", help="sizes of the pool (default 1,2,4)")
    parser.add_argument("--problems", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each size (default 3)")
    add_sandbox_arguments(parser)


def data(args: argparse.Namespace) -> int:
    """Measure; prints each row as it is known."""
    from reflectron.tools.bench.data import bench_reflect

    sizes = _numbers(args.interpreters, "--interpreters", "1,2,4")
    return bench_reflect(args.out, sizes, args.problems, args.rounds, args.sandbox, args.i_understand)


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the rates go, and how many processes measure at once."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file of the rates")
    parser.add_argument(
        "--processes",
        type=int,
        default=None,
        metavar="N",
        help="that measure at once, as many as a plan has ranks on a machine (default: CUDA devices, else 1)",
    )


def calibrate(args: argparse.Namespace) -> int:
    """Measure, write the file and print what was found."""
    import torch

    from reflectron.tools.bench.calibrate import calibrate, summary

    devices = torch.cuda.device_count()
    processes = args.processes or devices or 1
    if processes < 1 or (devices and processes > devices):
        raise ValueError(f"--processes is {args.processes}, expected 1 to the machine's devices")
    content = calibrate(processes)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(*summary(content), sep="\n")
    return 0


AddArguments = Callable[[argparse.ArgumentParser], None]
SUBCOMMANDS: dict[str, tuple[AddArguments, Callable[[argparse.Namespace], int]]] = {
    "head": (add_head_arguments, head),
    "train": (add_train_arguments, train),
    "gpu": (add_gpu_arguments, gpu),
    "checkpoint": (add_checkpoint_arguments, checkpoint),
    "corpus": (add_corpus_arguments, corpus),
    "data": (add_data_arguments, data),
    "calibrate": (add_calibrate_arguments, calibrate),
}
