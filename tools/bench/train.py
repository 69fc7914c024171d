"""``reflectron bench train``: the engine beside the reference's way of training, and beside itself without its parts.

Every shape runs in processes of its own, so that none finds another's memory; its variants run side by side in them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectron.tools.bench.train_plan import TrainPlan

NO_RESULT = "on the CPU this shows that the harness works; its times say nothing about training and are no results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, on which samples, for how long."""
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


def run(args: argparse.Namespace) -> int:
    """Measure and report; not 0 when a shape's processes failed, or the engine was measured on none."""
    from reflectron.engine.parallel.launch import spawn_local
    from reflectron.engine.parallel.process_groups import device_type
    from reflectron.tools.bench.train_plan import ENGINE
    from reflectron.tools.bench.train_report import write_report

    config = _base_config(args)
    cpu = device_type(config.parallel) == "cpu"
    if cpu and args.device != "cpu":
        raise ValueError("no CUDA device is visible; --device cpu tests the harness on a tiny shape")
    shapes = (args.shapes or ("tiny" if cpu else "codellama-7b,codellama-34b,deepseek-coder-33b")).split(",")
    rows = args.out / "rows.jsonl"
    if rows.exists():
        raise ValueError(f"{rows} exists; name another folder with --out, rows are never overwritten")
    plans = [_plan(args, shape, rows) for shape in shapes]
    code = 0
    for plan in plans:
        folder = args.out / "runs" / Path(plan.shape).stem
        folder.mkdir(parents=True, exist_ok=True)
        plan.write(folder / "plan.json")
        words = [sys.executable, "-W", "ignore", "-m", "reflectron.tools.bench.train_ranks", str(folder / "plan.json")]
        code = spawn_local(words, args.gpus, threads_per_process=1, log_dir=folder) or code
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    print(write_report(found, args.out))
    if cpu:
        print(NO_RESULT)
    return code or int(not any(row["variant"] == ENGINE and row["reason"] is None for row in found))


def _base_config(args: argparse.Namespace) -> Any:
    """Check the engine's settings before a process starts, and leave them in a file for the ranks."""
    from reflectron.tools.load_config import load_config

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "engine.yaml"
    settings = {
        "model": {"dtype": "float32" if args.device == "cpu" else "bfloat16"},
        "data": {"max_length": args.max_length},
        "batch": {"global_batch_size": args.samples, "tokens_per_microbatch": args.budget},
        "parallel": {"device": args.device},
        "output_dir": str(args.out),
    }
    # JSON is YAML.
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return load_config(str(path), args.overrides)


def _plan(args: argparse.Namespace, shape: str, rows: Path) -> TrainPlan:
    from reflectron.tools.bench.train_plan import BASELINE, SCHEDULE, VARIANTS, TrainPlan, parse_build
    from reflectron.tools.bench.train_shapes import hf_config_of

    known = (BASELINE, *VARIANTS)
    variants = tuple(args.variants.split(",")) if args.variants else known
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
        overrides=tuple(args.overrides),
        layers=None if args.layers == "auto" else int(args.layers),
        samples=args.samples,
        data=args.data,
        tokenizer=args.tokenizer,
        mask_rates=SCHEDULE if args.mask_rates == "schedule" else _rates(args.mask_rates),
        variants=variants,
        builds=tuple(map(parse_build, args.build)),
        rounds=args.rounds,
        deadline=time.time() + 60 * args.minutes,
        calibration=None if args.calibration is None else str(args.calibration),
        rows=str(rows),
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"--mask-rates is {text!r}, expected schedule or numbers from 0 to 1")
    return rates
