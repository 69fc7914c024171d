"""``reflectron plan``: a model, a training set and a cluster in; out come layouts that fit, their time and their price.

Nothing is run: memory is counted, time is predicted from the rates of datasheets or of ``reflectron bench calibrate``,
and everything assumed is printed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reflectron.engine.config import Config

if TYPE_CHECKING:
    from reflectron.engine.model.architecture import Architecture
    from reflectron.tools.planner.hardware import Cluster
    from reflectron.tools.planner.samples import Samples
    from reflectron.tools.planner.search import Planner, Prediction

_LENGTHS = ("papers", "oss-instruct", "evol-instruct", "data")
_STACKS = ("pip", "te", "plain")
# Tags that the template ``reflection`` adds to the vocabulary.
_TAGS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument(
        "words", nargs="*", metavar="[CONFIG] key=value", help="YAML file of a run, and settings that win over it"
    )
    parser.add_argument("--model", metavar="FILE", help="config.json of the model; model.path of CONFIG otherwise")
    add_cluster_arguments(parser)
    parser.add_argument("--lengths", choices=_LENGTHS, default="papers", help="assumed ones, or data.train of CONFIG")
    parser.add_argument("--as-is", action="store_true", help="predict CONFIG's own layout instead of searching")
    parser.add_argument("--tokens", action="store_true", help="also count tokens over the mask schedule")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: 5)")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="also show money, in its currency")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the best layout as the YAML file of a run")


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that ``cluster_of`` reads."""
    parser.add_argument(
        "--gpu", default="A800-80GB", help="A100-80GB, A800-80GB, H100-80GB, H800-80GB, H200-141GB, or CPU"
    )
    parser.add_argument(
        "--backends",
        choices=_STACKS,
        help="what backends.* auto means: what pip installs, transformer-engine as well, or plain torch (default: what "
        "the calibration was measured with, else pip)",
    )
    parser.add_argument("--gpus", type=int, default=16, metavar="N", help="GPUs in all (default: 16)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default: 8)")
    parser.add_argument(
        "--network-gbit", type=float, metavar="N", help="network of a GPU, Gbit/s (default: 200 or 400)"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="rates that `bench calibrate` measured")


def run(args: argparse.Namespace) -> int:
    """Predict; returns the exit code."""
    from reflectron.tools.planner import tables
    from reflectron.tools.planner.recipe import write_recipe

    if args.top < 1:
        raise ValueError(f"--top is {args.top}, expected at least 1")
    planner = make_planner(args)
    predictions = predict(args, planner)
    best = predictions[0]
    tables.show_layouts(predictions[: args.top], args.price_per_gpu_hour)
    paper = f"ReflectionCoder's 34B run took {tables.PAPER_GPU_HOURS} on 16 A800"
    print(f"The first of them: {best.gpu_hours:.0f} GPU hours; {paper}.\n")
    tables.show_parts(best)
    if args.tokens:
        tables.show_tokens(planner)
    print("Assumptions:")
    for line in tables.assumptions(planner, best):
        print(f"- {line}")
    if args.write:
        write_recipe(args.write, best, f"reflectron plan {shlex.join(_words(args))}")
        print(f"\nwrote {args.write}")
    return 0


def make_planner(args: argparse.Namespace) -> Planner:
    """What predicts layouts of the model, data and cluster that the arguments name.

    Raises:
        ValueError: naming the argument or key at fault.
    """
    from reflectron.tools.load_config import load_config
    from reflectron.tools.planner.samples import assumed_samples
    from reflectron.tools.planner.search import Planner

    first, *overrides = args.words if args.words and "=" not in args.words[0] else [None, *args.words]
    if first is None and overrides:
        raise ValueError("expected CONFIG before key=value")
    config = load_config(first, overrides) if first else Config()
    samples = _samples_of_files(config) if args.lengths == "data" else assumed_samples(args.lengths, config)
    source = args.model or config.model.path or config.model.config
    if source is None:
        raise ValueError("--model is missing, expected a config.json (or model.path in CONFIG)")
    return Planner(planned_architecture(source, config), config, samples, cluster_of(args))


def predict(args: argparse.Namespace, planner: Planner) -> list[Prediction]:
    """The layouts that fit, or CONFIG's own whether it fits or not."""
    if not args.as_is:
        return planner.search()
    prediction = planner.predict(planner.config)
    if not prediction.fits:
        print("this layout does not fit", file=sys.stderr)
    return [prediction]


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Where the run is to take place.

    Raises:
        ValueError: naming the argument at fault.
    """
    from reflectron.tools.planner.hardware import GB, make_cluster

    cluster = make_cluster(args.gpu, args.gpus, args.gpus_per_node, args.calibration, args.backends)
    if args.network_gbit is not None:
        if args.network_gbit <= 0:
            raise ValueError(f"--network-gbit is {args.network_gbit}, expected a number above 0")
        rate = args.network_gbit / 8 * GB
        gpu = replace(cluster.gpu, network_bytes_per_second=rate)
        cluster = replace(cluster, gpu=gpu, network_bytes_per_second=rate * gpu.fractions.bus)
    return cluster


def planned_architecture(source: str, config: Config) -> Architecture:
    """Of the ``config.json`` that is ``source`` or lies in it, its vocabulary with the template's tags."""
    from reflectron.engine.model.hf_config import parse_architecture, read_hf_config

    arch = parse_architecture(read_hf_config(source), source)
    return replace(arch, vocab_size=arch.vocab_size + _TAGS) if config.data.template == "reflection" else arch


def _samples_of_files(config: Config) -> Samples:
    from reflectron.engine.data.store import build_store
    from reflectron.engine.data.tokenizer import load_tokenizer
    from reflectron.engine.training.run import store_folder
    from reflectron.tools.planner.samples import samples_of

    path = config.tokenizer.path or config.model.path
    if path is None or not config.data.train:
        raise ValueError("--lengths data needs data.train and tokenizer.path (or model.path) in CONFIG")
    tokenizer = load_tokenizer(path, config.data.template)
    store = build_store(config.data, config.data.train, tokenizer, store_folder(config, "train"), sys.stderr.isatty())
    if not len(store):
        raise ValueError("data.train has no sample left, expected at least one")
    return samples_of(store, config)


def _words(args: argparse.Namespace) -> list[str]:
    """The arguments that a recipe depends on."""
    words = [*args.words, "--gpu", args.gpu, "--gpus", str(args.gpus), "--gpus-per-node", str(args.gpus_per_node)]
    words += ["--lengths", args.lengths]
    for name in ("backends", "model", "network_gbit", "calibration"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words
