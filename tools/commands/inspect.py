"""``reflectron inspect``: draw what training makes of each record of a file in the terminal, or write it as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from reflectron.engine.config import BatchConfig, Config, DataConfig, DataFile, MaskConfig, ModelConfig, TokenizerConfig
from reflectron.tools.load_config import choices_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.add_argument("--data", metavar="FILE", required=True, help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--tokenizer", metavar="DIR", required=True, help="folder of the tokenizer")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder, for --loss and --grad-norms")
    parser.add_argument("--template", choices=choices_of(DataConfig, "template"), default="reflection")
    parser.add_argument(
        "--strategy", choices=choices_of(MaskConfig, "strategy"), default="block", help="mask strategy (default: block)"
    )
    parser.add_argument("--order", default="tce", help="order of block types for the strategy block (default: tce)")
    parser.add_argument("--rate", type=float, default=0.33, help="mask rate, 0 to 1 (default: 0.33)")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the random strategies (default: 3407)")
    parser.add_argument("--max-len", type=int, default=4096, help="longest sample in tokens (default: 4096)")
    parser.add_argument(
        "--special-tokens-in-content",
        choices=choices_of(DataConfig, "special_tokens_in_content"),
        default="spell_out",
        help="special tokens in contents keep their ids, or are treated as ordinary text (default: spell_out)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N records only")
    parser.add_argument("--loss", action="store_true", help="compute each sample's loss terms")
    parser.add_argument("--grad-norms", action="store_true", help="compute its gradient norms as well")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--json", metavar="OUT", help="write everything there instead of drawing")


def run(args: argparse.Namespace) -> int:
    """Inspect; return the exit code."""
    from reflectron.engine.data.tokenizer import load_tokenizer
    from reflectron.tools.inspection import draw, inspect_records, loss_meter, write_json

    config = _config(args)
    tokenizer = load_tokenizer(args.tokenizer, config.data.template)
    measure = loss_meter(config, args.grad_norms, args.dtype) if args.loss or args.grad_norms else None
    records = inspect_records(config, tokenizer, args.rate, args.limit, measure)
    if args.json:
        write_json(records, args.data, Path(args.json))
    else:
        draw(records, args.data, tokenizer)
    return 0


def _config(args: argparse.Namespace) -> Config:
    if not 0 <= args.rate <= 1:
        raise ValueError(f"--rate is {args.rate}, expected 0 to 1")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json is {args.json}, expected a file in a folder that exists")
    if (args.loss or args.grad_norms) and not args.model:
        raise ValueError("--loss and --grad-norms need --model, expected a checkpoint folder")
    return Config(
        seed=args.seed,
        model=ModelConfig(path=args.model),
        tokenizer=TokenizerConfig(path=args.tokenizer),
        data=DataConfig(
            train=(DataFile(path=args.data),),
            template=args.template,
            max_length=args.max_len,
            special_tokens_in_content=args.special_tokens_in_content,
        ),
        mask=MaskConfig(strategy=args.strategy, order=args.order),
        # Samples are not packed here, so no budget limits their length.
        batch=BatchConfig(tokens_per_microbatch=max(args.max_len, 64)),
    )


SUBCOMMANDS = {"": (add_arguments, run)}
