"""``reflectron convert``: checkpoints between formats, and the comparison of two of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from reflectron.tools.convert.model_folder import ModelFolder

    WeightWriter = Callable[[ModelFolder, torch.dtype, Path], None]


def add_hf_to_dist_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``convert hf-to-dist``."""
    parser.add_argument("checkpoint", metavar="HF_DIR", help="folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", help="new folder; model.path may name it, and so may Megatron's tools")
    _add_dtype_argument(parser)


def add_dist_to_hf_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``convert dist-to-hf``."""
    parser.add_argument("checkpoint", metavar="DIST_DIR", help="a step of a run's checkpoints, or hf-to-dist's folder")
    parser.add_argument("out", metavar="OUT", help="new folder, which transformers loads")
    _add_dtype_argument(parser)


def _add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's by default")


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``convert verify``."""
    for name in ("first", "second"):
        parser.add_argument(name, metavar=name.upper(), help="checkpoint folder of either format")
    parser.add_argument("--text", metavar="FILE", help="text to compute logits on; a short program by default")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens of the text to use (default 512)")
    parser.add_argument("--tolerance", type=float, default=0.0, help="logit difference that passes (default 0)")
    parser.add_argument("--json", metavar="OUT", help="write the numbers there as well")


def hf_to_dist(args: argparse.Namespace) -> int:
    """Write a Hugging Face checkpoint in megatron-core's dist_checkpointing format; return the exit code."""
    from reflectron.engine.parallel.process_groups import silence_upstream_warnings

    silence_upstream_warnings("cpu")

    from reflectron.engine.weights.writers import write_weights

    return _convert(args, lambda model, dtype, folder: write_weights(model.weights, model.arch, dtype, folder))


def dist_to_hf(args: argparse.Namespace) -> int:
    """Write a training checkpoint, or one in megatron-core's format, for Hugging Face; return the exit code."""
    from reflectron.engine.weights.writers import write_safetensors

    return _convert(args, lambda model, dtype, folder: write_safetensors(model.weights, model.arch, dtype, folder))


def _convert(args: argparse.Namespace, write: WeightWriter) -> int:
    import torch

    from reflectron.tools.convert.model_folder import open_model_folder, write_model_folder

    model = open_model_folder(args.checkpoint)
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype()
    write_model_folder(model, args.out, dtype, partial(write, model, dtype))
    print(f"{args.out}: {len(model.pieces)} tensors, {str(dtype).removeprefix('torch.')}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints; returns 0 when the largest logit difference is within the tolerance, else 1."""
    from reflectron.tools.convert.model_folder import open_model_folder
    from reflectron.tools.convert.verify import SAMPLE_TEXT, compare

    text = Path(args.text).read_text(encoding="utf-8") if args.text else SAMPLE_TEXT
    folders = open_model_folder(args.first), open_model_folder(args.second)
    comparison = compare(*folders, text, args.max_tokens)
    for folder, digest in zip(folders, comparison.sha256, strict=True):
        print(f"{folder.folder}: {comparison.tensors} tensors, SHA-256 {digest}")
    worst = f", most in {comparison.where}" if comparison.where else ""
    print(
        f"{comparison.different_tensors} of {comparison.tensors} tensors differ, by at most "
        f"{comparison.largest_tensor_difference:.3g}{worst}"
    )
    print(f"logits over {comparison.tokens} tokens differ by at most {comparison.largest_logit_difference:.3g}")
    if args.json:
        Path(args.json).write_text(json.dumps(dataclasses.asdict(comparison)) + "\n", encoding="utf-8")
    return 0 if comparison.largest_logit_difference <= args.tolerance else 1


SUBCOMMANDS = {
    "hf-to-dist": (add_hf_to_dist_arguments, hf_to_dist),
    "dist-to-hf": (add_dist_to_hf_arguments, dist_to_hf),
    "verify": (add_verify_arguments, verify),
}
