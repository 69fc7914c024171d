"""``reflectron inspect``: what training makes of each record of a file, drawn in the terminal and as JSON.

Per sample: roles and blocks, the supervised tokens, what the student sees at a mask rate, the rows of each loss term,
and with a model the loss itself and its gradient norms, computed by the code that trains.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflectron.engine.config import BatchConfig, Config, DataConfig, DataFile, MaskConfig, ModelConfig, TokenizerConfig
from reflectron.engine.terminal import console
from reflectron.engine.text import printable, visible

if TYPE_CHECKING:
    import numpy as np

    from reflectron.engine.data.store import FileSummary
    from reflectron.engine.data.tokenization import TokenizedSample
    from reflectron.engine.data.tokenizer import Tokenizer
    from reflectron.engine.data.views import SampleViews

_STRATEGIES = ("block", "sequential_block", "random_block", "sequential_token", "random_token", "all", "none")
_BLOCK_STYLES = ("cyan", "green", "magenta")
_LEGEND = (
    "reflection: [cyan]text[/] [green]code[/] [magenta]execution[/]; "
    "[dim]not supervised[/]; [strike]hidden from the student[/]"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--data", metavar="FILE", required=True, help="JSONL or Parquet file, or id of a hub dataset")
    parser.add_argument("--tokenizer", metavar="DIR", required=True, help="folder of the tokenizer")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder, for --loss and --grad-norms")
    parser.add_argument("--template", choices=("reflection", "magicoder"), default="reflection")
    parser.add_argument("--strategy", choices=_STRATEGIES, default="block", help="mask strategy (default: block)")
    parser.add_argument("--order", default="tce", help="order of block types for the strategy block (default: tce)")
    parser.add_argument("--rate", type=float, default=0.33, help="mask rate, 0 to 1 (default: 0.33)")
    parser.add_argument("--seed", type=int, default=3407, help="seed of the random strategies (default: 3407)")
    parser.add_argument("--max-len", type=int, default=4096, help="longest sample in tokens (default: 4096)")
    parser.add_argument(
        "--special-tokens-in-content",
        choices=("keep", "spell_out"),
        default="spell_out",
        help="special tokens that contents spell become ids, or are ordinary text (default: spell_out)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N records only")
    parser.add_argument("--loss", action="store_true", help="compute each sample's loss terms")
    parser.add_argument("--grad-norms", action="store_true", help="compute its gradient norms as well")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--json", metavar="OUT", help="write everything there; nothing is drawn then")


@dataclass(frozen=True)
class Inspected:
    """One record that can be trained on."""

    index: int
    sample: TokenizedSample
    visible: np.ndarray | None
    views: SampleViews
    loss: dict[str, float] | None
    grad_norm: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        views, ids = self.views, self.sample.input_ids.tolist()
        labels = [token if target else -100 for token, target in zip(ids, self.sample.supervised, strict=True)]
        record: dict[str, Any] = {"index": self.index, "type": self.sample.kind, "input_ids": ids, "labels": labels}
        if self.sample.special_tokens:
            record["special_tokens_in_content"] = list(self.sample.special_tokens)
        if self.visible is not None:
            record["student_visible"] = "".join("1" if seen else "0" for seen in self.visible)
        record["rows"] = {
            "ce_teacher": views.ce_teacher_rows,
            "ce_student": views.ce_student_rows,
            "kl": views.kl_rows,
        }
        if self.loss is not None:
            record["loss"] = self.loss
        if self.grad_norm is not None:
            record["grad_norm"] = self.grad_norm
        return record


def run(args: argparse.Namespace) -> int:
    """Inspect; returns the exit code."""
    from reflectron.engine.data.tokenizer import load_tokenizer

    config = _config(args)
    tokenizer = load_tokenizer(args.tokenizer, config.data.template)
    measure = _loss_meter(config, args.grad_norms, args.dtype) if args.loss or args.grad_norms else None
    dropped: list[dict[str, Any]] = []
    inspected = _inspect(args, config, tokenizer, measure, dropped)
    if args.json:
        samples = [one.as_json() for one in inspected]
        text = json.dumps({"dropped": dropped, "samples": samples}, ensure_ascii=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
        print(f"{len(samples)} samples, {len(dropped)} dropped -> {args.json}")
        print(_summary(args.data, dropped, [sample.get("special_tokens_in_content", []) for sample in samples]))
        return 0
    page = console()
    page.print(_LEGEND, markup=True)
    spelt = []
    for one in inspected:
        page.print(_drawing(one, tokenizer))
        spelt.append(one.sample.special_tokens)
    for record in dropped:
        page.print(f"record {record['index']} dropped: {record['reason']}", style="red", soft_wrap=True)
    page.print(str(_summary(args.data, dropped, spelt)), soft_wrap=True)
    return 0


def _summary(path: str, dropped: Sequence[dict[str, Any]], spelt: Sequence[Sequence[str]]) -> FileSummary:
    """The counts of the records that were looked at, as training prints them."""
    from reflectron.engine.data.store import FileSummary

    reasons = [record["reason"] for record in dropped]
    return FileSummary.of(path, len(dropped) + len(spelt), reasons, [tokens for tokens in spelt if tokens])


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


LossMeter = Callable[["SampleViews"], tuple[dict[str, float], "dict[str, float] | None"]]


def _inspect(
    args: argparse.Namespace,
    config: Config,
    tokenizer: Tokenizer,
    measure: LossMeter | None,
    dropped: list[dict[str, Any]],
) -> Iterator[Inspected]:
    from reflectron.engine.data.conversation import BadRecord
    from reflectron.engine.data.masking import visible_tokens
    from reflectron.engine.data.sampler import SampleRef, mask_draws
    from reflectron.engine.data.sources import read_records
    from reflectron.engine.data.tokenization import tokenize
    from reflectron.engine.data.views import make_views

    samples, data = 0, config.data
    for record in read_records(data.train[0]):
        if args.limit is not None and record.index >= args.limit:
            return
        try:
            sample = tokenize(
                record.conversation(), tokenizer, data.template, data.max_length, data.special_tokens_in_content
            )
        except BadRecord as error:
            dropped.append({"index": record.index, "reason": str(error)})
            continue
        # As in the first epoch of a training on this file alone, which does not number rejected records.
        draws = mask_draws(config.seed, SampleRef(0, samples, 0))
        samples += 1
        visible = visible_tokens(sample, config.mask, args.rate, draws)
        views = make_views(sample, visible)
        loss, grad_norm = measure(views) if measure else (None, None)
        yield Inspected(record.index, sample, visible, views, loss, grad_norm)


def _loss_meter(config: Config, with_gradients: bool, dtype: str) -> LossMeter:
    import torch

    from reflectron.engine.parallel.process_groups import start_process_groups

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    groups = start_process_groups(config.parallel, config.seed)

    # Imported after the start, which quiets megatron-core's warnings about missing CUDA extensions.
    from reflectron.engine.model.inputs import read_model_inputs
    from reflectron.engine.training.build import load_model
    from reflectron.engine.training.diagnostics import gradient_norms, sample_loss

    inputs = read_model_inputs(config)
    for note in inputs.notes:
        print(printable(note, 1000), file=sys.stderr)
    (model,) = load_model(config, inputs, groups, getattr(torch, dtype))

    def measure(views: SampleViews) -> tuple[dict[str, float], dict[str, float] | None]:
        if (length := len(views.input_ids)) > inputs.arch.rope.positions:
            raise ValueError(
                f"a sample has {length} tokens, expected at most {inputs.arch.rope.positions}, the positions of the "
                "model (max_position_embeddings); lower --max-len"
            )
        with torch.set_grad_enabled(with_gradients):
            loss, numbers = sample_loss(model, views)
        if not with_gradients:
            return dataclasses.asdict(numbers), None
        model.zero_grad()
        loss.backward()
        return dataclasses.asdict(numbers), gradient_norms(model, inputs.arch)

    return measure


def _drawing(one: Inspected, tokenizer: Tokenizer) -> Any:
    """The text of a sample in the styles of ``_LEGEND``, and its numbers."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    sample, views = one.sample, one.views
    body = Text()
    for style, run in itertools.groupby(zip(_styles(one), sample.input_ids, strict=True), key=lambda pair: pair[0]):
        # Escaped before it is laid out, so that the frame fits.
        body.append(visible(_run_text(tokenizer, [int(token) for _, token in run])), style=style)
    lines = [
        f"{len(sample.input_ids)} tokens, {int(sample.supervised.sum())} supervised; rows: teacher CE "
        f"{views.ce_teacher_rows}, student CE {views.ce_student_rows}, KL {views.kl_rows}"
    ]
    if one.visible is not None:
        lines.append(f"student sees {int(one.visible.sum())} tokens")
    if one.loss is not None:
        lines.append("  ".join(f"{name} {value:.6f}" for name, value in one.loss.items()))
    if one.grad_norm is not None:
        lines.append(f"gradient norm {one.grad_norm['global']:.6f}")
    return Panel(Group(body, Text("\n".join(lines), style="bold")), title=Text(f"record {one.index}: {sample.kind}"))


def _styles(one: Inspected) -> list[str]:
    """Style of each token."""
    colours = ["default"] * len(one.sample.input_ids)
    for kind, start, end in one.sample.blocks:
        colours[start:end] = [_BLOCK_STYLES[kind]] * (end - start)
    visible = itertools.repeat(True, len(colours)) if one.visible is None else one.visible
    return [
        colour + ("" if target else " dim") + ("" if seen else " strike")
        for colour, target, seen in zip(colours, one.sample.supervised, visible, strict=True)
    ]


def _run_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    # Behind another token, because sentencepiece drops a space at the start of what it decodes.
    text = tokenizer.decode([tokenizer.eos_id, *ids]).removeprefix(tokenizer.decode([tokenizer.eos_id]))
    # A record may hold what would move the cursor or set the terminal's title.
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
