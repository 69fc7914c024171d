"""From the arguments of ``plan`` and ``data stats`` to the model, the samples and the cluster to predict for."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from reflectron.engine.config import Config
from reflectron.tools.planner.backends import STACKS

if TYPE_CHECKING:
    from reflectron.engine.model.architecture import Architecture
    from reflectron.tools.planner.hardware import Cluster
    from reflectron.tools.planner.predict import LayoutPrediction, Planner
    from reflectron.tools.planner.samples import SampleLengths


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that ``cluster_of`` reads."""
    parser.add_argument(
        "--gpu", default="A800-80GB", help="A100-80GB, A800-80GB, H100-80GB, H800-80GB, H200-141GB, or CPU"
    )
    parser.add_argument(
        "--backends",
        choices=tuple(STACKS),
        help="what backends.* auto means: what pip installs, transformer-engine as well, or plain torch (default: what "
        "the calibration was measured with, else pip)",
    )
    parser.add_argument("--gpus", type=int, default=16, metavar="N", help="GPUs in all (default: 16)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default: 8)")
    parser.add_argument(
        "--network-gbit", type=float, metavar="N", help="network of a GPU, Gbit/s (default: 200 or 400)"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="rates that `bench calibrate` measured")


def make_planner(args: argparse.Namespace) -> Planner:
    """Return what predicts layouts of the model, data and cluster that the arguments name.

    Raises:
        ValueError: naming the argument or key at fault.
    """
    from reflectron.tools.load_config import load_config
    from reflectron.tools.planner.predict import Planner
    from reflectron.tools.planner.samples import assumed_samples

    first, *overrides = args.words if args.words and "=" not in args.words[0] else [None, *args.words]
    if first is None and overrides:
        raise ValueError("expected CONFIG before key=value")
    config = load_config(first, overrides) if first else Config()
    samples = _samples_of_files(config) if args.lengths == "data" else assumed_samples(args.lengths, config)
    source = args.model or config.model.path or config.model.config
    if source is None:
        raise ValueError("--model is missing, expected a config.json (or model.path in CONFIG)")
    return Planner(planned_architecture(source, config), config, samples, cluster_of(args))


def requested_layouts(args: argparse.Namespace, planner: Planner) -> list[LayoutPrediction]:
    """Return the layouts that fit, or CONFIG's own whether it fits or not."""
    if not args.as_is:
        return planner.search()
    prediction = planner.predict(planner.config)
    if not prediction.fits:
        print("this layout does not fit", file=sys.stderr)
    return [prediction]


def cluster_of(args: argparse.Namespace) -> Cluster:
    """Return the cluster that the run is to use.

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
    """Read the ``config.json`` that is ``source`` or lies in it, its vocabulary as large as a run's.

    Where no tokenizer is at hand, the template's tags are taken to be new to it and the model to have no spare rows.
    """
    from reflectron.engine.data.tokenizer import TAGS, load_tokenizer
    from reflectron.engine.model.hf_config import parse_architecture, read_hf_config

    arch = parse_architecture(read_hf_config(source), source)
    tokenizer = config.tokenizer.path or config.model.path
    if tokenizer is not None and Path(tokenizer).exists():
        rows = load_tokenizer(tokenizer, config.data.template).size
    elif config.data.template == "reflection":
        rows = arch.vocab_size + len(TAGS)
    elif config.data.template == "magicoder":
        rows = arch.vocab_size
    else:
        assert_never(config.data.template)
    return replace(arch, vocab_size=max(arch.vocab_size, rows))


def _samples_of_files(config: Config) -> SampleLengths:
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
