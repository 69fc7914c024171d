"""``reflectron convert dist-to-hf``: a training checkpoint, or one in megatron-core's format, for Hugging Face."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", metavar="DIST_DIR", help="a step of a run's checkpoints, or hf-to-dist's folder")
    parser.add_argument("out", metavar="OUT", help="new folder, which transformers loads")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's by default")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    import torch

    from reflectron.engine.weights.writers import write_safetensors
    from reflectron.tools.convert.model_folder import open_model_folder, write_model_folder

    model = open_model_folder(args.checkpoint)
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype()
    write_model_folder(
        model, args.out, dtype, lambda folder: write_safetensors(model.weights, model.arch, dtype, folder)
    )
    print(f"{args.out}: {len(model.pieces)} tensors, {str(dtype).removeprefix('torch.')}")
    return 0
