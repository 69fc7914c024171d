"""What training makes of each record of a file: its tokens and blocks, the student's view, its loss, a drawing.

Everything is computed by the code that trains.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from reflectron.engine.config import Config
from reflectron.engine.data.conversation import BadRecord
from reflectron.engine.data.masking import visible_tokens
from reflectron.engine.data.sampler import SampleRef, mask_draws
from reflectron.engine.data.sources import read_records
from reflectron.engine.data.store import FileSummary
from reflectron.engine.data.tokenization import TokenizedSample, tokenize
from reflectron.engine.data.tokenizer import Tokenizer
from reflectron.engine.data.views import SampleViews, make_views
from reflectron.engine.files import printable, visible
from reflectron.engine.terminal import console
from reflectron.tools.ranks import start_only_rank

_BLOCK_STYLES = ("cyan", "green", "magenta")
_LEGEND = (
    "reflection: [cyan]text[/] [green]code[/] [magenta]execution[/]; "
    "[dim]not supervised[/]; [strike]hidden from the student[/]"
)

LossMeter = Callable[[SampleViews], tuple[dict[str, float], dict[str, float] | None]]


@dataclass(frozen=True)
class DroppedRecord:
    """Names a record that cannot be trained on, and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Inspected:
    """Holds what training makes of one record."""

    index: int
    sample: TokenizedSample
    visible: np.ndarray | None
    views: SampleViews
    loss: dict[str, float] | None
    grad_norm: dict[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
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


def inspect_records(
    config: Config, tokenizer: Tokenizer, mask_rate: float, limit: int | None, measure: LossMeter | None
) -> Iterator[Inspected | DroppedRecord]:
    """Yield the first ``limit`` records of ``data.train``, as the first epoch of a training on them sees them."""
    samples, data = 0, config.data
    for record in read_records(data.train[0]):
        if limit is not None and record.index >= limit:
            return
        try:
            sample = tokenize(
                record.conversation(), tokenizer, data.template, data.max_length, data.special_tokens_in_content
            )
        except BadRecord as error:
            yield DroppedRecord(record.index, str(error))
            continue
        # Training does not number rejected records.
        draws = mask_draws(config.seed, SampleRef(0, samples, 0))
        samples += 1
        visible = visible_tokens(sample, config.mask, mask_rate, draws)
        views = make_views(sample, visible)
        loss, grad_norm = measure(views) if measure else (None, None)
        yield Inspected(record.index, sample, visible, views, loss, grad_norm)


def loss_meter(config: Config, with_gradients: bool, dtype: str) -> LossMeter:
    """Load the model, and return what computes a sample's loss terms and, ``with_gradients``, its gradient norms."""
    import torch

    groups = start_only_rank(config.parallel, config.seed)

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


def write_json(records: Iterable[Inspected | DroppedRecord], source: str, out: Path) -> None:
    """Write all records to ``out``, and print how many there are."""
    samples, dropped = [], []
    for record in records:
        if isinstance(record, DroppedRecord):
            dropped.append(record)
        else:
            samples.append(record.as_json())
    text = json.dumps({"dropped": [vars(record) for record in dropped], "samples": samples}, ensure_ascii=False)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"{len(samples)} samples, {len(dropped)} dropped -> {out}")
    print(_summary(source, dropped, [sample.get("special_tokens_in_content", []) for sample in samples]))


def draw(records: Iterable[Inspected | DroppedRecord], source: str, tokenizer: Tokenizer) -> None:
    """Draw each record in the terminal as it comes, and print how many there are."""
    page = console()
    page.print(_LEGEND, markup=True)
    special_tokens, dropped = [], []
    for record in records:
        if isinstance(record, DroppedRecord):
            dropped.append(record)
        else:
            page.print(_drawing(record, tokenizer))
            special_tokens.append(record.sample.special_tokens)
    for record in dropped:
        page.print(f"record {record.index} dropped: {record.reason}", style="red", soft_wrap=True)
    page.print(str(_summary(source, dropped, special_tokens)), soft_wrap=True)


def _summary(source: str, dropped: Sequence[DroppedRecord], special_tokens: Sequence[Sequence[str]]) -> FileSummary:
    """Return the counts of the records, as training prints them."""
    reasons = [record.reason for record in dropped]
    return FileSummary.of(
        source, len(dropped) + len(special_tokens), reasons, [tokens for tokens in special_tokens if tokens]
    )


def _drawing(one: Inspected, tokenizer: Tokenizer) -> Panel:
    """Draw the text of a sample in the styles of ``_LEGEND``, and its numbers."""
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
    """Return the style of each token."""
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
