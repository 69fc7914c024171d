"""``reflectron convert hf-to-dist``: a Hugging Face checkpoint in megatron-core's dist_checkpointing format."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", metavar="HF_DIR", help="folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", help="new folder; model.path may name it, and so may Megatron's tools")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's by default")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    import torch

    from reflectron.engine.parallel.process_groups import silence_upstream_warnings

    silence_upstream_warnings("cpu")

    from reflectron.engine.weights.writers import write_weights
    from reflectron.tools.convert.model_folder import open_model_folder, write_model_folder

    model = open_model_folder(args.checkpoint)
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype()
    write_model_folder(model, args.out, dtype, lambda folder: write_weights(model.weights, model.arch, dtype, folder))
    print(f"{args.out}: {len(model.pieces)} tensors, {str(dtype).removeprefix('torch.')}")
    return 0
